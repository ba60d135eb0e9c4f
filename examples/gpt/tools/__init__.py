"""Tools before and after training: data, samples, evaluation, export."""
