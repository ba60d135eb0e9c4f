"""The optimizer: a chain of Optax transformations that turns gradients into updates."""
