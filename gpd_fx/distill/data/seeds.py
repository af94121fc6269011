"""Random numbers that depend on nothing but the seed and what they are for.

The order of an epoch, what happens to an image and what dropout does in an update are each drawn from a state made of
the seed, a purpose and a position. So a run that is taken up again draws what it would have drawn, and neither the
number of processes that load images nor that of processes that train changes an image.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, Literal

import numpy as np
import torch

Purpose = Literal["order", "image", "update", "start"]
_PURPOSES: Final[dict[Purpose, int]] = {"order": 0, "image": 1, "update": 2, "start": 3}


def derive(seed: int, purpose: Purpose, *position: int) -> int:
    """A 63-bit number that looks unrelated for every other seed, purpose or position."""
    state = np.random.SeedSequence([seed, _PURPOSES[purpose], *position]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def set_all(number: int) -> None:
    """Seed Python, numpy, and torch on every device in use."""
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002  timm's mixup draws from numpy's own state
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


@contextmanager
def restored() -> Generator[None]:
    """Meanwhile Python, numpy and torch on the CPU may be seeded; afterwards their states are what they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  as above
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def permutation(seed: int, epoch: int, count: int) -> list[int]:
    """The order of an epoch's images."""
    return np.random.Generator(np.random.PCG64(derive(seed, "order", epoch))).permutation(count).tolist()
