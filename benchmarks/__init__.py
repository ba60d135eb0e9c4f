"""Benchmarks. Each prints a table and stores its results in `benchmarks/results/`."""
