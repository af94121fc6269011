"""What a run takes from other packages, by its configuration: devices and precision, optimizer, schedule."""

from __future__ import annotations

from typing import Any

import torch

from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.loop.networks import Trainee
from gpd_fx.errors import ArgumentError
from gpd_fx.io.extras import need


def make_accelerator(config: DistillConfig) -> Any:
    """accelerate's view of devices, precision and processes.

    Raises:
        ArgumentError: accelerate is missing, or the device cannot compute in the wanted precision.
    """
    accelerate = need("accelerate", "training")
    try:
        return accelerate.Accelerator(
            mixed_precision=config.precision,
            cpu=config.device == "cpu",
            kwargs_handlers=[accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise ArgumentError(f"precision {config.precision!r} on device {config.device!r}: {error}") from error


def make_optimizer(config: DistillConfig, trainee: Trainee) -> torch.optim.Optimizer:
    """timm's, over all that is trained.

    Raises:
        ArgumentError: the name or an option cannot be used.
    """
    optim = need("timm.optim", "training")
    options: dict[str, Any] = dict(config.optimizer_options)
    try:
        return optim.create_optimizer_v2(
            trainee,
            opt=config.optimizer,
            lr=config.learning_rate,
            weight_decay=config.weight_decay or 0.0,
            momentum=config.momentum,
            **options,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"optimizer {config.optimizer!r} with {options}: {error}") from error


def make_schedule(config: DistillConfig, optimizer: torch.optim.Optimizer, updates: int) -> Any:
    """timm's, in updates, of which an epoch has so many; None where the name stands for none.

    Raises:
        ArgumentError: the name or an option cannot be used.
    """
    if config.schedule == "plateau":
        raise ArgumentError("schedule 'plateau' cannot be taken up exactly; use cosine, multistep, step, poly or tanh")
    schedulers = need("timm.scheduler", "training")
    steps = [round((config.epochs or 0) * share, 3) for share in (0.3, 0.6, 0.9)]
    defaults = {"decay_milestones": steps, "decay_rate": 0.1} if config.schedule == "multistep" else {}
    options: dict[str, Any] = {"warmup_epochs": config.warmup_epochs, **defaults, **config.schedule_options}
    try:
        schedule, _ = schedulers.create_scheduler_v2(
            optimizer,
            sched=config.schedule,
            num_epochs=config.epochs,
            step_on_epochs=False,
            updates_per_epoch=updates,
            **options,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ArgumentError(f"schedule {config.schedule!r} with {options}: {error}") from error
    if schedule is not None:
        schedule.step_update(0)
    return schedule
