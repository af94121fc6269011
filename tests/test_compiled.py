"""A compiled teacher: one graph for both networks, with channels last and under autocast, values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpd_fx
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher


def step(
    teacher: DynamicTeacher, call: Callable[..., Any], x: Tensor, amp: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
        wide, narrow = call(x, role="both")
        loss = wide.float().square().mean() + narrow.float().square().mean()
    loss.backward()
    return wide, narrow


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_without_a_graph_break(amp: torch.dtype | None, randomise: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, stride=2, groups=2), nn.BatchNorm2d(12), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )
    x = torch.randn(4, 3, 11, 9).to(memory_format=torch.channels_last)
    teacher = gpd_fx.expand(randomise(model), 1.5, (x,)).train()
    with torch.no_grad():
        for parameter in teacher.composition.branches.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch's stub lacks it
    twin = copy.deepcopy(teacher)
    compiled = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    found, expected = step(teacher, compiled, x, amp), step(twin, twin, x, amp)
    bound = 1e-6 if amp is None else 4 * torch.finfo(amp).eps
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype == (amp or torch.float32)
        assert (mine - theirs).abs().max() <= bound * theirs.abs().max()
    gradients = [(p.grad, q.grad) for p, q in zip(teacher.parameters(), twin.parameters(), strict=True)]
    assert all(mine is not None for mine, _ in gradients)
    for mine, theirs in gradients:
        assert mine is not None
        assert theirs is not None
        assert (mine - theirs).abs().max() <= bound * theirs.abs().max().clamp_min(1e-3)
