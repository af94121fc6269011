"""Settings that every test runs under: one torch thread a worker, and a fixed seed before each test."""

from __future__ import annotations

import os

# Before torch is imported: several workers with several threads each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Captures take seconds, and the first one pays for lazy imports: a deadline would measure that.
settings.register_profile("gpd_fx", deadline=None, print_blob=True)
settings.load_profile("gpd_fx")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)
