"""The trainer: its schedule, both kinds of objective, and how it stops."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gpd_fx import expand, fold
from gpd_fx.errors import ArgumentError, TrainingError
from gpd_fx.losses import GPDLoss, cross_entropy
from gpd_fx.teacher import DynamicTeacher
from gpd_fx.train import Schedule, decay_groups, evaluate, fit

Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))


def data() -> list[Batch]:
    """Two classes: bright above, or bright below."""
    torch.manual_seed(1)
    labels = torch.arange(64) % 2
    images = torch.randn(64, 1, 6, 6) * 0.5
    images[labels == 0, :, :3] += 1
    images[labels == 1, :, 3:] += 1
    return [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]


def teacher() -> DynamicTeacher:
    return expand(net(), 2.0, (data()[0][0],), verify=False)


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
    model = net()
    model[5].weight.requires_grad_(False)
    decayed, others = decay_groups(model, 0.1)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 1, 3, 3)]
    assert [tuple(parameter.shape) for parameter in others["params"]] == [(4,), (4,), (2,)]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_a_model_alone_learns() -> None:
    model, batches = net(), data()
    history = fit(model, batches, Schedule(6, 0.2), cross_entropy, validate=lambda: evaluate(model, batches))
    assert [epoch.epoch for epoch in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].losses["total"] < 0.5 * history[0].losses["total"]
    assert history[-1].metrics == evaluate(model, batches)
    assert history[-1].metrics["student"] > 0.9
    assert not model.training


def test_student_and_teacher_learn_together() -> None:
    both, batches = teacher(), data()
    history = fit(both, batches, Schedule(6, 0.1), GPDLoss(), validate=lambda: evaluate(both, batches))
    assert set(history[0].losses) == {"task_student", "task_teacher", "distill_student", "total"}
    assert history[-1].losses["total"] < history[0].losses["total"]
    assert min(history[-1].metrics.values()) > 0.9
    student = fold(both)
    assert evaluate(student, batches)["student"] == history[-1].metrics["student"]
    images = batches[0][0]
    torch.testing.assert_close(student.eval()(images), both.student(images))


def test_a_step_is_sgd_on_the_sum_of_the_losses() -> None:
    ours, theirs, (images, labels) = teacher(), teacher(), data()[0]
    fit(ours, [(images, labels)], Schedule(1, 0.1, warmup=0.0, weight_decay=0.0), GPDLoss())
    theirs.train()
    teacher_out, student_out = theirs.both(images)
    GPDLoss()(student_out, teacher_out, labels).total.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert other.grad is not None, name
        torch.testing.assert_close(mine.detach(), other.detach() - 0.1 * 1.9 * other.grad)  # Nesterov's first step


def test_the_same_seed_gives_the_same_weights() -> None:
    def train() -> dict[str, Tensor]:
        images, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
        order = torch.Generator().manual_seed(3)
        model = net()
        loader = DataLoader(TensorDataset(images, labels), 16, shuffle=True, generator=order)
        fit(model, loader, Schedule(2, 0.1), cross_entropy)
        return model.state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_loss_that_is_not_finite_stops_with_epoch_and_step() -> None:
    batches = data()
    batches[2] = (batches[2][0].fill_(float("nan")), batches[2][1])
    model = net()
    with pytest.raises(TrainingError, match=r"epoch 1, step 3 .*task nan.*lower the learning rate"):
        fit(model, batches, Schedule(2, 0.1), cross_entropy)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with pytest.raises(TrainingError, match="task_teacher nan"):
        fit(teacher(), batches, Schedule(2, 0.1), GPDLoss())


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match=r"gpd_fx\.expand"):
        fit(net(), data(), Schedule(1, 0.1), GPDLoss())
    with pytest.raises(ArgumentError, match="no batch"):
        fit(net(), [], Schedule(1, 0.1), cross_entropy)
    with pytest.raises(ArgumentError, match="no batch"):
        evaluate(net(), [])


def test_evaluate_counts_over_batches_and_keeps_the_mode() -> None:
    model = nn.Identity()
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    logits = torch.eye(4)
    batches = [(logits[:3], torch.tensor([0, 1, 0])), (logits[3:], torch.tensor([3]))]
    assert evaluate(model, batches) == {"student": 0.75}
    assert model.training
    both = teacher().train()
    assert set(evaluate(both, data())) == {"student", "teacher"}
    assert both.training


def test_progress_is_shown_and_taken_away() -> None:
    with Progress(console=Console(file=io.StringIO())) as progress:
        fit(net(), data(), Schedule(1, 0.1), cross_entropy, progress=progress, title="a run")
        assert progress.tasks == []
