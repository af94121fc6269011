"""One run: what is trained, the loop over updates, and the state that it can be taken up from.

An update is a function of the state and of its number: the order of images, augmentation, mixup and dropout are drawn
from the seed and the position. So the state between two updates, written to a file, is all that a run needs to go on
as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gpd_fx.checkpoint import plan_digest
from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.data import Images, Order, held_out_batches, mixing, training_batches
from gpd_fx.distill.evaluation import Score, score
from gpd_fx.distill.metrics import Recorder
from gpd_fx.distill.nans import find_culprit
from gpd_fx.distill.objective import Objective
from gpd_fx.distill.randomness import derive, set_all
from gpd_fx.distill.setup import make_optimizer, make_schedule
from gpd_fx.distill.state import checkpoint_path, checkpoints, prune, read_state, write_state
from gpd_fx.distill.static import StaticTeacher
from gpd_fx.distill.syncbn import SyncedBatchNorm
from gpd_fx.distill.trainee import Trainee, freeze_unused, with_reviews
from gpd_fx.errors import ArgumentError, CheckpointError, TrainingError
from gpd_fx.extras import need
from gpd_fx.teacher import DynamicTeacher


@dataclass
class Position:
    """Where a run is.

    Attributes:
        epoch: the current one, from 0.
        done: its updates that are done.
        update: all updates that are done.
        sums: of the losses of this epoch's updates, by name.
    """

    epoch: int = 0
    done: int = 0
    update: int = 0
    sums: dict[str, float] = field(default_factory=dict[str, float])


class Engine:
    """Trains a model on images by a completed configuration.

    Args:
        config: a completed configuration.
        model: a dynamic teacher, or a student to train alone.
        images: what to train and to evaluate on.
        static: the static teacher.
        folder: of the run; its checkpoints lie in `checkpoints` in it.
        accelerator: accelerate's, which knows devices, precision and processes.
        console: where progress is shown.

    Attributes:
        unused: parameters that no output depends on; they stay as they are.
    """

    def __init__(
        self,
        config: DistillConfig,
        model: nn.Module,
        images: Images,
        static: StaticTeacher | None,
        folder: Path,
        accelerator: Any,
        console: Console,
    ) -> None:
        self.config, self.images, self.static = config, images, static
        self.folder, self.accelerator, self.console = folder, accelerator, console
        self.position = Position()
        self.device: torch.device = accelerator.device
        self.world: int = accelerator.num_processes
        self.updates = len(cast("Any", images.train)) // config.batch_size  # in an epoch
        self.epochs = config.epochs or 0
        self._check()
        self.model = model.to(self.device)
        self.objective = Objective.of(config)
        self.mix = mixing(config, images.classes)
        self.ema: Any = None
        if config.ema_decay > 0:
            utils = need("timm.utils", "a moving average of weights")
            self.ema = utils.ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup)
        self.trainee, self.unused = self._trainee()
        self._optimizer = make_optimizer(config, self.trainee)
        self._schedule: Any = make_schedule(config, self._optimizer, self.updates)
        self.wrapped, self.optimizer = accelerator.prepare(self.trainee, self._optimizer)
        self._stop = False

    def _trainee(self) -> tuple[Trainee, list[str]]:
        """What is trained, and the names of parameters that nothing depends on."""
        example = torch.randn(2, *self.images.input_size, device=self.device)
        example = example.to(next((p.dtype for p in self.model.parameters() if p.is_floating_point()), example.dtype))
        trainee, features = Trainee(self.model), ()
        if self.static is not None:
            self.static.to(self.device)
            if self.config.features:
                mine, theirs = zip(*self.config.features, strict=True)
                self.static.pick(theirs, example)
                features = self.static.features(example)[1]
                trainee = with_reviews(self.model, mine, example, features)
        return trainee, freeze_unused(trainee, example, features)

    def _check(self) -> None:
        config, count = self.config, len(cast("Any", self.images.train))
        if config.batch_size % self.world:
            raise ArgumentError(f"batch_size {config.batch_size} must be a multiple of the {self.world} processes")
        if self.updates == 0:
            raise ArgumentError(f"batch_size {config.batch_size} is more than the {count} training images")
        if len(cast("Any", self.images.test)) < self.world:
            raise ArgumentError(f"there are fewer test images than processes ({self.world})")
        if (config.mixup or config.cutmix) and config.batch_size // self.world % 2:
            raise ArgumentError(f"mixup and cutmix pair images up: {config.batch_size // self.world} a process is odd")

    # ---- the loop

    def run(self, recorder: Recorder | None) -> None:
        """Train to the end, from wherever the position is; the main process has a recorder.

        Raises:
            TrainingError: a loss is not finite, or the run was asked to stop (SIGTERM); the message says how to go on.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.accelerator.is_main_process,
        )
        with self._terminated(), progress:
            bar = progress.add_task("updates", total=self.epochs * self.updates, completed=self.position.update)
            while self.position.epoch < self.epochs:
                self._epoch(recorder, lambda: progress.update(bar, completed=self.position.update))

    def _epoch(self, recorder: Recorder | None, advance: Callable[[], None]) -> None:
        at, config = self.position, self.config
        self.wrapped.train()
        self.model.train()
        started = time.perf_counter()
        for images, target in self.training_batches(at.epoch, at.done):
            parts = self.update(images, target)
            at.done, at.update = at.done + 1, at.update + 1
            for name, value in parts.items():
                at.sums[name] = at.sums.get(name, 0.0) + value
            advance()
            if self._asked_to_stop():
                path = self.save()
                raise TrainingError(f"stopped by a signal after update {at.update}; {path} holds the run: --resume")
            if recorder is not None and config.log_every and at.update % config.log_every == 0:
                recorder.write({"update": at.update, "learning_rate": self.learning_rate, "losses": parts})
            if config.checkpoint_every and at.update % config.checkpoint_every == 0 and at.done < self.updates:
                self.save()
        line: dict[str, Any] = {
            "update": at.update,
            "epoch": at.epoch + 1,
            "learning_rate": self.learning_rate,
            "losses": {name: value / self.updates for name, value in at.sums.items()},
            "seconds": round(time.perf_counter() - started, 3),
        }
        at.epoch, at.done, at.sums = at.epoch + 1, 0, {}
        if at.epoch % config.evaluate_every == 0 or at.epoch == self.epochs:
            scores = self.evaluate()
            line["accuracy"] = {name: each.top1 for name, each in scores.items()}
            line["test_loss"] = {name: each.loss for name, each in scores.items()}
            if "teacher" in scores:
                line["gap"] = scores["teacher"].top1 - scores["student"].top1
        if recorder is not None:
            recorder.write(line)
            self.console.print(_summary(line, self.epochs), highlight=False)
        self.save()

    def training_batches(self, epoch: int, done: int) -> DataLoader[Any]:
        """This process's part of an epoch's batches, those that are done left out."""
        rank: int = self.accelerator.process_index
        count = len(cast("Any", self.images.train))
        order = Order(count, self.config.batch_size, self.config.seed, rank, self.world, epoch, done)
        return training_batches(self.images.train, order, self.config.workers, self.device.type == "cuda")

    def update(self, images: Tensor, target: Tensor) -> dict[str, float]:
        """One optimizer step on one batch; returns the mean losses over all processes."""
        images, target = self._prepare(images, target)
        parts = self._losses(images, target)
        total = sum(parts.values(), torch.zeros((), device=self.device))
        values = self._mean(torch.stack([*(part.detach().float() for part in parts.values()), total.detach().float()]))
        means = dict(zip([*parts, "total"], values, strict=True))
        if not math.isfinite(means["total"]):
            raise TrainingError(self._not_finite(images, means))
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        if self.config.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.trainee.parameters(), self.config.clip_grad)
        self.optimizer.step()
        if self._schedule is not None:
            self._schedule.step_update(self.position.update + 1)
        if self.ema is not None:
            self.ema.update(self.model, step=self.position.update + 1)
        return means

    def _prepare(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Move to the device and mix; from here on the update's random numbers are drawn."""
        images = images.to(self.device, non_blocking=True)
        target = target.to(self.device, non_blocking=True)
        if self.config.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        self._seed_update()
        return (images, target) if self.mix is None else self.mix(images, target)

    def _seed_update(self) -> None:
        set_all(derive(self.config.seed, "update", self.position.update, self.accelerator.process_index))

    def _losses(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        static, features = None, ()
        if self.static is not None:
            with self.accelerator.autocast():
                static, features = self.static.features(images)
        with self._norms():
            outputs = self.wrapped(images, features)
        return self.objective(outputs, target, static, self.position.update / self.updates)

    def _norms(self) -> contextlib.AbstractContextManager[Any]:
        synced = self.config.sync_batch_norm and self.world > 1
        return SyncedBatchNorm() if synced else contextlib.nullcontext()

    def _mean(self, values: Tensor) -> list[float]:
        return self.accelerator.reduce(values, reduction="mean").tolist()

    @property
    def learning_rate(self) -> float:
        """Of the next update; the largest, where groups of parameters differ."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    # ---- evaluation

    def evaluate(self) -> dict[str, Score]:
        """Scores of the student and the dynamic teacher, and of their moving averages."""
        scores = self.score(self.model)
        if self.ema is not None:
            scores |= {f"{name}_ema": each for name, each in self.score(self.ema.module).items()}
        return scores

    def score(self, model: nn.Module) -> dict[str, Score]:
        """Scores of a student, or of a dynamic teacher and its student, in eval mode."""
        training = model.training
        model.eval()
        try:
            return self.score_call(Trainee(model))
        finally:
            model.train(training)

    def score_call(self, call: Callable[[Tensor], Any]) -> dict[str, Score]:
        """Scores of whatever gives logits by name."""
        part = self.config.batch_size // self.world
        workers, pin = self.config.workers, self.device.type == "cuda"
        batches = held_out_batches(self.images.test, part, self.accelerator.process_index, self.world, workers, pin)
        with self.accelerator.autocast():
            return score(call, batches, self.device, lambda sums: self.accelerator.reduce(sums, reduction="sum"))

    # ---- state

    def save(self) -> Path:
        """Write the state to a file, whole or not at all, and remove old ones.

        Raises:
            TrainingError: a parameter is not finite: such a state is no good to go on from.
        """
        path = checkpoint_path(self.folder / "checkpoints", self.position.update)
        for name, parameter in self.trainee.named_parameters():
            if not parameter.isfinite().all():
                raise TrainingError(f"{name!r} is not finite after update {self.position.update}; {self._advice()}")
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            tree: dict[str, Any] = {
                "config": self.config.to_dict(),
                "plan": _plan(self.model),
                "position": asdict(self.position),
                "trainee": self.trainee.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self._schedule is None else self._schedule.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            write_state(path, tree)
            prune(self.folder / "checkpoints", self.config.keep)
        self.accelerator.wait_for_everyone()
        return path

    def resume(self) -> None:
        """Go to the newest checkpoint; without one the run begins at its beginning.

        Raises:
            CheckpointError: the checkpoint is of another model or another run.
        """
        found = checkpoints(self.folder / "checkpoints")
        if not found:
            return
        state = read_state(found[-1])
        changed = sorted(
            name
            for name, value in state["config"].items()
            if name not in _FREE and self.config.to_dict().get(name, value) != value
        )
        if changed:
            raise CheckpointError(
                f"{str(found[-1])!r} was written with other values of {', '.join(changed)}; put them back, or begin a "
                "new run"
            )
        if state["plan"] != _plan(self.model):
            raise CheckpointError(f"{str(found[-1])!r}: this model widens in another way here; use the same versions")
        try:
            self.trainee.load_state_dict(state["trainee"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{str(found[-1])!r} does not fit this model: {error}") from error
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])

    # ---- what goes wrong

    def _not_finite(self, images: Tensor, parts: dict[str, float]) -> str:
        """Run the update's forward pass again and name the first layer that is not finite."""
        at = self.position
        self._seed_update()
        with self.accelerator.autocast():
            culprit = find_culprit(self.model, images)
        if culprit is None and self.static is not None and not self.static(images).isfinite().all():
            culprit = "the static teacher's logits are not finite"
        values = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        return (
            f"the loss is not finite in epoch {at.epoch + 1}, update {at.update + 1}: {values}; "
            f"{culprit or 'every layer is finite, so it is a loss itself'}; {self._advice()}"
        )

    def _advice(self) -> str:
        found = checkpoints(self.folder / "checkpoints")
        kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return f"{kept}; lower learning_rate ({self.learning_rate:.4g} now), lengthen warmup_epochs or set clip_grad"

    def _asked_to_stop(self) -> bool:
        if self.world == 1:
            return self._stop
        asked = torch.tensor([float(self._stop)], device=self.device)
        return bool(self.accelerator.reduce(asked, reduction="sum").item())

    @contextlib.contextmanager
    def _terminated(self) -> Generator[None]:
        """Meanwhile SIGTERM, which schedulers of clusters send, ends the run after the current update."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: Any) -> None:
            self._stop = True

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


# What may be changed when a run is taken up again, since no result depends on it.
_FREE = {
    "data", "download", "workers", "keep", "checkpoint_every", "evaluate_every", "log_every", "onnx", "recalibrate",
    "device", "static_compile", "student_weights", "static_weights",
}  # fmt: skip


def _plan(model: nn.Module) -> str | None:
    return plan_digest(model.composition.plans) if isinstance(model, DynamicTeacher) else None


def _summary(line: dict[str, Any], epochs: int) -> str:
    accuracy = ", ".join(f"{name} {100 * value:.2f}" for name, value in line.get("accuracy", {}).items())
    return (
        f"epoch {line['epoch']}/{epochs}: loss {line['losses']['total']:.4f}, learning rate "
        f"{line['learning_rate']:.2e}, {line['seconds']:.0f} s{f'; accuracy % {accuracy}' if accuracy else ''}"
    )
