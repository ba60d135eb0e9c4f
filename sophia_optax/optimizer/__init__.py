"""State and updates: the chain of transformations that turns gradients into updates."""
