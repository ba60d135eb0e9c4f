"""Run management: checkpoints, processes, metrics and folders."""
