"""The trainer from end to end: what a run learns, writes, and refuses."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from gpd_fx import (
    GPDLoss,
    expand,
    fold,
    load,
)
from gpd_fx.distill import DistillConfig, Results, distill
from gpd_fx.distill.config import load_config
from gpd_fx.distill.loop.evaluation import recalibrate, score
from gpd_fx.distill.losses.objective import Objective
from gpd_fx.distill.show.metrics import Recorder, read_metrics
from gpd_fx.distill.state.snapshot import checkpoints, read_state
from gpd_fx.errors import ArgumentError, CheckpointError, TrainingError
from gpd_fx.io.models import load_weights, save_weights
from gpd_fx.losses import dkd, kd
from tests.distill_data import CLASSES, Net, config, images, tensors, write_images
from tests.forked import needs_fork, start

pytest.importorskip("accelerate")
pytest.importorskip("timm")


def quiet() -> Console:
    return Console(file=io.StringIO())


def run(folder: Path, setup: DistillConfig | None = None, **options: Any) -> Results:
    given: dict[str, Any] = {"student": net(), "images": images(), "console": quiet(), **options}
    return distill(config() if setup is None else setup, folder, **given)


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def test_a_run_learns_and_writes_everything(tmp_path: Path) -> None:
    setup = config(epochs=6, log_every=4, onnx=True, recalibrate=2)
    results = run(tmp_path / "run", setup, student=net(width=6, dropout=0.0), static=net(width=5))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= {
        "config.yaml", "metrics.jsonl", "report.txt", "results.json", "curves.svg", "curves.png", "checkpoints",
        "student.safetensors", "student_ema.safetensors", "teacher.safetensors", "student.onnx",
    }  # fmt: skip
    assert list(results.scores) == [
        "student", "teacher", "student_ema", "teacher_ema", "student, batch norm recalibrated", "static teacher",
        "student in ONNX Runtime",
    ]  # fmt: skip
    assert results.scores["student"].top1 > 0.6 > 1.5 / CLASSES
    assert results.scores["student in ONNX Runtime"].top1 == results.scores["student, batch norm recalibrated"].top1
    assert results.parameters["teacher"] > results.parameters["student"] == results.parameters["student_ema"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(json.dumps(results.to_dict()))
    again = Net(width=6)
    load_weights(again, tmp_path / "run" / "student.safetensors")
    x = torch.randn(4, 3, 6, 6)
    assert again.eval()(x).equal(results.student(x))
    wide = load(tmp_path / "run" / "teacher.safetensors", Net(width=6, dropout=0.0)).eval()
    before = Net(width=6)
    load_weights(before, tmp_path / "run" / "student_before_recalibration.safetensors")
    torch.testing.assert_close(fold(wide)(x), before.eval()(x))
    lines = read_metrics(tmp_path / "run")
    assert [line["update"] for line in lines if "epoch" not in line] == [4, 8, 12, 16]
    epochs = [line for line in lines if "epoch" in line]
    assert [line["update"] for line in epochs] == [3, 6, 9, 12, 15, 18]
    assert epochs[-1]["losses"]["task_student"] < 0.8 * epochs[0]["losses"]["task_student"]
    assert set(epochs[0]["losses"]) == {
        "task_student", "task_teacher", "distill_student", "static_student", "static_teacher", "total",
    }  # fmt: skip
    assert epochs[0]["gap"] == epochs[0]["accuracy"]["teacher"] - epochs[0]["accuracy"]["student"]


def test_an_update_is_one_of_the_plain_loop(tmp_path: Path) -> None:
    """The README's loop, with the optimizer's arithmetic written out, ends at the same weights."""
    static = net(width=5).eval()
    setup = config(epochs=1, ema_decay=0.0, learning_rate=0.05, weight_decay=0.01, clip_grad=1e9)
    student = net(dropout=0.0)
    results = run(tmp_path / "run", setup, student=student, static=static)
    teacher = expand(student, 2.0, (torch.randn(2, 3, 6, 6),)).train()
    data = tensors(48)
    velocity = {name: torch.zeros_like(p) for name, p in teacher.named_parameters()}
    from gpd_fx.distill.data.seeds import permutation

    order = permutation(0, 0, 48)
    for update in range(3):
        batch = [data[number] for number in order[16 * update : 16 * update + 16]]
        x, y = torch.stack([image for image, _ in batch]), torch.stack([label for _, label in batch])
        teacher.zero_grad()
        teacher_out, student_out = teacher.both(x)
        with torch.no_grad():
            static_out = static(x)
        GPDLoss()(student_out, teacher_out, y, static_out).total.backward()
        with torch.no_grad():
            rate = 0.05 * 0.1 ** sum(update + 1 >= 3 * share for share in (0.3, 0.6, 0.9))
            for name, parameter in teacher.named_parameters():
                assert parameter.grad is not None
                decay = 0.01 if parameter.dim() > 1 and not name.endswith(".bias") else 0.0
                velocity[name] = 0.9 * velocity[name] + parameter.grad + decay * parameter
                parameter -= rate * velocity[name]
    wanted = fold(teacher).eval().state_dict()
    for key, value in results.student.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-7)


def test_the_moving_average_is_its_formula(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    setup = config(epochs=1, ema_decay=0.5, checkpoint_every=1, keep=9)
    run(tmp_path / "run", setup)
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        seen.append(read_state(path)["trainee"])
    ema = read_state(checkpoints(tmp_path / "run" / "checkpoints")[-1])["ema"]
    assert len(seen) == 3
    for key, value in ema.items():
        first, second, third = (state[f"model.{key}"] for state in seen)
        wanted = 0.25 * first + 0.25 * second + 0.5 * third if value.is_floating_point() else third
        torch.testing.assert_close(value, wanted)


def test_alone_is_plain_training_with_or_without_static_teacher(tmp_path: Path) -> None:
    results = run(
        tmp_path / "a", config(alone=True, static_loss="kd", static_options={"temperature": 2.0}), static=net()
    )
    lines = read_metrics(tmp_path / "a")
    assert set(lines[-1]["losses"]) == {"task_student", "static_student", "total"}
    assert list(results.scores) == ["student", "student_ema", "static teacher"]
    assert type(results.student) is Net
    assert not (tmp_path / "a" / "teacher.safetensors").exists()


def test_losses_with_schedules() -> None:
    setup = config(
        weights={"distill": {0: 0.0, 2: 4.0}, "task_teacher": 0.5, "static": 2.0},
        static_loss="kd",
        static_options={"temperature": 3.0},
        label_smoothing=0.2,
    ).complete()
    torch.manual_seed(0)
    s, t, u = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    y = torch.tensor([0, 3, 1, 2, 2])
    parts = Objective.of(setup)({"student": s, "teacher": t, "features_student": s.mean()}, y, u, epoch=0.5)
    wanted = {
        "task_student": functional.cross_entropy(s, y, label_smoothing=0.2),
        "task_teacher": 0.5 * functional.cross_entropy(t, y, label_smoothing=0.2),
        "distill_student": kd(s, t, 1.0, 0.1),
        "static_student": 2 * kd(s, u, 3.0),
        "static_teacher": 2 * kd(t, u, 3.0),
        "features_student": s.mean(),
    }
    assert parts.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(parts[name], value)
    alone = Objective.of(config(static_options={"beta": 2.0}).complete())({"student": s}, y, u, epoch=0.0)
    torch.testing.assert_close(alone["static_student"], dkd(s, u, y, beta=2.0))
    with pytest.raises(ArgumentError, match="kd takes temperature, smoothing"):
        Objective.of(config(static_loss="kd", static_options={"beta": 1.0}).complete())


def test_fine_tuning_begins_with_the_given_weights_and_folders_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL")
    save_weights(net(), tmp_path / "start.safetensors")
    data = write_images(tmp_path / "data")
    setup = DistillConfig(
        "tests.distill_data:Net",
        data=str(data),
        student_weights=str(tmp_path / "start.safetensors"),
        epochs=1,
        learning_rate=1e-12,
        batch_size=8,
        input_size=[3, 8, 8],
        workers=0,
        onnx=False,
        device="cpu",
        mixup=0.2,
        cutmix=0.2,
        transforms={"auto_augment": "rand-m3", "re_prob": 0.2},
    )
    results = distill(setup, tmp_path / "run", console=quiet())
    for key, value in net().named_parameters():
        torch.testing.assert_close(results.student.get_parameter(key), value, rtol=0, atol=1e-8)
    assert results.scores["student"].images == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 49}, "batch_size 49 is more than the 48 training images"),
        ({"optimizer": "sgdd"}, "optimizer 'sgdd'"),
        ({"optimizer_options": {"speed": 1}}, "optimizer 'momentum' with {'speed': 1}"),
        ({"schedule": "plateau"}, "cannot be taken up exactly"),
        ({"schedule": "sine"}, "schedule 'sine'"),
        ({"schedule_options": {"speed": 1}}, "schedule 'multistep'"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError) as caught:
        run(tmp_path / "run", config(alone=True, **change))
    assert message in str(caught.value)


def test_data_and_models_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    spec = "tests.distill_data:Net"
    base: dict[str, Any] = {"student": spec, "input_size": [3, 8, 8], "alone": True}

    def refused(message: str, **values: Any) -> None:
        with pytest.raises(ArgumentError) as caught:
            distill(config(**{**base, **values}), tmp_path / f"run{len(list(tmp_path.iterdir()))}", console=quiet())
        assert message in str(caught.value)

    refused("no data is named")
    refused("with train/ and one of val", data=str(tmp_path))
    data = str(write_images(tmp_path / "data", 12, 6))
    refused("transforms has 'flip', which timm's create_transform does not take", data=data, transforms={"flip": 1})
    refused("timm cannot read its part 'train'", data=data, dataset="torch/nothing")
    refused(
        "gpd_fx.demo.digits:DigitNet,num_classes=3",
        data=data,
        student="gpd_fx.demo.digits:DigitNet",
        input_size=[1, 8, 8],
    )
    refused("does not take images of [1, 8, 8]", data=data, input_size=[1, 8, 8])
    refused("would have random weights", data=data, static_teacher="torchvision:resnet18")
    refused("cannot be read by ONNX Runtime", data=data, static_teacher=str(tmp_path / "missing.onnx"))
    refused("the data have 3 classes; it must have been trained", data=data, static_teacher="torch.nn:Flatten")
    (tmp_path / "data" / "train" / "class9").mkdir()
    (tmp_path / "data" / "train" / "class9" / "0.png").write_bytes(
        (tmp_path / "data" / "train" / "class0" / "0.png").read_bytes()
    )
    refused("other classes: ['class9']", data=data)


def test_a_static_teacher_answers_in_eval_mode_without_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpd_fx.distill.losses.static_teacher import StaticTeacher, load_static

    module = net(dropout=0.9).train()
    static = StaticTeacher(module)
    x = torch.randn(4, 3, 6, 6)
    assert static(x).equal(static(x))
    assert not static(x).requires_grad
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert int(module.norm.num_batches_tracked) == 0  # type: ignore[union-attr]
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    assert StaticTeacher(module, compiled=True)(x).equal(static(x))
    assert compiled == [module]
    pytest.importorskip("onnxruntime")
    from gpd_fx import export_onnx

    export_onnx(module, tmp_path / "static.onnx", (x,))
    onnx = load_static(config(static_teacher=str(tmp_path / "static.onnx")))
    assert onnx is not None
    torch.testing.assert_close(onnx(x), static(x), rtol=1e-4, atol=1e-5)


class Large(nn.Module):
    """The logarithm of its weight, which a large step makes negative."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.log().view(1, -1, 1, 1)


def bad_images(number: int) -> Any:
    data = images(60)
    inputs: Tensor = data.train.tensors[0]  # type: ignore[attr-defined]
    inputs[number, 0, 2, 3] = math.nan
    return data


def test_a_loss_that_is_not_finite_names_update_and_culprit(tmp_path: Path) -> None:
    from gpd_fx.distill.data.seeds import permutation

    setup = config(checkpoint_every=1)
    second = permutation(0, 1, 60)
    bad = next(number for number in permutation(0, 0, 60)[48:] if number in second[16:32])
    with pytest.raises(TrainingError) as caught:
        run(tmp_path / "a", setup, images=bad_images(bad))
    message = str(caught.value)
    assert "epoch 2, update 5" in message
    assert f"the input is not finite (images [{second[16:32].index(bad)}] of the batch)" in message
    assert "update-000000004.safetensors" in message
    (last,) = checkpoints(tmp_path / "a" / "checkpoints")[-1:]
    assert all(tensor.isfinite().all() for tensor in read_state(last)["trainee"].values())

    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Large(), nn.BatchNorm2d(4), *head)
    for alone, culprit in (
        (True, "in the student is '1' (Large)"),
        (False, "dynamic teacher is aten.log.default of layer '1'"),
    ):
        with pytest.raises(TrainingError) as caught:
            run(tmp_path / f"b{alone}", config(alone=alone, learning_rate=1e3), student=model)
        assert culprit in str(caught.value)
        assert "update 2" in str(caught.value)
        assert "there is no checkpoint yet" in str(caught.value)


class Watched(Net):
    """Notes the dtypes that it computes in."""

    seen: ClassVar[set[tuple[bool, torch.dtype]]] = set()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen.add((self.training, y.dtype))
        return y


def train_in_bfloat16(folder: Path) -> None:
    torch.manual_seed(0)
    setup = config(precision="bf16", epochs=4, channels_last=True)
    results = run(folder, setup, student=Watched(width=6, dropout=0.0))
    assert results.scores["student"].top1 > 0.5
    assert {dtype for training, dtype in Watched.seen if training} >= {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in results.student.parameters())
    assert results.student(torch.randn(2, 3, 6, 6)).dtype == torch.float32


@needs_fork
def test_bfloat16_learns_with_parameters_in_full(tmp_path: Path) -> None:
    process = start(tmp_path / "log", train_in_bfloat16, tmp_path / "run")  # accelerate keeps one precision a process
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()


def test_tensorboard_gets_every_number_and_a_resumed_run_replaces_what_was_lost(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for kept, updates, loss in ((0, (1, 2, 3, 4), 2.0), (2, (3,), 5.0)):  # killed after 4, taken up after 2
        with Recorder(tmp_path, kept) as recorder:
            for update in updates:
                recorder.write({"update": update, "learning_rate": 0.5, "losses": {"total": loss * update}})
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"learning_rate", "losses/total"}
    assert [(e.step, e.value) for e in board.Scalars("losses/total")] == [(1, 2.0), (2, 4.0), (3, 15.0)]


def test_a_run_is_not_overwritten_and_a_missing_one_not_taken_up(tmp_path: Path) -> None:
    run(tmp_path / "run", config(alone=True, epochs=1))
    with pytest.raises(ArgumentError, match="holds a run already"):
        run(tmp_path / "run", config(alone=True, epochs=1))
    with pytest.raises(ArgumentError, match=r"no config\.yaml"):
        run(tmp_path / "other", resume=True)
    with pytest.raises(CheckpointError, match="other values of batch_size, seed"):
        run(tmp_path / "run", config(alone=True, epochs=1, seed=1, batch_size=8), resume=True)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        run(tmp_path / "run", config(alone=True, epochs=1), student=net(width=7), resume=True)
    assert load_config(tmp_path / "run" / "config.yaml").seed == 0  # what was refused has changed nothing


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="batch_size 64 is more than the 48 training images"):
        run(tmp_path / "new" / "run", config(alone=True, epochs=1, batch_size=64))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ArgumentError, match="batch_size 64"):
        run(tmp_path / "mine", config(alone=True, epochs=1, batch_size=64))
    assert list((tmp_path / "mine").iterdir()) == []


def test_metrics_after_the_checkpoint_go(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    for update in (1, 2, 3):
        recorder.write({"update": update, "losses": {"total": 1.0}})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "lo')
    Recorder(tmp_path, 2)
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2]


def test_scores_are_counted() -> None:
    logits = torch.eye(7).repeat(2, 1)
    target = torch.cat([torch.arange(7), (torch.arange(7) + 1) % 7])
    found = score(lambda x: {"it": x}, [(logits[:5], target[:5]), (logits[5:], target[5:])], torch.device("cpu"))["it"]
    assert (found.top1, found.images) == (0.5, 14)
    assert found.loss == pytest.approx(functional.cross_entropy(logits, target).item())
    ties = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]]).repeat(7, 1)
    assert score(lambda x: {"it": x}, [(ties, torch.arange(7))], torch.device("cpu"))["it"].top5 == 5 / 7


def test_recalibration_takes_plain_means() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01), nn.Dropout(0.9)).double().train()
    batches = [torch.randn(8, 3, 6, 6, dtype=torch.float64) * k for k in (1, 2, 5)]
    assert recalibrate(model, batches) == 3
    with torch.no_grad():
        maps = [model[0](batch) for batch in batches]
    means = torch.stack([each.mean((0, 2, 3)) for each in maps]).mean(0)
    variances = torch.stack([each.var((0, 2, 3)) for each in maps]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)
    torch.testing.assert_close(model[1].running_var, variances)
    assert model[1].momentum == 0.01
    assert all(layer.training for layer in model.modules())
