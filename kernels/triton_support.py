"""Whether triton is installed, and the dtypes that its kernels take here."""

from __future__ import annotations

import functools
import importlib.util

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def available() -> bool:
    """Whether triton is installed; it is an extra, and does not exist for every system."""
    return importlib.util.find_spec("triton") is not None
