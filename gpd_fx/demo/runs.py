"""The demo's training: both arms, every learning rate, every seed, by the trainer of `gpd_fx.distill`."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from gpd_fx.demo.digits import (
    TRAIN,
    VALIDATION,
    DigitNet,
    Digits,
)
from gpd_fx.distill import DistillConfig, Epoch, Images, fit
from gpd_fx.errors import TrainingError
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher

BATCH: Final = 60
UPDATES: Final = TRAIN // BATCH  # in an epoch
RATES: Final = (0.1, 0.3, 0.6, 1.0)

Arm = Literal["alone", "gpd"]
ARMS: Final[tuple[Arm, ...]] = ("alone", "gpd")


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    seeds: int
    epochs: int
    ratio: float
    digits: Digits

    def config(self, seed: int, rate: float) -> DistillConfig:
        """The trainer's configuration of one run, of either arm."""
        return DistillConfig(
            epochs=self.epochs,
            batch_size=BATCH,
            test_batch_size=VALIDATION,
            optimizer="sgd",  # with Nesterov's momentum
            learning_rate=rate,
            schedule="cosine",
            warmup_epochs=round(self.epochs / 10),
            ema_decay=0.0,
            device="cpu",
            workers=0,
            seed=seed,
        )


@dataclass(frozen=True)
class Run:
    """One training of one arm, and the state that it ended in; one that diverged has no state and accuracy 0."""

    arm: Arm
    seed: int
    rate: float
    history: list[Epoch]
    state: dict[str, Tensor]
    diverged: str | None = None

    @property
    def validation(self) -> float:
        """The student's accuracy on the validation images at the end."""
        return self.history[-1].scores["student"].top1 if self.history else 0.0

    def __str__(self) -> str:
        if self.diverged is not None:
            return "diverged"
        scores = self.history[-1].scores
        return f"{self.validation:.2%}" + (f" (teacher {scores['teacher'].top1:.2%})" if self.arm == "gpd" else "")

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds of it."""
        return {
            "arm": self.arm,
            "seed": self.seed,
            "learning_rate": self.rate,
            "validation": self.validation,
            "diverged": self.diverged,
            "history": [
                {
                    "epoch": epoch.epoch,
                    "learning_rate": epoch.learning_rate,
                    "seconds": epoch.seconds,
                    "losses": epoch.losses,
                    "metrics": {name: score.top1 for name, score in epoch.scores.items()},
                }
                for epoch in self.history
            ],
        }


def new_student(seed: int) -> DigitNet:
    """The student that both arms of a seed begin with."""
    torch.manual_seed(seed)
    return DigitNet()


def train_all(setting: Setting, teachers: Mapping[int, DynamicTeacher], console: Console) -> list[Run]:
    """Every run of the grid; the teachers, by seed, are left at the end of their last one."""
    starts = {seed: copy.deepcopy(teacher.state_dict()) for seed, teacher in teachers.items()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs: list[Run] = []
    with Progress(*columns, console=console, transient=True) as progress:
        everything = progress.add_task("all runs", total=len(ARMS) * len(RATES) * setting.seeds)
        for seed, teacher in teachers.items():
            for rate in RATES:
                teacher.load_state_dict(starts[seed])
                alone = _train(setting, "alone", new_student(seed), seed, rate, progress)
                progress.advance(everything)
                gpd = _train(setting, "gpd", teacher, seed, rate, progress)
                progress.advance(everything)
                progress.console.print(f"seed {seed}, rate {rate:g}: validation {alone} alone, {gpd} with GPD")
                runs += [alone, gpd]
    return runs


def _train(setting: Setting, arm: Arm, model: nn.Module, seed: int, rate: float, progress: Progress) -> Run:
    images = Images(setting.digits.train, setting.digits.validation, 10, (1, 8, 8))
    title = f"seed {seed}, rate {rate:g}, {'student alone' if arm == 'alone' else 'with GPD'}"
    try:
        history = fit(model, images, setting.config(seed, rate), progress=progress, title=title)
    except TrainingError as error:
        return Run(arm, seed, rate, [], {}, str(error))
    return Run(arm, seed, rate, history, copy.deepcopy(model.state_dict()))


def best_rate(runs: Sequence[Run], arm: Arm) -> float:
    """The rate of the highest mean validation accuracy; the lower one where two are equal.

    A rate at which a seed diverged is no better than none.
    """
    means: dict[float, float] = {}
    for rate in RATES:
        tried = [run for run in runs if (run.arm, run.rate) == (arm, rate)]
        means[rate] = statistics.fmean(run.validation for run in tried) if all(run.history for run in tried) else 0.0
    return max(RATES, key=lambda rate: (means[rate], -rate))


def cost_ratio(runs: Sequence[Run]) -> float:
    """How many times as long a step of both networks takes as one of the student alone."""
    seconds = {arm: [epoch.seconds for run in runs if run.arm == arm for epoch in run.history] for arm in ARMS}
    return statistics.fmean(seconds["gpd"]) / statistics.fmean(seconds["alone"]) if all(seconds.values()) else math.nan
