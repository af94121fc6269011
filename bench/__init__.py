"""Benchmarks and sweeps, each with its `--help`: `python -m bench`, `python -m bench.expand`, `python -m bench.zoo`."""
