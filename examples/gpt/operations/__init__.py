"""What a run needs beside the training loop: checkpoints, processes, logs, folders."""
