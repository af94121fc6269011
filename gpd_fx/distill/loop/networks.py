"""What is trained, as one module: the student inside its dynamic teacher, or alone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpd_fx.distill.losses.feature_taps import StudentTaps, TeacherTaps
from gpd_fx.distill.losses.review import Review, as_map
from gpd_fx.errors import ArgumentError
from gpd_fx.losses import select_logits
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher


class Trainee(nn.Module):
    """Calls everything that has parameters in one forward pass, as data-parallel training needs it.

    Attributes:
        model: a dynamic teacher, or a student that is trained alone.
        reviews: what compares the networks' features with the static teacher's, by network; empty without features.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: TeacherTaps | StudentTaps | None = None,
        reviews: Mapping[str, Review] | None = None,
        select: Callable[[Any], Tensor] = select_logits,
    ) -> None:
        super().__init__()
        self.model = model
        self.reviews = nn.ModuleDict(reviews)
        self._taps = taps
        self._select = select

    def forward(self, images: Tensor, static_features: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
        """Logits as "student" and "teacher" (where there is one), and losses of features as "features_..."."""
        if self._taps is None or not static_features:
            return self._outputs(images)
        with self._taps.watching() as (narrow, wide):
            found = self._outputs(images)
        features = {"student": narrow, "teacher": wide}
        losses = {f"features_{name}": review(features[name], static_features) for name, review in self.reviews.items()}
        return found | losses

    def _outputs(self, images: Tensor) -> dict[str, Tensor]:
        if isinstance(self.model, DynamicTeacher):
            teacher_out, student_out = self.model.both(images)
            return {"student": self._logits("student", student_out), "teacher": self._logits("teacher", teacher_out)}
        return {"student": self._logits("student", self.model(images))}

    def remove_taps(self) -> None:
        """Leave the model as it was."""
        if self._taps is not None:
            self._taps.remove()
            self._taps = None

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


@contextmanager
def _restored(module: nn.Module) -> Generator[None]:
    """Afterwards all tensors, of which a call in train mode changes the statistics of batch norm, are as they were."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        yield
    finally:
        module.load_state_dict(state)


def freeze_unused(trainee: Trainee, images: Tensor, features: tuple[Tensor, ...]) -> list[str]:
    """Stop gradients of parameters that no output depends on, which data-parallel training would wait for.

    An optimizer leaves them as they are either way. Returns their names.
    """
    with _restored(trainee):
        outputs = trainee.train()(images, features)
        named = {name: parameter for name, parameter in trainee.named_parameters() if parameter.requires_grad}
        total = torch.stack([output.float().sum() for output in outputs.values()]).sum()
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    gradients = cast("tuple[Tensor | None, ...]", found)
    unused = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
    for name in unused:
        named[name].requires_grad_(False)
    return unused


def with_reviews(model: nn.Module, names: Sequence[str], images: Tensor, targets: Sequence[Tensor]) -> Trainee:
    """A trainee whose features of these names are compared with `targets`, the static teacher's of the same images.

    Raises:
        ArgumentError: a name means nothing in the model, or its features are no maps, tokens or vectors.
    """
    taps = TeacherTaps(model, names) if isinstance(model, DynamicTeacher) else StudentTaps(model, names)
    with _restored(model), torch.no_grad(), taps.watching() as found:  # in train mode, since the taps are in that graph
        call = model.train().both if isinstance(model, DynamicTeacher) else model.train()
        call(images)
    wanted = [as_map(target).shape[1] for target in targets]
    channels = {
        name: [as_map(each).shape[1] for each in f] for name, f in zip(("student", "teacher"), found, strict=True)
    }
    reviews = {name: Review(sizes, wanted) for name, sizes in channels.items() if sizes}
    return Trainee(model, taps, {name: review.to(images.device) for name, review in reviews.items()})
