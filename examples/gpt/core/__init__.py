"""The model, its optimizer and its training loop: the part to copy and change."""
