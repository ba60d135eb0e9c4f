"""Operations of a run: checkpoints, processes, metrics, folders."""
