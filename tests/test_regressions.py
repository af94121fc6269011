"""Models that were once widened wrongly, or not at all, as small as they could be made.

`python -m bench.fuzz` prints what it finds in the form in which it is kept here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpd_fx
from gpd_fx.capture.capture import Mode
from gpd_fx.plan.ratios import Ratio
from tests.graph_check import Asked, check

aten: Any = torch.ops.aten


def _values(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise / max(prod(shape[1:]), 1) ** 0.5 if len(shape) > 1 else 1 + 0.2 * noise


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(_values(*shape))


def table(*shape: int) -> nn.Buffer:
    return nn.Buffer(_values(*shape))


def integers(values: Any) -> nn.Buffer:
    return nn.Buffer(torch.tensor(values))


def widens_exactly(
    model: nn.Module,
    *shapes: tuple[int, ...],
    ratio: Ratio = 2.0,
    exclude: Sequence[str] = (),
    modes: Sequence[Mode] = ("eval",),
) -> None:
    """Widening changes nothing; `shapes` are those of the inputs, without the batch."""

    def inputs(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)

    check(model, inputs, (Asked(ratio, tuple(exclude)),), modes)


def test_rrelu_without_arguments() -> None:
    """Making the graph deterministic took its lower bound for whether it trains."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU(), nn.Flatten(), nn.Linear(16, 2))
    teacher = gpd_fx.expand(model, 2.0, (torch.randn(2, 3, 2, 2),))
    assert teacher.report().coverage > 0.9


@pytest.mark.filterwarnings("ignore:nothing in Last widens")
def test_last_states_of_an_lstm_that_are_used() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            _, (h, c) = self.rnn(x)
            return self.head(torch.cat([h[-1], c[-1]], -1))

    model, x = Last().double(), torch.randn(2, 4, 3, dtype=torch.float64)
    teacher = gpd_fx.expand(model, 1.5, (x,))
    torch.testing.assert_close(teacher(x), model(x), rtol=1e-12, atol=1e-12)
    misled = any("another shape" in entry.reason for entry in teacher.report().frozen)  # by the capture of torch 2.11
    assert misled or teacher.report().coverage > 0.95


def test_inputs_whose_batches_are_never_compared() -> None:
    """Their sizes were numbered apart, and a rule that takes both met two batches."""

    class Warp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.flow, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            grid = self.flow(y).permute(0, 2, 3, 1).tanh()
            return self.head(nn.functional.grid_sample(self.image(x), grid, align_corners=False).mean((2, 3)))

    widens_exactly(Warp().double(), (3, 5, 6), (3, 4, 7))
    report = gpd_fx.expand(Warp(), 2.0, (torch.randn(2, 3, 5, 6), torch.randn(2, 3, 4, 7))).report()
    assert [group.name for group in report.groups] == ["image.weight[0]"]
    assert not any("failed" in entry.reason for entry in report.frozen)
