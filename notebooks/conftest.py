# Do not collect the scripts: nbmake runs the notebooks, which have the same cells.
collect_ignore_glob = ["*.py"]
