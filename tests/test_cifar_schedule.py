"""The schedule of the comparison on small images, and the optimizer's groups."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from bench.cifar.schedule import Schedule, decay_groups
from gpd_fx.errors import ArgumentError


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(epochs=1, learning_rate=1.0, warmup=0.2)
    factors = [schedule.factor(step, 50) for step in range(51)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[0] > 0
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[50] == pytest.approx(0.0)
    assert Schedule(epochs=1, learning_rate=1.0, warmup=0.0).factor(0, 1) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"warmup": 1.0},
    ],
)
def test_a_bad_schedule_names_the_value(options: dict[str, Any]) -> None:
    values: dict[str, Any] = {"epochs": 1, "learning_rate": 0.1, **options}
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Schedule(**values)


def test_only_kernels_are_decayed() -> None:
    conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model[4].weight.requires_grad_(False)
    decayed, others = decay_groups(model, 0.1)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 1, 3, 3)]
    assert [tuple(parameter.shape) for parameter in others["params"]] == [(4,), (4,), (2,)]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
