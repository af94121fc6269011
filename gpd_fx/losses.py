"""The GPD objective: what the student and the dynamic teacher (DT) are trained on together.

With student logits s, DT logits t, static teacher logits u, labels y, and classes along dimension 1:

    task        L(s, y) + L(t, y)                                            cross-entropy unless told otherwise
    distill     w * H((1 - e) softmax(t / T) + e / K, softmax(s / T)) T^2    t detached; e = 0.1, T = 1, w = 1
    static      DKD(s, u, y) + DKD(t, u, y)                                  u detached; only with a static teacher

H is the cross-entropy. The method was published with w = 3; the default is 1, with which small students on CIFAR-10
gained more from scratch, and as much elsewhere, over five seeds each (docs/cifar.md). Decoupled knowledge distillation
(DKD, Zhao et al., CVPR 2022) splits KL(u || s) into a binary part, target class against the rest, and a part among the
other classes, and weighs the two freely:

    DKD = T^2 (alpha KL(b_u || b_s) + beta KL(p_u || p_s)),    b = (p_y, 1 - p_y),    p = softmax over the classes but y

With alpha = 1 and beta = 1 - b_u[0] of each sample it would be KL(u || s) again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from gpd_fx.errors import ArgumentError


def soft_cross_entropy(logits: Tensor, probabilities: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of `logits` to target `probabilities`, of which `smoothing` is spread over all classes."""
    _same_shape("soft_cross_entropy", logits, probabilities)
    log_p = functional.log_softmax(_full(logits), dim=1)
    target = (1.0 - smoothing) * _full(probabilities) + smoothing / logits.shape[1]
    return -(target * log_p).sum(dim=1).mean()


def kd(student: Tensor, teacher: Tensor, temperature: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """Soft cross-entropy of the student's logits to the teacher's softmax, times temperature squared.

    The teacher's logits are detached. Up to the teacher's entropy this is the KL divergence of Hinton et al. (2015).
    """
    _same_shape("kd", student, teacher)
    target = functional.softmax(_full(teacher.detach()) / temperature, dim=1)
    return soft_cross_entropy(_full(student) / temperature, target, smoothing) * temperature**2


def dkd(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Decoupled knowledge distillation from the teacher's (detached) logits to the student's.

    Soft targets count as the class with the largest share.
    """
    _same_shape("dkd", student, teacher)
    if student.shape[1] < 2:
        raise ArgumentError(f"dkd needs at least two classes along dimension 1, got logits of {_shape(student)}")
    index = (target.argmax(dim=1) if target.is_floating_point() else target).unsqueeze(1)
    if index.shape != student[:, :1].shape:
        raise ArgumentError(
            f"dkd: target of {_shape(target)} does not fit logits of {_shape(student)}; give class numbers of "
            f"{tuple(student[:, 0].shape)} or probabilities of the logits' shape"
        )
    s_binary, s_others = _decouple(_full(student) / temperature, index)
    t_binary, t_others = _decouple(_full(teacher.detach()) / temperature, index)
    loss = alpha * _kl(t_binary, s_binary) + beta * _kl(t_others, s_others)
    return loss.mean() * temperature**2


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The default task loss: class numbers (integers) or probabilities (as mixup gives them)."""
    return functional.cross_entropy(_full(logits), _full(target) if target.is_floating_point() else target)


def select_logits(output: Any) -> Tensor:
    """The one tensor that a model's output is about: itself, `.logits`, `["logits"]`, `["out"]`, or the first item.

    Raises:
        ArgumentError: none of these is a tensor; pass `GPDLoss(select=...)`.
    """
    if isinstance(output, Tensor):
        return output
    candidates: list[Any] = [getattr(output, "logits", None)]
    if isinstance(output, Mapping):
        mapping = cast("Mapping[Any, Any]", output)
        candidates += [mapping.get("logits"), mapping.get("out")]
    elif isinstance(output, (tuple, list)) and output:
        candidates.append(cast("tuple[Any, ...] | list[Any]", output)[0])
    for candidate in candidates:
        if isinstance(candidate, Tensor):
            return candidate
    raise ArgumentError(
        f"cannot tell which part of the model's output ({type(output).__name__}) is the logits; "
        "pass GPDLoss(select=...), a function from the output to one tensor"
    )


@dataclass(frozen=True)
class GPDLosses:
    """The parts of the objective for one batch, each already times its weight; None where there is no such part."""

    task_student: Tensor
    task_teacher: Tensor
    distill_student: Tensor
    static_student: Tensor | None = None
    static_teacher: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """The parts that there are, by name."""
        parts = {field.name: cast("Tensor | None", getattr(self, field.name)) for field in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def total(self) -> Tensor:
        """The sum of all parts: what to call `backward` on."""
        parts = list(self.parts().values())
        return sum(parts[1:], parts[0])

    def items(self) -> tuple[tuple[str, float], ...]:
        """(name, value) of each part and of the total, as plain numbers for a log."""
        named = {**self.parts(), "total": self.total}
        values = torch.stack([part.detach().double() for part in named.values()]).tolist()  # one transfer for all
        return tuple(zip(named, values, strict=True))


@dataclass(frozen=True)
class GPDLoss:
    """The training objective of Gap Preserving Distillation, with the method's defaults but for `distill_weight`.

        teacher_out, student_out = teacher.both(x)
        losses = GPDLoss()(student_out, teacher_out, target)
        losses.total.backward()

    Attributes:
        task: loss of one network's logits and the target.
        distill_weight: weight of the loss that pulls the student to the DT; the method was published with 3.
        temperature: of that loss.
        smoothing: share of that loss's target that is spread over all classes.
        static_weight: weight of the loss from the static teacher, for both networks.
        static: loss of (logits, static teacher's logits, target); DKD with alpha 1, beta 0.5, T 1 by default.
        select: picks the logits from a model's output.
        student_weight: weight of the student's task loss.
        teacher_weight: weight of the DT's task loss.
    """

    task: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    distill_weight: float = 1.0
    temperature: float = 1.0
    smoothing: float = 0.1
    static_weight: float = 1.0
    static: Callable[[Tensor, Tensor, Tensor], Tensor] = dkd
    select: Callable[[Any], Tensor] = select_logits
    student_weight: float = 1.0
    teacher_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ArgumentError: a weight is negative or not finite, T is not positive, or smoothing lies outside [0, 1).
        """
        for name in ("distill_weight", "static_weight", "student_weight", "teacher_weight"):
            _number(name, getattr(self, name), "0 or more", lambda value: value >= 0)
        _number("temperature", self.temperature, "above 0", lambda value: value > 0)
        _number("smoothing", self.smoothing, "at least 0 and below 1", lambda value: 0 <= value < 1)
        for name in ("task", "static", "select"):
            if not callable(getattr(self, name)):
                raise ArgumentError(f"GPDLoss({name}=...) must be callable, got {getattr(self, name)!r}")

    def __call__(self, student_out: Any, teacher_out: Any, target: Tensor, static_out: Any = None) -> GPDLosses:
        """The losses of one batch.

        Args:
            student_out: the student's output.
            teacher_out: the dynamic teacher's output; the student's loss sends no gradient into it.
            target: class numbers (integers), or probabilities per class (as mixup gives them).
            static_out: the static teacher's output, when there is one; gets no gradient.

        Raises:
            ArgumentError: the outputs' shapes differ, or an output has no tensor that `select` finds.
        """
        student, teacher = self._logits("student", student_out), self._logits("teacher", teacher_out)
        _same_shape("GPDLoss", student, teacher)
        distill = kd(student, teacher, self.temperature, self.smoothing)
        static_student = static_teacher = None
        if static_out is not None:
            static = self._logits("static teacher", static_out).detach()
            static_student = self.static_weight * self.static(student, static, target)
            static_teacher = self.static_weight * self.static(teacher, static, target)
        return GPDLosses(
            task_student=self.student_weight * self.task(student, target),
            task_teacher=self.teacher_weight * self.task(teacher, target),
            distill_student=self.distill_weight * distill,
            static_student=static_student,
            static_teacher=static_teacher,
        )

    def _logits(self, whose: str, output: Any) -> Tensor:
        logits: Any = self.select(output)
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            got = f"a tensor of {_shape(logits)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ArgumentError(f"GPDLoss needs the {whose}'s logits as one (batch, classes, ...) tensor, got {got}")
        return logits


def _full(tensor: Tensor) -> Tensor:
    """Half precision to float32: a softmax's small shares vanish in it."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _decouple(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of (p_y, 1 - p_y) and of the softmax over the classes but y, with 0 in y's own place."""
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index, True)
    others = logits.masked_fill(own, -math.inf)
    mass = torch.logsumexp(others, dim=1, keepdim=True)
    binary = functional.log_softmax(torch.cat([logits.gather(1, index), mass], dim=1), dim=1)
    return binary, functional.log_softmax(others, dim=1).masked_fill(own, 0.0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) along dimension 1."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _same_shape(where: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ArgumentError(
            f"{where}: {_shape(first)} and {_shape(second)} differ; both networks must predict the same "
            "(batch, classes, ...)"
        )


def _number(name: str, value: object, wanted: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not holds(value):
        raise ArgumentError(f"GPDLoss({name}={value!r}) must be a finite number {wanted}")
