"""The GPD objective against its published formulas, written here a second time with loops over samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gpd_fx.errors import ArgumentError
from gpd_fx.losses import (
    GPDLoss,
    dkd,
    kd,
    select_logits,
    soft_cross_entropy,
)

CLASSES = 7


def logits(seed: int, batch: int = 5) -> Tensor:
    return torch.randn(batch, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def softmax(row: list[float], temperature: float) -> list[float]:
    exponents = [math.exp(value / temperature) for value in row]
    return [value / sum(exponents) for value in exponents]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def dkd_reference(s: Tensor, t: Tensor, target: list[int], alpha: float, beta: float, temperature: float) -> float:
    total = 0.0
    for s_row, t_row, y in zip(s.tolist(), t.tolist(), target, strict=True):
        p_s, p_t = softmax(s_row, temperature), softmax(t_row, temperature)
        binary = kl([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]])
        rest_s = [p / (1 - p_s[y]) for i, p in enumerate(p_s) if i != y]
        rest_t = [p / (1 - p_t[y]) for i, p in enumerate(p_t) if i != y]
        total += (alpha * binary + beta * kl(rest_t, rest_s)) * temperature**2
    return total / len(target)


def kd_reference(s: Tensor, t: Tensor, temperature: float, smoothing: float) -> float:
    total = 0.0
    for s_row, t_row in zip(s.tolist(), t.tolist(), strict=True):
        p_s, p_t = softmax(s_row, temperature), softmax(t_row, temperature)
        soft = -sum(a * math.log(b) for a, b in zip(p_t, p_s, strict=True))
        uniform = -sum(math.log(b) for b in p_s) / len(p_s)
        total += ((1 - smoothing) * soft + smoothing * uniform) * temperature**2
    return total / len(s)


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.1), (1.0, 0.0), (4.0, 0.3)])
def test_kd_is_its_formula(temperature: float, smoothing: float) -> None:
    s, t = logits(0), logits(1)
    assert kd(s, t, temperature, smoothing).item() == pytest.approx(kd_reference(s, t, temperature, smoothing))


def test_kd_without_smoothing_has_the_gradient_of_the_kl_divergence() -> None:
    s, t = logits(0).requires_grad_(), logits(1)
    (ours,) = torch.autograd.grad(kd(s, t, 2.0), s)
    divergence = functional.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean") * 4
    (theirs,) = torch.autograd.grad(divergence, s)
    torch.testing.assert_close(ours, theirs)


def test_soft_cross_entropy_of_one_hot_targets_is_cross_entropy_with_label_smoothing() -> None:
    s, y = logits(0), torch.tensor([0, 3, 6, 2, 2])
    ours = soft_cross_entropy(s, functional.one_hot(y, CLASSES).double(), 0.1)
    torch.testing.assert_close(ours, functional.cross_entropy(s, y, label_smoothing=0.1))


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 0.5, 1.0), (1.0, 8.0, 4.0), (0.0, 1.0, 2.0)])
def test_dkd_is_its_formula(alpha: float, beta: float, temperature: float) -> None:
    s, t, y = logits(2), logits(3), torch.tensor([0, 3, 6, 2, 2])
    wanted = dkd_reference(s, t, y.tolist(), alpha, beta, temperature)
    assert dkd(s, t, y, alpha, beta, temperature).item() == pytest.approx(wanted)


def test_dkd_with_the_teachers_own_share_as_beta_is_the_kl_divergence() -> None:
    s, t, y = logits(2, batch=1), logits(3, batch=1), torch.tensor([4])
    beta = 1 - t.softmax(1)[0, 4].item()
    whole = functional.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    torch.testing.assert_close(dkd(s, t, y, 1.0, beta), whole)


def test_dkd_gradient_and_extreme_logits_are_finite() -> None:
    s, y = logits(2).requires_grad_(), torch.tensor([0, 3, 6, 2, 2])
    assert torch.autograd.gradcheck(lambda x: dkd(x, logits(3), y), (s,))
    wild = (logits(4).float() * 100).requires_grad_()
    dkd(wild, -wild.detach(), y).backward()
    assert wild.grad is not None
    assert wild.grad.isfinite().all()


def test_classes_lie_along_dimension_one() -> None:
    s, t, y = logits(0, 6), logits(1, 6), torch.tensor([0, 3, 6, 2, 2, 1])
    maps = [x.view(2, 3, CLASSES).movedim(-1, 1) for x in (s, t)]  # (batch, classes, positions)
    torch.testing.assert_close(dkd(maps[0], maps[1], y.view(2, 3)), dkd(s, t, y))
    torch.testing.assert_close(kd(maps[0], maps[1], 1.0, 0.1), kd(s, t, 1.0, 0.1))


def test_defaults_are_the_methods_with_distillation_at_weight_1() -> None:
    s, t, u, y = logits(0), logits(1), logits(2), torch.tensor([0, 3, 6, 2, 2])
    parts = dict(GPDLoss()(s, t, y, u).items())
    wanted = {
        "task_student": functional.cross_entropy(s, y).item(),
        "task_teacher": functional.cross_entropy(t, y).item(),
        "distill_student": kd_reference(s, t, 1.0, 0.1),
        "static_student": dkd_reference(s, u, y.tolist(), 1.0, 0.5, 1.0),
        "static_teacher": dkd_reference(t, u, y.tolist(), 1.0, 0.5, 1.0),
    }
    assert parts == pytest.approx({**wanted, "total": sum(wanted.values())})


def test_every_part_has_a_weight() -> None:
    s, t, u, y = logits(0), logits(1), logits(2), torch.tensor([0, 3, 6, 2, 2])
    plain = dict(GPDLoss()(s, t, y, u).items())
    weighted = dict(
        GPDLoss(student_weight=0.5, teacher_weight=2.0, distill_weight=3.0, static_weight=0.1)(s, t, y, u).items()
    )
    factors = {
        "task_student": 0.5,
        "task_teacher": 2.0,
        "distill_student": 3.0,
        "static_student": 0.1,
        "static_teacher": 0.1,
    }
    wanted = {name: factor * plain[name] for name, factor in factors.items()}
    assert weighted == pytest.approx({**wanted, "total": sum(wanted.values())})


def test_no_gradient_of_the_students_distillation_reaches_the_teachers() -> None:
    s, t, u = (logits(seed).requires_grad_() for seed in range(3))
    y = torch.tensor([0, 3, 6, 2, 2])
    losses = GPDLoss()(s, t, y, u)
    (to_teacher,) = torch.autograd.grad(losses.distill_student, t, allow_unused=True, retain_graph=True)
    assert to_teacher is None
    losses.total.backward()
    assert u.grad is None
    assert s.grad is not None
    assert t.grad is not None
    alone = t.detach().clone().requires_grad_()
    (functional.cross_entropy(alone, y) + dkd(alone, u, y)).backward()
    torch.testing.assert_close(t.grad, alone.grad)


def test_without_static_teacher_there_are_three_parts() -> None:
    losses = GPDLoss()(logits(0), logits(1), torch.tensor([0, 3, 6, 2, 2]))
    assert losses.static_student is None
    assert [name for name, _ in losses.items()] == ["task_student", "task_teacher", "distill_student", "total"]


def test_soft_targets_of_mixup() -> None:
    s, t, u, y = logits(0), logits(1), logits(2), torch.tensor([0, 3, 6, 2, 2])
    hard, soft = GPDLoss()(s, t, y, u), GPDLoss()(s, t, functional.one_hot(y, CLASSES).double(), u)
    assert dict(soft.items()) == pytest.approx(dict(hard.items()))
    mixed = 0.7 * functional.one_hot(y, CLASSES).double() + 0.3 / CLASSES
    task = GPDLoss()(s, t, mixed).task_student.item()
    wanted = -(mixed * s.softmax(1).log()).sum().item() / len(y)
    assert task == pytest.approx(wanted)


def test_half_precision_is_computed_in_float32() -> None:
    s, t, y = logits(0).bfloat16(), logits(1).bfloat16(), torch.tensor([0, 3, 6, 2, 2])
    half, full = GPDLoss()(s, t, y, t), GPDLoss()(s.float(), t.float(), y, t.float())
    assert half.total.dtype == torch.float32
    assert dict(half.items()) == pytest.approx(dict(full.items()))


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize(
    "wrap", [lambda x: x, Output, lambda x: {"logits": x}, lambda x: {"out": x, "aux": 0}, lambda x: (x, 1)]
)
def test_outputs_that_hold_logits(wrap: Any) -> None:
    s = logits(0)
    assert select_logits(wrap(s)) is s
    losses = GPDLoss()(wrap(s), wrap(logits(1)), torch.tensor([0, 3, 6, 2, 2]))
    assert losses.total.item() > 0


def test_own_select_task_and_static_loss() -> None:
    loss = GPDLoss(
        task=lambda x, y: functional.mse_loss(x, y),
        static=lambda x, u, _: functional.l1_loss(x, u),
        static_weight=2.0,
        select=lambda output: output["boxes"]["scores"],
    )
    s, t, u, y = (logits(seed) for seed in range(4))
    student_out, teacher_out, static_out = ({"boxes": {"scores": x}} for x in (s, t, u))
    losses = loss(student_out, teacher_out, y, static_out)
    torch.testing.assert_close(losses.task_student, functional.mse_loss(s, y))
    torch.testing.assert_close(losses.static_teacher, 2 * functional.l1_loss(t, u))


@pytest.mark.parametrize(
    "options",
    [
        {"distill_weight": -1.0},
        {"student_weight": -1.0},
        {"teacher_weight": math.inf},
        {"distill_weight": math.nan},
        {"static_weight": math.inf},
        {"temperature": 0.0},
        {"smoothing": 1.0},
        {"smoothing": "0.1"},
        {"task": "cross_entropy"},
    ],
)
def test_bad_options_name_themselves(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        GPDLoss(**options)


def test_bad_outputs_and_targets_say_what_is_wrong() -> None:
    y = torch.tensor([0, 3, 6, 2, 2])
    with pytest.raises(ArgumentError, match=r"\(5, 7\) and shape \(4, 7\)"):
        GPDLoss()(logits(0), logits(1, 4), y)
    with pytest.raises(ArgumentError, match="select"):
        GPDLoss()({"boxes": 1}, logits(1), y)
    with pytest.raises(ArgumentError, match="student's logits"):
        GPDLoss()(torch.zeros(5), torch.zeros(5), y)
    with pytest.raises(ArgumentError, match="two classes"):
        dkd(torch.zeros(5, 1), torch.zeros(5, 1), y)
    with pytest.raises(ArgumentError, match="target of shape"):
        dkd(logits(0), logits(1), y[:3])
