"""A study of optimizers: what each part of Sophia is worth on small models."""
