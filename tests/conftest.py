"""Settings that every test runs under: one torch thread a worker, and a fixed seed before each test."""

from __future__ import annotations

import os
from collections.abc import Callable

# Before torch is imported: several workers with several threads each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
if os.environ.get("GPD_FX_DEVICE") != "cuda":  # `make test-gpu` sets it
    os.environ.setdefault("TRITON_INTERPRET", "1")  # and before triton is: kernels run on CPU tensors

import pytest
import torch
from hypothesis import settings
from torch import nn

torch.set_num_threads(1)

# Captures take seconds, and the first one pays for lazy imports: a deadline would measure that.
settings.register_profile("gpd_fx", deadline=None, print_blob=True)
settings.load_profile("gpd_fx")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Gives every parameter and buffer of a module random values of a size that keeps activations near one."""

    def apply(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                if not tensor.is_floating_point():
                    continue
                if name.endswith("running_var"):
                    value = noise.abs() + 0.5
                elif tensor.ndim > 1:
                    value = noise / tensor[0].numel() ** 0.5
                else:  # scales around one, everything else around zero
                    value = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
                tensor.copy_(value)
        return module

    return apply
