"""What a run trains, and one update of it: losses, gradients, and a step of optimizer, schedule and moving average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.data.images import Images, mixing
from gpd_fx.distill.data.seeds import derive, set_all
from gpd_fx.distill.loop.checks import example_images
from gpd_fx.distill.loop.networks import Trainee, freeze_unused, with_reviews
from gpd_fx.distill.loop.nonfinite import find_culprit
from gpd_fx.distill.loop.optimizers import make_optimizer, make_schedule
from gpd_fx.distill.loop.sync_batch_norm import SyncedBatchNorm
from gpd_fx.distill.losses.objective import Objective
from gpd_fx.distill.losses.static_teacher import StaticTeacher
from gpd_fx.errors import TrainingError
from gpd_fx.io.extras import need


class Learner:
    """Everything with a state that training changes, and the update that changes it.

    Args:
        config: a completed configuration.
        model: a dynamic teacher, or a student to train alone.
        images: of which the size and the number of classes count here.
        static: the static teacher.
        accelerator: accelerate's, which knows devices, precision and processes.
        updates: in an epoch.

    Attributes:
        model: the given one, on the device.
        wrapped: what a forward pass of training calls.
        ema: timm's moving average of the model, or None.
        unused: parameters that no output depends on; they stay as they are.
    """

    def __init__(
        self,
        config: DistillConfig,
        model: nn.Module,
        images: Images,
        static: StaticTeacher | None,
        accelerator: Any,
        updates: int,
    ) -> None:
        self.config, self.static, self.accelerator, self.updates = config, static, accelerator, updates
        self.device: torch.device = accelerator.device
        self.model = model.to(self.device)
        self._objective = Objective.of(config)
        self._mix = mixing(config, images.classes)
        self.ema: Any = None
        if config.ema_decay > 0:
            utils = need("timm.utils", "a moving average of weights")
            self.ema = utils.ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup)
        set_all(derive(config.seed, "start"))  # what compares features begins with random weights
        self.trainee, self.unused = self._trainee(images.input_size)
        self._optimizer = make_optimizer(config, self.trainee)
        self._schedule: Any = make_schedule(config, self._optimizer, updates)
        self.wrapped, self.optimizer = accelerator.prepare(self.trainee, self._optimizer)

    def _trainee(self, size: tuple[int, ...]) -> tuple[Trainee, list[str]]:
        """What is trained, and the names of parameters that nothing depends on."""
        example = example_images(self.model, size)
        trainee, features = Trainee(self.model), ()
        if self.static is not None:
            self.static.to(self.device)
            if self.config.features:
                mine, theirs = zip(*self.config.features, strict=True)
                self.static.pick(theirs, example)
                features = self.static.features(example)[1]
                trainee = with_reviews(self.model, mine, example, features)
        return trainee, freeze_unused(trainee, example, features)

    def update(self, images: Tensor, target: Tensor, number: int) -> dict[str, float]:
        """The optimizer's step on one batch; returns the mean losses over all processes.

        Args:
            images: a batch of them.
            target: their class numbers.
            number: of updates done before this one.

        Raises:
            TrainingError: the loss is not finite; names the update and the first layer where that shows.
        """
        images, target = self._prepare(images, target, number)
        parts = self._losses(images, target, number)
        total = sum(parts.values(), torch.zeros((), device=self.device))
        values = self._mean(torch.stack([*(part.detach().float() for part in parts.values()), total.detach().float()]))
        means = dict(zip([*parts, "total"], values, strict=True))
        if not math.isfinite(means["total"]):
            raise TrainingError(self._not_finite(images, means, number))
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        if self.config.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.trainee.parameters(), self.config.clip_grad)
        self.optimizer.step()
        if self._schedule is not None:
            self._schedule.step_update(number + 1)
        if self.ema is not None:
            self.ema.update(self.model, step=number + 1)
        return means

    def _prepare(self, images: Tensor, target: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Move to the device and mix; from here on the update's random numbers are drawn."""
        images = images.to(self.device, non_blocking=True)
        target = target.to(self.device, non_blocking=True)
        if self.config.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        self._seed(number)
        return (images, target) if self._mix is None else self._mix(images, target)

    def _seed(self, number: int) -> None:
        set_all(derive(self.config.seed, "update", number, self.accelerator.process_index))

    def _losses(self, images: Tensor, target: Tensor, number: int) -> dict[str, Tensor]:
        static, features = None, ()
        if self.static is not None:
            with self.accelerator.autocast():
                static, features = self.static.features(images)
        synced = self.config.sync_batch_norm and self.accelerator.num_processes > 1
        with SyncedBatchNorm() if synced else contextlib.nullcontext():
            outputs = self.wrapped(images, features)
        return self._objective(outputs, target, static, number / self.updates)

    def _mean(self, values: Tensor) -> list[float]:
        return self.accelerator.reduce(values, reduction="mean").tolist()

    @property
    def learning_rate(self) -> float:
        """Of the next update; the largest, where groups of parameters differ."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def state(self) -> dict[str, Any]:
        """All that an update changes."""
        scaler = self.accelerator.scaler
        return {
            "trainee": self.trainee.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a state that `state` gave.

        Raises:
            RuntimeError, ValueError: it is of another model.
        """
        self.trainee.load_state_dict(state["trainee"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def check_finite(self, number: int) -> None:
        """Look at all parameters after so many updates.

        Raises:
            TrainingError: one is not finite: such a state is no good to go on from.
        """
        for name, parameter in self.trainee.named_parameters():
            if not parameter.isfinite().all():
                raise TrainingError(f"{name!r} is not finite after update {number}")

    def release(self) -> None:
        """Leave the model trained, and otherwise as it was given."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.trainee.remove_taps()
        for name in self.unused:
            self.trainee.get_parameter(name).requires_grad_(True)

    def _not_finite(self, images: Tensor, parts: dict[str, float], number: int) -> str:
        """Run the update's forward pass again and name the first layer that is not finite."""
        self._seed(number)
        with self.accelerator.autocast():
            culprit = find_culprit(self.model, images)
        if culprit is None and self.static is not None and not self.static(images).isfinite().all():
            culprit = "the static teacher's logits are not finite"
        values = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        return (
            f"the loss is not finite in epoch {number // self.updates + 1}, update {number + 1}: {values}; "
            f"{culprit or 'every layer is finite, so it is a loss itself'}"
        )
