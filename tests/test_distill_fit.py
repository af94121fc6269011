"""Training in place, without a folder: the same bits as a run with one, and no traces."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from gpd_fx import DynamicTeacher, expand, fold
from gpd_fx.distill import DistillConfig, Images, distill, fit
from gpd_fx.distill.show.metrics import read_metrics
from gpd_fx.errors import ArgumentError, TrainingError
from tests.distill_data import CLASSES, Net, config, images, tensors

pytest.importorskip("accelerate")
pytest.importorskip("timm")


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def teacher(**options: Any) -> DynamicTeacher:
    student = net(**options)
    return expand(student, 2.0, (torch.randn(2, 3, 6, 6, dtype=student.stem.weight.dtype),), verify=False)


class Listed(Dataset[Any]):
    """The same items one by one, and the numbers of those that were taken."""

    def __init__(self, whole: Dataset[Any]) -> None:
        self.whole: Any = whole
        self.taken: list[int] = []

    def __getitem__(self, number: int) -> Any:
        self.taken.append(number)
        return self.whole[number]

    def __len__(self) -> int:
        return len(self.whole)


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert value.equal(states[1][key]), key


@pytest.mark.parametrize("alone", [False, True])
def test_it_ends_with_the_bits_of_a_run_with_checkpoints_and_writes_nothing(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    setup = config(
        alone=alone,
        checkpoint_every=1,
        mixup=0.3,
        features=[["stem", "stem"]],
        optimizer="adamw",
        learning_rate=0.02,
        clip_grad=1.0,
    )
    silent = Console(file=io.StringIO())
    results = distill(
        setup, tmp_path / "run", student=net(), images=images(), static=net(width=5, dropout=0.0), console=silent
    )
    model = net() if alone else teacher()
    torch.rand(7)  # what was drawn before does not count
    history = fit(model, images(), setup, static=net(width=5, dropout=0.0))
    assert_equal(fold(model) if isinstance(model, DynamicTeacher) else model, results.student)
    assert not torch.equal(results.student.get_parameter("head.weight"), net().head.weight)
    lines = [line for line in read_metrics(tmp_path / "run") if "epoch" in line]
    for epoch, line in zip(history, lines, strict=True):
        mine = json.loads(json.dumps(epoch.to_dict()))
        assert mine.pop("seconds") > 0
        del line["seconds"]
        assert mine == line
    assert list((tmp_path / "empty").iterdir()) == []


def test_both_arms_see_the_same_batches_and_the_kind_of_data_set_changes_nothing() -> None:
    setup, whole = config(epochs=3), images()
    seen: list[list[int]] = []
    for kind in (net, teacher):
        listed = Listed(whole.train)
        one, other = kind(), kind()
        fit(one, Images(listed, whole.test, CLASSES, whole.input_size), setup)
        fit(other, whole, setup)
        assert_equal(one, other)
        seen.append(listed.taken)
    assert seen[0] == seen[1]
    assert [sorted(seen[0][48 * epoch : 48 * epoch + 48]) for epoch in range(3)] == 3 * [list(range(48))]
    assert seen[0][:48] != seen[0][48:96]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_learns_in_place(dtype: torch.dtype) -> None:
    whole = Images(tensors(48, 0, dtype), tensors(30, 1, dtype), CLASSES, (3, 6, 6))
    student, both = net(width=6, dropout=0.0), teacher(width=6, dropout=0.0)
    setup = config(epochs=8, evaluate_every=3)
    state = torch.get_rng_state()
    for model in (student.to(dtype), both.to(dtype)):
        history = fit(model, whole, setup)
        assert [epoch.epoch for epoch in history] == list(range(1, 9))
        assert [epoch.epoch for epoch in history if epoch.scores] == [3, 6, 8]
        assert history[-1].update == 24
        assert history[-1].losses["task_student"] < 0.8 * history[0].losses["task_student"]
        assert history[-1].scores["student"].top1 > 0.6 > 1.5 / CLASSES
        assert not any(layer.training for layer in model.modules())
        assert all(p.dtype == dtype for p in model.parameters() if p.is_floating_point())
        found: Any = whole.test[:]
        logits = model(found[0]) if model is student else both.student(found[0])
        assert (logits.argmax(1) == found[1]).double().mean() == history[-1].scores["student"].top1
    assert torch.get_rng_state().equal(state)


def test_signals_are_left_alone_and_evaluation_has_a_batch_size_of_its_own() -> None:
    sizes: list[tuple[bool, int]] = []

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            assert signal.getsignal(signal.SIGTERM) is before
            sizes.append((self.training, len(x)))
            return super().forward(x)

    before = signal.getsignal(signal.SIGTERM)
    fit(Watched(), images(), config(epochs=1, test_batch_size=25, ema_decay=0.0))
    assert sizes[-5:] == [(True, 16), (True, 16), (True, 16), (False, 25), (False, 5)]


class Idle(Net):
    """Has a layer that it does not call, and one that is not to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Conv2d(4, 4, 3)
        self.stem.requires_grad_(False)


def test_what_is_trained_stays_what_it_was() -> None:
    model = Idle()
    first = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = [len(vars(layer)["_forward_hooks"]) for layer in model.modules()]
    fit(model, images(), config(epochs=1, features=[["body", "body"]]), static=net(width=5))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert [len(vars(layer)["_forward_hooks"]) for layer in model.modules()] == hooks
    kept = {key for key, value in model.state_dict().items() if value.equal(first[key])}
    assert kept == {"idle.weight", "idle.bias", "stem.weight", "stem.bias"}


@pytest.mark.parametrize(
    ("kind", "culprit"),
    [
        (net, "the first layer that is not finite in the student is 'body' (Conv2d)"),
        (teacher, "the first that is not finite in the dynamic teacher is "),
    ],
)
def test_a_loss_that_is_not_finite_names_update_and_layer(kind: Callable[..., nn.Module], culprit: str) -> None:
    model = kind(norm=False)
    with (
        Progress(console=Console(file=io.StringIO())) as progress,
        pytest.raises(TrainingError, match=r"epoch 1, update 2: .*; lower learning_rate") as caught,
    ):
        fit(model, images(), config(learning_rate=1e20), progress=progress)
    assert culprit in str(caught.value)
    assert "checkpoint" not in str(caught.value)
    assert progress.tasks == []
    assert not model.training


def test_the_last_update_must_leave_finite_parameters() -> None:
    with pytest.raises(TrainingError, match=r"'model\..*' is not finite after update 1; lower learning_rate"):
        fit(net(norm=False), images(16), config(epochs=1, learning_rate=1e38, weight_decay=1e5, ema_decay=0.0))


def test_progress_is_shown_and_taken_away() -> None:
    screen = io.StringIO()
    with Progress(console=Console(file=screen, force_terminal=True, width=100)) as progress:
        fit(net(), images(), config(), progress=progress, title="a run of mine")
        assert progress.tasks == []
    assert "a run of mine" in screen.getvalue()


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (Net(), {"batch_size": 49}, "batch_size 49 is more than the 48 training images"),
        (Net(), {"optimizer": "sgdd"}, "optimizer 'sgdd'"),
        (Net(), {"features": [["stem", "stem"]]}, "name one"),
        (nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), {}, "'Sequential' gives [4] values an image, the data have 3"),
        (nn.Linear(5, 3), {}, "does not take images of [3, 6, 6]"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(model: nn.Module, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        fit(model, images(), config(**values))
    assert message in str(caught.value)


def test_a_configuration_needs_no_names() -> None:
    assert DistillConfig(epochs=1).complete().student == ""
    pairs = TensorDataset(torch.randn(8, 3, 6, 6), torch.arange(8) % 3)
    history = fit(net(), Images(pairs, pairs, 3, (3, 6, 6)), DistillConfig(epochs=1, batch_size=8, device="cpu"))
    assert history[0].scores.keys() == {"student", "student_ema"}
