"""What is trained, as one module: the student inside its dynamic teacher, or alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gpd_fx.errors import ArgumentError
from gpd_fx.losses import select_logits
from gpd_fx.teacher import DynamicTeacher


class Trainee(nn.Module):
    """Calls everything that has parameters in one forward pass, as data-parallel training needs it.

    Attributes:
        model: a dynamic teacher, or a student that is trained alone.
        review: what compares features with the static teacher's, if anything does.
    """

    def __init__(
        self,
        model: nn.Module,
        review: nn.Module | None = None,
        select: Callable[[Any], Tensor] = select_logits,
    ) -> None:
        super().__init__()
        self.model = model
        self.review = review
        self._select = select

    def forward(self, images: Tensor, static_features: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
        """Logits as "student" and "teacher" (where there is one), and losses of features as "features_..."."""
        if isinstance(self.model, DynamicTeacher):
            teacher_out, student_out = self.model.both(images)
            found = {"student": self._logits("student", student_out), "teacher": self._logits("teacher", teacher_out)}
        else:
            found = {"student": self._logits("student", self.model(images))}
        return found if self.review is None else found | self.review(static_features)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the student's class does not want decayed, by their names here."""
        inside = isinstance(self.model, DynamicTeacher)
        student = self.model.skeleton if inside else self.model
        names: Any = getattr(student, "no_weight_decay", set)()
        return {f"model.composition.weights.{name}" if inside else f"model.{name}" for name in names}

    def _logits(self, whose: str, output: Any) -> Tensor:
        logits = self._select(output)
        if logits.dim() != 2:
            raise ArgumentError(f"the {whose} gives {tuple(logits.shape)}; training on images needs (batch, classes)")
        return logits
