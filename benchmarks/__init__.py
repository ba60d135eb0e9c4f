"""Measurements: each module prints a table and writes it to `benchmarks/results/`."""
