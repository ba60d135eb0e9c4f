"""What comes before and after training: data, text, evaluation, export."""
