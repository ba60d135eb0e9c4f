"""Tools used before and after training: data preparation, sampling, evaluation, export."""
