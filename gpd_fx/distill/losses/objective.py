"""The losses of an update by name, each times its weight at that moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from torch import Tensor
from torch.nn import functional

from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.losses.weights import Weight, weight_at
from gpd_fx.errors import ArgumentError
from gpd_fx.losses import GPDLoss, dkd, kd

Static = Callable[[Tensor, Tensor, Tensor], Tensor]


def _kd(student: Tensor, teacher: Tensor, target: Tensor, **options: float) -> Tensor:
    del target
    return kd(student, teacher, **options)


_STATIC: Final[Mapping[str, Callable[..., Tensor]]] = {"dkd": dkd, "kd": _kd}
_OPTIONS: Final = {"dkd": ("alpha", "beta", "temperature"), "kd": ("temperature", "smoothing")}


def task_loss(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy to class numbers, smoothed, or to shares of classes as mixup gives them (smoothed by it)."""
    if target.is_floating_point():
        return functional.cross_entropy(logits.float(), target.float())
    full = logits.float() if logits.dtype.itemsize < 4 else logits
    return functional.cross_entropy(full, target, label_smoothing=smoothing)


@dataclass(frozen=True)
class Objective:
    """What a run minimises.

    Attributes:
        weights: of the losses, by the names in `config.LOSSES`.
        task: loss of one network's logits and the target.
        static: loss of (logits, static teacher's logits, target).
        temperature: of the distillation from the dynamic teacher.
        smoothing: of its target.
    """

    weights: Mapping[str, Weight]
    task: Callable[[Tensor, Tensor], Tensor]
    static: Static
    temperature: float = 1.0
    smoothing: float = 0.1

    @classmethod
    def of(cls, config: DistillConfig) -> Objective:
        """The objective of a completed configuration.

        Raises:
            ArgumentError: an option of the static teacher's loss is unknown.
        """
        for name in config.static_options:
            if name not in _OPTIONS[config.static_loss]:
                known = ", ".join(_OPTIONS[config.static_loss])
                raise ArgumentError(f"static_options has {name!r}; {config.static_loss} takes {known}")
        options: dict[str, Any] = config.static_options
        static = partial(_STATIC[config.static_loss], **options)
        task = partial(task_loss, smoothing=config.label_smoothing)
        return cls(config.weights, task, static, config.temperature, config.smoothing)

    def __call__(
        self, outputs: Mapping[str, Tensor], target: Tensor, static: Tensor | None, epoch: float
    ) -> dict[str, Tensor]:
        """The weighted parts; what to minimise is their sum.

        Args:
            outputs: what a `Trainee` returned.
            target: class numbers, or shares of classes.
            static: the static teacher's logits.
            epoch: where training is, in epochs.
        """
        now = {name: weight_at(weight, epoch) for name, weight in self.weights.items()}
        student, teacher = outputs["student"], outputs.get("teacher")
        if teacher is None:
            parts = {"task_student": now["task_student"] * self.task(student, target)}
            if static is not None:
                parts["static_student"] = now["static"] * self.static(student, static.detach(), target)
        else:
            criterion = GPDLoss(
                task=self.task,
                distill_weight=now["distill"],
                temperature=self.temperature,
                smoothing=self.smoothing,
                static_weight=now["static"],
                static=self.static,
                student_weight=now["task_student"],
                teacher_weight=now["task_teacher"],
            )
            parts = criterion(student, teacher, target, static).parts()
        features = {name: loss for name, loss in outputs.items() if name.startswith("features")}
        return parts | {name: now["features"] * loss for name, loss in features.items()}
