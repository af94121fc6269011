"""Benchmarks and sweeps: `python -m bench.expand`, `python -m bench.zoo`."""
