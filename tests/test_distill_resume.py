"""A run that is killed and taken up ends with the same bits as one that never stopped."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gpd_fx.distill import DistillConfig, distill
from gpd_fx.distill.show.metrics import read_metrics
from gpd_fx.distill.state.snapshot import checkpoints, read_state
from gpd_fx.errors import TrainingError
from tests.distill_data import Net, config, images, write_images
from tests.forked import needs_fork, start

pytest.importorskip("accelerate")
pytest.importorskip("timm")


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, item in tree.items() for k, v in leaves(item, f"{path}/{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for number, item in enumerate(tree) for k, v in leaves(item, f"{path}/{number}").items()}
    return {path: tree}


def assert_same_run(first: Path, second: Path) -> None:
    """All of the last state, and all metrics but the times."""
    states = [leaves(read_state(checkpoints(folder / "checkpoints")[-1])) for folder in (first, second)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        if isinstance(value, Tensor):
            assert value.equal(states[1][key]), key
        elif "/config/" not in key:
            assert value == states[1][key], key
    metrics = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(f)] for f in (first, second)]
    assert metrics[0] == metrics[1]
    assert (first / "student.safetensors").read_bytes() == (second / "student.safetensors").read_bytes()


def everything(data: Path, **values: Any) -> DistillConfig:
    """A run with all that draws random numbers or has a state."""
    given: dict[str, Any] = {
        "student": "tests.distill_data:Net",
        "data": str(data),
        "input_size": [3, 8, 8],
        "epochs": 3,
        "batch_size": 4,
        "transforms": {"auto_augment": "rand-m5", "re_prob": 0.5},
        "mixup": 0.4,
        "cutmix": 0.4,
        "optimizer": "adamw",
        "schedule": "cosine",
        "schedule_options": {"noise": [0.2, 0.8]},
        "warmup_epochs": 1,
        "ema_decay": 0.9,
        "weights": {"distill": {0: 1.0, 2: 3.0}},
        "checkpoint_every": 1,
        "log_every": 2,
        "workers": 0,
        "device": "cpu",
        "onnx": False,
        **values,
    }
    return DistillConfig(**given)


def train(setup: DistillConfig, folder: Path) -> None:
    resume = (folder / "config.yaml").exists()
    distill(setup, folder, resume=resume, console=Console(file=io.StringIO()))


def wait_for(event: Callable[[], bool], process: BaseProcess) -> None:
    """Until something happens, or the process ends."""
    while process.is_alive() and not event():
        time.sleep(0.0005)


@needs_fork
def test_killed_at_random_moments_and_taken_up_it_ends_the_same(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    setup = everything(write_images(tmp_path / "data", 16, 6), epochs=2)
    log, folder = tmp_path / "log.txt", tmp_path / "killed" / "checkpoints"
    whole = start(log, train, setup, tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0, log.read_text()
    moments = random.Random(os.urandom(8))

    def writing() -> bool:
        return any(name.startswith(".update-") for name in os.listdir(folder))

    for kill in range(4):
        before = checkpoints(folder)[-1:]
        process = start(log, train, setup, tmp_path / "killed")
        wait_for(folder.exists, process)
        if kill:  # the first time before there is any state
            wait_for(lambda before=before: checkpoints(folder)[-1:] != before, process)
        if kill % 2:
            wait_for(writing, process)
        time.sleep(moments.uniform(0.0, 0.03))
        assert process.is_alive(), log.read_text()
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    last = start(log, train, setup, tmp_path / "killed")
    last.join()
    assert last.exitcode == 0, log.read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list(folder.glob(".update-*"))


def test_the_number_of_loading_processes_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    data = write_images(tmp_path / "data", 12, 6)
    for workers in (0, 2):
        train(everything(data, workers=workers, epochs=1), tmp_path / str(workers))
    assert_same_run(tmp_path / "0", tmp_path / "2")


@pytest.mark.parametrize("optimizer", ["momentum", "lamb"])
def test_stopped_by_a_signal_it_goes_on(tmp_path: Path, optimizer: str) -> None:
    class Counting(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += self.training
            if self.training and Counting.calls == 6:  # the first is a probe
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x)

    setup = config(alone=True, optimizer=optimizer, clip_grad=1.0)
    torch.manual_seed(0)
    student: nn.Module = Counting()
    options: dict[str, Any] = {"student": student, "images": images(), "console": Console(file=io.StringIO())}
    with pytest.raises(TrainingError, match=r"stopped by a signal after update 5.*update-000000005"):
        distill(setup, tmp_path / "stopped", **options)
    distill(setup, tmp_path / "stopped", resume=True, **options)
    Counting.calls = 100
    distill(setup, tmp_path / "whole", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
