"""Ops of random models: what they are made of and the table that they are registered in.

An op is a function that takes a `Builder`, chooses values and options, and returns a `Part` (a module) with the indices
of the values that it reads. Values are tensors of rank 2 to 5 with the batch in front. What is channels and what is
space is not kept: a conv takes axis 1 as channels, a linear layer the last one, of whatever was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_LIMIT = 1500  # elements of a sample


class UnfitError(Exception):
    """A step fits none of the values."""


class Part(nn.Module):
    """Calls `function(self, *values)`; its parameters, buffers and modules are given by name."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member, persistent=not name.startswith("passing"))
            else:
                setattr(self, name, member)

    def forward(self, *values: Tensor) -> Any:
        return self.function(self, *values)


def new(*shape: int) -> nn.Parameter:
    """A parameter; its values are drawn when the part is added."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Random values for every floating parameter and buffer, of a size that keeps activations near one."""
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                value = noise.abs() + 0.5
            elif tensor.squeeze().ndim > 1:
                value = noise / max(prod(tensor.shape[1:]), 1) ** 0.5
            else:  # scales around one, everything else around zero
                value = 0.2 * noise + (0.0 if name.endswith(("bias", "mean")) else 1.0)
            tensor.copy_(value)


class Builder:
    """The values so far, and the numbers of the step that is being built."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.values: list[Tensor] = []
        self.parts: list[Part] = []
        self.wiring: list[tuple[int, ...]] = []
        self.names: list[str] = []  # of the ops that were applied
        self.picks: list[int] = []

    def number(self) -> int:
        """The next number of the step."""
        return self.picks.pop(0) if self.picks else 0

    def choose(self, options: Sequence[T]) -> T:
        """One of the options; raises `UnfitError` where there is none."""
        if not options:
            raise UnfitError
        return options[self.number() % len(options)]

    def flag(self) -> bool:
        """Yes or no; no is plainer."""
        return bool(self.number() % 2)

    def value(self, *ranks: int) -> int:
        """One of the three latest values of these ranks."""
        return self.choose([k for k in self.latest() if self.values[k].dim() in ranks][:3])

    def latest(self) -> list[int]:
        """All values that ops can read, the latest first."""
        return [k for k in reversed(range(len(self.values))) if self.values[k].is_floating_point()]

    def like(self, index: int) -> int:
        """Another value of the same shape; the same one where there is no other."""
        shape = self.values[index].shape
        others = [k for k in self.latest() if self.values[k].shape == shape and k != index]
        return self.choose(others or [index])

    def axis(self, index: int) -> int:
        """A dimension other than the batch."""
        return self.choose(range(1, self.values[index].dim()))

    def width(self) -> int:
        """A number of channels."""
        return self.choose((4, 6, 8, 12, 3, 5, 2))

    def add(self, name: str, part: Part, reads: Sequence[int], *, filled: bool = True) -> None:
        """Append a part, unless its results get too large, too small or not finite."""
        part.double().eval()
        if filled:
            fill(part, self.generator)
        given = [value.clone() for value in self.values]
        try:
            with torch.no_grad():
                out = part(*[given[k] for k in reads])
        except (RuntimeError, ValueError, IndexError) as error:  # torch refuses shapes with each of these
            raise UnfitError from error
        results: list[Tensor] = list(out) if isinstance(out, tuple) else [out]
        for result in results:
            top = result.abs().max().item() if result.numel() else float("nan")
            fits = result.numel() / result.shape[0] <= _LIMIT and result.shape[0] == self.values[0].shape[0]
            double = result.dtype == torch.float64  # tolerances are those of double precision
            if not fits or not double or not 1e-2 < top < 1e2 or not 2 <= result.dim() <= 5:
                raise UnfitError
        self.values += results
        self.parts.append(part)
        self.wiring.append(tuple(reads))
        self.names.append(name)


Op = Callable[[Builder], tuple[Part, Sequence[int]]]
OPS: dict[str, Op] = {}
WEIGHTS: dict[str, int] = {}


def op(weight: int = 1) -> Callable[[Op], Op]:
    """Register an op; `weight` says how often it is drawn."""

    def register(function: Op) -> Op:
        OPS[function.__name__] = function
        WEIGHTS[function.__name__] = weight
        return function

    return register


def divisors(n: int) -> list[int]:
    """All divisors, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]
