"""The model, optimizer and training loop: the code to copy and modify."""
