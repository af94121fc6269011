"""A small plain trainer: a dynamic teacher with its student, or any model alone, on one schedule.

SGD with Nesterov momentum; the learning rate rises linearly over the warm-up and falls to zero along a half cosine.
Parameters with fewer than two dimensions (norms, biases, branch scales) are not decayed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gpd_fx.errors import ArgumentError, TrainingError
from gpd_fx.losses import GPDLoss, select_logits
from gpd_fx.teacher import DynamicTeacher


class Batches(Protocol):
    """What training and evaluation go through: (inputs, target) pairs of known number, such as a `DataLoader`."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the data.
        learning_rate: the highest value, reached after the warm-up.
        momentum: of SGD (Nesterov).
        weight_decay: for parameters with two or more dimensions.
        warmup: share of all steps during which the learning rate rises.
    """

    epochs: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.1

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value that cannot work, by name.
        """
        if self.epochs < 1:
            raise ArgumentError(f"Schedule(epochs={self.epochs!r}) must be 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ArgumentError(f"Schedule(learning_rate={self.learning_rate!r}) must be a finite number above 0")
        if not 0 < self.momentum < 1:
            raise ArgumentError(f"Schedule(momentum={self.momentum!r}) must lie between 0 and 1 (Nesterov needs it)")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ArgumentError(f"Schedule(weight_decay={self.weight_decay!r}) must be a finite number, 0 or more")
        if not 0 <= self.warmup < 1:
            raise ArgumentError(f"Schedule(warmup={self.warmup!r}) must be at least 0 and below 1")

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of `step` (from 0) out of `steps`, as a share of the highest."""
        rising = self.warmup * steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, steps - rising))))


@dataclass(frozen=True)
class Epoch:
    """What one epoch showed: mean training losses by name, and what the evaluation returned."""

    epoch: int
    learning_rate: float
    seconds: float
    losses: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict[str, float])


def fit(
    model: nn.Module,
    batches: Batches,
    schedule: Schedule,
    objective: GPDLoss | Callable[[Tensor, Tensor], Tensor],
    *,
    validate: Callable[[], Mapping[str, float]] | None = None,
    progress: Progress | None = None,
    title: str = "training",
) -> list[Epoch]:
    """Train `model` in place and leave it in eval mode.

    Args:
        model: a dynamic teacher (with a `GPDLoss`) or any model (with a task loss).
        batches: gone through once an epoch.
        schedule: how long and how fast.
        objective: a `GPDLoss`, which trains a dynamic teacher and its student together, or a loss of (logits, target).
        validate: called after each epoch; what it returns is kept in the history.
        progress: a running `rich` display to show the steps in.
        title: what the display calls this run.

    Raises:
        ArgumentError: the objective does not fit the model, or there is no batch.
        TrainingError: the loss is not finite any more.
    """
    steps_of_an_epoch = len(batches)
    if steps_of_an_epoch == 0:
        raise ArgumentError("fit: there is no batch to train on")
    step_losses = _objective(model, objective)
    optimizer = torch.optim.SGD(
        decay_groups(model, schedule.weight_decay), lr=schedule.learning_rate, momentum=schedule.momentum, nesterov=True
    )
    steps = schedule.epochs * steps_of_an_epoch
    scheduler = LambdaLR(optimizer, lambda step: schedule.factor(step, steps))
    device = next(model.parameters()).device
    bar = None if progress is None else progress.add_task(title, total=steps)
    history: list[Epoch] = []
    for epoch in range(1, schedule.epochs + 1):
        model.train()
        started, learning_rate = time.perf_counter(), float(scheduler.get_last_lr()[0])
        sums: dict[str, float] = {}
        for step, (inputs, target) in enumerate(batches, start=1):
            total, parts = step_losses(inputs.to(device), target.to(device))
            if not math.isfinite(parts["total"]):
                raise TrainingError(_not_finite(epoch, step, float(scheduler.get_last_lr()[0]), parts))
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            scheduler.step()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
            if progress is not None and bar is not None:
                progress.update(bar, advance=1)
        losses = {name: value / steps_of_an_epoch for name, value in sums.items()}
        seconds = time.perf_counter() - started
        metrics = {} if validate is None else dict(validate())
        history.append(Epoch(epoch, learning_rate, seconds, losses, metrics))
    if progress is not None and bar is not None:
        progress.remove_task(bar)
    model.eval()
    return history


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    select: Callable[[Any], Tensor] = select_logits,
) -> dict[str, float]:
    """Top-1 accuracy in eval mode: {"student": ...}, and {"teacher": ...} too where `model` is a dynamic teacher.

    Raises:
        ArgumentError: there is no batch.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    right: dict[str, float] = {}
    count = 0
    try:
        for inputs, target in batches:
            moved = inputs.to(device)
            if isinstance(model, DynamicTeacher):
                teacher_out, student_out = model.both(moved)
                outputs = {"student": student_out, "teacher": teacher_out}
            else:
                outputs = {"student": model(moved)}
            for name, output in outputs.items():
                right[name] = right.get(name, 0) + int((select(output).argmax(1) == target.to(device)).sum())
            count += len(target)
    finally:
        model.train(training)
    if count == 0:
        raise ArgumentError("evaluate: there is no batch to evaluate on")
    return {name: value / count for name, value in right.items()}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: weight decay for two and more dimensions, none for the others."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def _objective(
    model: nn.Module, objective: GPDLoss | Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], tuple[Tensor, dict[str, float]]]:
    """(inputs, target) -> (loss to minimise, its parts as numbers, with "total")."""
    if not isinstance(objective, GPDLoss):

        def alone(inputs: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
            total = objective(select_logits(model(inputs)), target)
            value = total.item()
            return total, {"task": value, "total": value}

        return alone
    if not isinstance(model, DynamicTeacher):
        raise ArgumentError(
            f"a GPDLoss trains a dynamic teacher, got {type(model).__name__}; make one with gpd_fx.expand(model), "
            "or pass a loss of (logits, target) to train the model alone"
        )

    def both(inputs: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
        teacher_out, student_out = model.both(inputs)
        losses = objective(student_out, teacher_out, target)
        return losses.total, dict(losses.items())

    return both


def _not_finite(epoch: int, step: int, learning_rate: float, parts: Mapping[str, float]) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    return (
        f"the loss is not finite in epoch {epoch}, step {step} (learning rate {learning_rate:.4g}): {values}; "
        "lower the learning rate, lengthen the warm-up, or look for non-finite values in this batch"
    )
