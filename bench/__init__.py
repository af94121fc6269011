"""Benchmarks and sweeps, each with its own `--help`: `python -m bench.expand`, `python -m bench.zoo`."""
