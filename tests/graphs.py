"""Random models for property tests, built from a drawn program.

A `Program` is plain data: an input and a list of steps, each an op's name and a few numbers. Building it means to walk
along the steps with real tensors; a step that fits none of the values there is left out, so every program is a model,
and one is made smaller by dropping steps and lowering numbers. Numbers choose among options, the plainest first.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from tests import graph_layers, graph_ops, graph_places, graph_products
from tests.graph_parts import OPS, WEIGHTS, Builder, Part, UnfitError, fill

_MODULES = (graph_layers, graph_ops, graph_places, graph_products)
assert set(OPS) <= {name for module in _MODULES for name in vars(module)}  # importing them registers the ops
PICKS = 8
NUMBERS = 24
_INPUTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "image": ((3, 8, 8),),
    "tokens": ((6, 5),),
    "vector": ((7,),),
    "ids": ((6,),),
    "image and vector": ((3, 6, 6), (5,)),
    "line": ((3, 12),),
}
SOURCES = tuple(_INPUTS)


@dataclass(frozen=True)
class Step:
    """One op and the numbers that choose its operands and options."""

    op: str
    picks: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A model as data."""

    source: str
    stem: tuple[int, ...]
    steps: tuple[Step, ...]
    head: tuple[int, ...]
    seed: int = 0


class RandomNet(nn.Module):
    """The model that a program describes. `names` are the ops that found an operand."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        b = Builder(program.seed)
        b.values = list(example(program, 2, 0))
        _stem(b, program)
        for step in program.steps:
            b.picks = list(step.picks)
            try:
                part, reads = OPS[step.op](b)
                b.add(step.op, part, reads, filled=part not in b.parts)
            except UnfitError:
                continue
        self.names = [name for name in b.names if name != "stem"]
        b.picks = list(program.head)
        leaves = _head(b, len(_INPUTS[program.source]))
        self.shape_of_output = b.choose(["sum", "tuple", "dict", "raw"])
        self.parts = nn.ModuleList(b.parts)
        self.wiring = b.wiring
        self.leaves = leaves
        self.train()  # the builder tries each part in eval mode

    def forward(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for part, reads in zip(self.parts, self.wiring, strict=True):
            out = part(*[values[k] for k in reads])
            values += list(out) if isinstance(out, tuple) else [out]
        found = [values[k] for k in self.leaves]
        if self.shape_of_output == "sum":
            return torch.stack(found).sum(0)
        if self.shape_of_output == "dict":
            return {f"out{k}": value for k, value in enumerate(found)}
        if self.shape_of_output == "raw":
            return found[0], values[self.leaves[0] - 1]
        return tuple(found)


def _stem(b: Builder, program: Program) -> None:
    """Channels born from a parameter, for each input."""
    b.picks = list(program.stem)
    for k in range(len(b.values)):
        x = b.values[k]
        c = b.width()
        if not x.is_floating_point():
            part = Part(lambda m, x: m.table(x), table=nn.Embedding(10, c))
        elif x.dim() == 4:
            part = Part(lambda m, x: m.conv(x), conv=nn.Conv2d(x.shape[1], c, 3, padding=1))
        elif program.source == "line":
            part = Part(lambda m, x: m.conv(x), conv=nn.Conv1d(x.shape[1], c, 3, padding=1))
        else:
            part = Part(lambda m, x: m.linear(x), linear=nn.Linear(x.shape[-1], c))
        b.add("stem", part, [k])


def _head(b: Builder, inputs: int) -> list[int]:
    """A linear layer on up to three values that nothing reads."""
    read = {k for reads in b.wiring for k in reads}
    ends = [k for k in range(inputs, len(b.values)) if k not in read][-3:]
    leaves: list[int] = []
    for k in ends:
        x = b.values[k]
        way = b.choose(["pool", "flatten", "last"])
        if x.dim() == 2 or way == "last":
            dims = tuple(range(1, x.dim() - 1))
            layer = nn.Linear(x.shape[-1], 5)
            part = Part(lambda m, x, dims=dims: m.linear(x.mean(dims) if dims else x), linear=layer)
        elif way == "pool":
            dims = tuple(range(2, x.dim()))
            part = Part(lambda m, x, dims=dims: m.linear(x.mean(dims)), linear=nn.Linear(x.shape[1], 5))
        else:
            part = Part(lambda m, x: m.linear(x.flatten(1)), linear=nn.Linear(prod(x.shape[1:]), 5))
        part.double()
        fill(part, b.generator)
        with torch.no_grad():
            b.values.append(part(x))
        b.parts.append(part)
        b.wiring.append((k,))
        leaves.append(len(b.values) - 1)
    return leaves


def example(program: Program, batch: int, seed: int) -> tuple[Tensor, ...]:
    """Random inputs of a batch."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = _INPUTS[program.source]
    if program.source == "ids":
        return (torch.randint(10, (batch, *shapes[0]), generator=generator),)
    return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)


_DRAWN = [name for name in OPS for _ in range(WEIGHTS[name])]


def draw_program(random: Random, most: int = 10) -> Program:
    """A program of up to `most` steps, rather few than many."""

    def numbers() -> tuple[int, ...]:
        return tuple(random.randrange(NUMBERS) for _ in range(PICKS))

    steps = tuple(Step(random.choice(_DRAWN), numbers()) for _ in range(random.randint(1, random.randint(1, most))))
    return Program(random.choice(SOURCES), numbers(), steps, numbers(), random.randrange(4))
