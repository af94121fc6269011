"""One run: the loop over updates, evaluation, and the state that a run can be taken up from.

An update is a function of the state and of its number: the order of images, augmentation, mixup and dropout are drawn
from the seed and the position. So the state between two updates, written to a file, is all that a run needs to go on
as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.data.images import Images, Order, held_out_batches, training_batches
from gpd_fx.distill.loop.evaluation import Score, score
from gpd_fx.distill.loop.networks import Trainee
from gpd_fx.distill.loop.update import Learner
from gpd_fx.distill.losses.static_teacher import StaticTeacher
from gpd_fx.distill.show.callbacks import Epoch, Watcher
from gpd_fx.distill.state.checkpoints import Store
from gpd_fx.errors import ArgumentError, CheckpointError, TrainingError


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
        accelerator: accelerate's, which knows devices, precision and processes.
        store: where checkpoints go; without one nothing is written.
    """

    def __init__(
        self,
        config: DistillConfig,
        model: nn.Module,
        images: Images,
        static: StaticTeacher | None,
        accelerator: Any,
        store: Store | None = None,
    ) -> None:
        self.config, self.images, self.static = config, images, static
        self.accelerator, self.store = accelerator, store
        self.position = Position()
        self.device: torch.device = accelerator.device
        self.world: int = accelerator.num_processes
        self.updates = len(cast("Any", images.train)) // config.batch_size  # in an epoch
        self.epochs = config.epochs or 0
        self._check()
        self.learner = Learner(config, model, images, static, accelerator, self.updates)
        self._stop = False

    def _check(self) -> None:
        config, count = self.config, len(cast("Any", self.images.train))
        for name in ("batch_size", "test_batch_size"):
            if (getattr(config, name) or 0) % self.world:
                value = getattr(config, name)
                raise ArgumentError(f"{name} {value} must be a multiple of the {self.world} processes")
        if self.updates == 0:
            raise ArgumentError(f"batch_size {config.batch_size} is more than the {count} training images")
        if len(cast("Any", self.images.test)) < self.world:
            raise ArgumentError(f"there are fewer test images than processes ({self.world})")
        if (config.mixup or config.cutmix) and config.batch_size // self.world % 2:
            raise ArgumentError(f"mixup and cutmix pair images up: {config.batch_size // self.world} a process is odd")

    # ---- the loop

    def run(self, watcher: Watcher) -> list[Epoch]:
        """Train to the end, from wherever the position is; returns the epochs that this took.

        Raises:
            TrainingError: a loss is not finite, or the run was asked to stop (SIGTERM); the message says how to go on.
        """
        history: list[Epoch] = []
        with contextlib.nullcontext() if self.store is None else self._terminated():
            while self.position.epoch < self.epochs:
                history.append(self._epoch(watcher))
                watcher.ended(history[-1])
                self.save()
        return history

    def _epoch(self, watcher: Watcher) -> Epoch:
        at, every = self.position, self.config.checkpoint_every
        self.learner.wrapped.train()
        self.learner.model.train()
        started = time.perf_counter()
        for images, target in self.training_batches(at.epoch, at.done):
            losses = self.update(images, target)
            at.done, at.update = at.done + 1, at.update + 1
            for name, value in losses.items():
                at.sums[name] = at.sums.get(name, 0.0) + value
            watcher.updated(at.update, self.learner.learning_rate, losses)
            if self.store is not None and self._asked_to_stop():
                self.save()
                path = self.store.path(at.update)
                raise TrainingError(f"stopped by a signal after update {at.update}; {path} holds the run: --resume")
            if every and at.update % every == 0 and at.done < self.updates:
                self.save()
        seconds = time.perf_counter() - started
        losses = {name: value / self.updates for name, value in at.sums.items()}
        at.epoch, at.done, at.sums = at.epoch + 1, 0, {}
        evaluated = at.epoch % self.config.evaluate_every == 0 or at.epoch == self.epochs
        scores = self.evaluate() if evaluated else {}
        return Epoch(at.epoch, at.update, self.learner.learning_rate, losses, seconds, scores)

    def training_batches(self, epoch: int, done: int) -> DataLoader[Any]:
        """This process's part of an epoch's batches, those that are done left out."""
        rank: int = self.accelerator.process_index
        count = len(cast("Any", self.images.train))
        order = Order(count, self.config.batch_size, self.config.seed, rank, self.world, epoch, done)
        return training_batches(self.images.train, order, self.config.workers, self.device.type == "cuda")

    def update(self, images: Tensor, target: Tensor) -> dict[str, float]:
        """The update at this position, on its batch; returns the losses by name."""
        with self._advised():
            return self.learner.update(images, target, self.position.update)

    # ---- evaluation

    def evaluate(self) -> dict[str, Score]:
        """Scores of the student and the dynamic teacher, and of their moving averages."""
        scores = self.score(self.learner.model)
        if self.learner.ema is not None:
            scores |= {f"{name}_ema": each for name, each in self.score(self.learner.ema.module).items()}
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
        part = (self.config.test_batch_size or self.config.batch_size) // self.world
        workers, pin = self.config.workers, self.device.type == "cuda"
        batches = held_out_batches(self.images.test, part, self.accelerator.process_index, self.world, workers, pin)
        with self.accelerator.autocast():
            return score(call, batches, self.device, lambda sums: self.accelerator.reduce(sums, reduction="sum"))

    # ---- state

    def save(self) -> None:
        """Write the state to the store, whole or not at all; without a store only look whether it is sound.

        Raises:
            TrainingError: a parameter is not finite: such a state is no good to go on from.
        """
        update = self.position.update
        with self._advised():
            self.learner.check_finite(update)
        if self.store is None:
            return
        if self.accelerator.is_main_process:
            self.store.write(update, {"position": asdict(self.position), **self.learner.state()})
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go to the newest checkpoint; without one the run begins at its beginning.

        Raises:
            CheckpointError: the checkpoint is of another model or another run.
        """
        path = None if self.store is None else self.store.newest
        if self.store is None or path is None:
            return
        state = self.store.read(path)
        try:
            self.learner.load_state(state)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{str(path)!r} does not fit this model: {error}") from error
        self.position = Position(**state["position"])

    # ---- what goes wrong

    @contextlib.contextmanager
    def _advised(self) -> Generator[None]:
        """Adds to an error of training what was kept, and what to do."""
        try:
            yield
        except TrainingError as error:
            kept = ""
            if self.store is not None:
                newest = self.store.newest
                kept = "; there is no checkpoint yet" if newest is None else f"; the last good checkpoint is {newest}"
            rate = (
                f"lower learning_rate ({self.learner.learning_rate:.4g} now), lengthen warmup_epochs or set clip_grad"
            )
            raise TrainingError(f"{error}{kept}; {rate}") from None

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
