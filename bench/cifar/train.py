"""One run: a student of one arm, one learning rate and one seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import gpd_fx
from bench.cifar.arms import Arm
from bench.cifar.data import Images, batches, prepare
from bench.cifar.model import ResNet
from bench.cifar.schedule import Schedule, decay_groups
from gpd_fx.api.expansion import make_teacher
from gpd_fx.io.models import load_weights
from gpd_fx.losses import dkd, kd
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.teacher.study import make_draft, study_model

TEMPERATURE = 4.0  # of KD from a static teacher, as is usual for it
STATIC_BLOCKS = 2  # in each stage of the static teacher, which is twice as wide as the student
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """What all runs of one comparison have in common."""

    width: int = 8
    blocks: int = 1
    epochs: int = 8
    batch: int = 128
    half: bool = True  # bf16 autocast
    folder: Path = Path("cifar")

    def student(self) -> ResNet:
        """A student with random weights."""
        return ResNet(self.width, self.blocks)

    def static(self) -> ResNet:
        """The static teacher, before it was trained."""
        return ResNet(2 * self.width, STATIC_BLOCKS)


@dataclass
class Run:
    """What came of a run: the accuracies after each epoch, and the cost."""

    student: list[float]
    teacher: list[float]
    seconds: float
    folded: float


def train(arm: Arm, rate: float, seed: int, setting: Setting, images: Images, tests: Images) -> tuple[Run, nn.Module]:
    """Train one student; all that is random follows from the seed.

    Raises:
        FloatingPointError: the loss is not finite any more.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = setting.student()
    if arm.start == "trained":
        load_weights(student, trained(setting, seed))
    static = None
    if arm.static is not None:
        static = setting.static().eval()
        load_weights(static, setting.folder / "static.safetensors")
    model, forward = _networks(arm, student, seed)
    model.train().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch's stub lacks it
    schedule = Schedule(setting.epochs, rate, weight_decay=5e-4, warmup=0.15)
    optimizer = torch.optim.SGD(decay_groups(model, schedule.weight_decay), rate, schedule.momentum, nesterov=True)
    steps = setting.epochs * (len(images) // setting.batch)
    scheduler = LambdaLR(optimizer, lambda step: schedule.factor(step, steps))
    objective = _objective(arm)
    history: list[dict[str, float]] = []
    seconds = 0.0
    for _ in range(setting.epochs):
        model.train()
        started = time.process_time()
        for x, labels in batches(images, setting.batch, generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.half):
                with torch.no_grad():
                    wanted = None if static is None else static(x)
                loss = objective(forward(x), labels, wanted)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
        seconds += time.process_time() - started
        history.append(accuracy(model, forward, tests, setting.half))
    plain = gpd_fx.fold(model) if isinstance(model, DynamicTeacher) else student
    folded = accuracy(plain, lambda x: {"student": plain(x)}, tests, setting.half)["student"]
    teacher = [h["teacher"] for h in history if "teacher" in h]
    return Run([h["student"] for h in history], teacher, seconds, folded), plain


def trained(setting: Setting, seed: int) -> Path:
    """Where the student lies that was trained alone with this seed."""
    return setting.folder / f"alone-{seed}.safetensors"


def _networks(arm: Arm, student: nn.Module, seed: int) -> tuple[nn.Module, Callable[[Tensor], dict[str, Tensor]]]:
    """What is trained, and its forward pass: the logits of each network."""
    if arm.ratio is None:
        return student, lambda x: {"student": student(x)}
    study = study_model(student, (torch.randn(2, 3, 32, 32),))
    teacher = make_teacher(make_draft(study, arm.ratio, seed=seed, equal_alpha=arm.equal), arm.branches, verify=False)
    gpd_fx.verify(student, teacher, (torch.randn(2, 3, 32, 32),))
    if arm.shared:
        return teacher, lambda x: dict(zip(("teacher", "student"), teacher.both(x), strict=True))
    beside = nn.ModuleDict({"teacher": teacher, "student": student})
    return beside, lambda x: {name: network(x) for name, network in beside.items()}


def _objective(arm: Arm) -> Callable[[dict[str, Tensor], Tensor, Tensor | None], Tensor]:
    """The loss of all logits, the labels, and the static teacher's logits."""

    def static(logits: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        return dkd(logits, wanted, labels) if arm.static == "dkd" else kd(logits, wanted, TEMPERATURE)

    criterion = gpd_fx.GPDLoss(static=static, **arm.loss)

    def loss(logits: dict[str, Tensor], labels: Tensor, wanted: Tensor | None) -> Tensor:
        if "teacher" in logits:
            return criterion(logits["student"], logits["teacher"], labels, wanted).total
        task = functional.cross_entropy(logits["student"].float(), labels)
        return task if wanted is None else task + static(logits["student"], wanted, labels)

    return loss


@torch.no_grad()
def accuracy(
    model: nn.Module, forward: Callable[[Tensor], dict[str, Tensor]], images: Images, half: bool
) -> dict[str, float]:
    """The share of images that each network gets right, in eval mode, in percent."""
    model.eval()
    right: dict[str, int] = {}
    starts: Iterable[int] = range(0, len(images), 500)
    for start in starts:
        part = images.part(slice(start, start + 500))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits: dict[str, Any] = forward(prepare(part.pixels))
        for name, values in logits.items():
            right[name] = right.get(name, 0) + int((values.argmax(1) == part.labels).sum())
    return {name: 100 * count / len(images) for name, count in right.items()}
