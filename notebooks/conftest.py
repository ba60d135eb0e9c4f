# Each script is the text of the notebook beside it, which is what runs.
collect_ignore_glob = ["*.py"]
