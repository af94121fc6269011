"""What a list of models for sweeps is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A model, example inputs in float64 with a batch of 2, and the coverage that is expected of it at ratio 2."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    coverage: float = 0.95


def normal(*shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    """Normal values, a batch of 2 for each shape of one sample."""

    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(len(shapes))
        return tuple(torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in shapes), {}

    return inputs


def tokens(vocabulary: int, *shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    """Integers below `vocabulary`, both ends of the range among them."""

    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(vocabulary)
        found = [torch.randint(vocabulary, (2, *shape), generator=generator) for shape in shapes]
        for tensor in found:
            tensor.view(-1)[0], tensor.view(-1)[-1] = 0, vocabulary - 1
        return tuple(found), {}

    return inputs
