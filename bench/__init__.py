"""Benchmarks and sweeps, each with its `--help`: `python -m bench`, `python -m bench.zoo`."""
