"""The demo in small: everything it writes, and what it says."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import TensorDataset

from gpd_fx import expand
from gpd_fx.demo import demo, verdict
from gpd_fx.demo.digits import Digits, load_digits
from gpd_fx.demo.runs import ARMS, RATES, Arm, Run, Setting, best_rate, cost_ratio, new_student, train_all
from gpd_fx.distill import Epoch, Images, Score, fit
from gpd_fx.errors import ArgumentError

FILES = {"student.onnx", "teacher.safetensors", "report.txt", "report.json", "metrics.json", "curves.png"}


@pytest.mark.slow
def test_a_small_demo_writes_everything(tmp_path: Path) -> None:
    for package in ("sklearn", "matplotlib", "onnxruntime", "accelerate", "timm"):
        pytest.importorskip(package)
    screen, out = io.StringIO(), tmp_path / "out"
    threads = torch.get_num_threads()
    metrics = demo(out, seeds=1, epochs=2, console=Console(file=screen, width=200))
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["verdict"] in screen.getvalue()
    assert str(out.resolve()) in screen.getvalue()
    assert torch.get_num_threads() == threads
    alone, teacher, student, folded, runtime = metrics["rows"]
    assert teacher["parameters"] > 3 * alone["parameters"] == 3 * folded["parameters"]
    assert folded["accuracies"] == student["accuracies"] == runtime["accuracies"]
    assert max(row["difference"] for row in (teacher, student, folded, runtime)) < 1e-5
    assert [(run["arm"], run["learning_rate"]) for run in metrics["runs"]] == [
        (arm, rate) for rate in RATES for arm in ("alone", "gpd")
    ]
    for run in metrics["runs"]:
        assert [epoch["epoch"] for epoch in run["history"]] == ([] if run["diverged"] else [1, 2])
        assert run["diverged"] or run["validation"] == run["history"][-1]["metrics"]["student"]


def test_the_split_is_fixed_disjoint_and_stratified() -> None:
    pytest.importorskip("sklearn")
    parts: Any = load_digits(), load_digits()
    for name, size in (("train", 600), ("validation", 600), ("test", 597)):
        (images, labels), (again, _) = (getattr(digits, name)[:] for digits in parts)
        assert torch.equal(images, again)
        assert images.shape == (size, 1, 8, 8)
        assert 0 <= images.min() <= images.max() <= 1
        assert labels.bincount().min() > 0.08 * size


def digits(images: Tensor) -> Digits:
    part = TensorDataset(images, torch.arange(len(images)) % 10)
    return Digits(part, part, part)


def test_every_run_begins_at_the_start_of_its_seed() -> None:
    for package in ("accelerate", "timm"):
        pytest.importorskip(package)
    images = torch.rand(60, 1, 8, 8)
    setting, screen = Setting(1, 2, 2.0, digits(images)), io.StringIO()
    runs = train_all(setting, {5: expand(new_student(5), 2.0, (images,), verify=False)}, Console(file=screen))
    assert [(run.arm, run.seed, run.rate) for run in runs] == [(arm, 5, rate) for rate in RATES for arm in ARMS]
    assert screen.getvalue().count("seed 5, rate ") == len(RATES)
    for run in runs[2:4]:  # at the second rate
        model = new_student(5) if run.arm == "alone" else expand(new_student(5), 2.0, (images,), verify=False)
        parts = Images(setting.digits.train, setting.digits.validation, 10, (1, 8, 8))
        history = fit(model, parts, setting.config(5, RATES[1]))
        assert [epoch.losses for epoch in history] == [epoch.losses for epoch in run.history]
        state = model.state_dict()
        assert state.keys() == run.state.keys()
        assert all(value.equal(state[key]) for key, value in run.state.items())


def test_a_run_that_diverges_is_shown_as_such() -> None:
    for package in ("accelerate", "timm"):
        pytest.importorskip(package)
    images, screen = torch.rand(60, 1, 8, 8), io.StringIO()
    teacher = expand(new_student(0), 2.0, (images,), verify=False)
    images[7, 0, 3, 3] = torch.nan
    runs = train_all(Setting(1, 1, 2.0, digits(images)), {0: teacher}, Console(file=screen, width=200))
    assert "seed 0, rate 0.3: validation diverged alone, diverged with GPD" in screen.getvalue()
    for run in runs:
        assert run.diverged is not None
        assert "epoch 1, update 1: task_student nan" in run.diverged
        assert "the input is not finite" in run.diverged
        assert run.to_dict()["history"] == []
        assert run.validation == 0
    assert best_rate(runs, "gpd") == RATES[0]


def epoch(accuracy: float, seconds: float) -> Epoch:
    scores = {name: Score(accuracy, 1.0, 0.1, 600) for name in ("student", "teacher")}
    return Epoch(1, 10, 0.0, {"total": 1.0}, seconds, scores)


def run(arm: Arm, seed: int, rate: float, accuracy: float | None, seconds: float = 1.0) -> Run:
    state: dict[str, Tensor] = {}
    history = [] if accuracy is None else [epoch(accuracy, seconds)]
    return Run(arm, seed, rate, history, state, "nan" if accuracy is None else None)


def test_the_best_rate_is_one_at_which_every_seed_ends_well() -> None:
    accuracies = [(0.5, 0.6), (0.7, 0.7), (0.6, 0.8), (0.99, None)]
    runs = [run("gpd", n, rate, values[n]) for rate, values in zip(RATES, accuracies, strict=True) for n in (0, 1)]
    assert best_rate(runs, "gpd") == RATES[1]
    assert str(runs[0]) == "50.00% (teacher 50.00%)"
    assert str(runs[-1]) == "diverged"
    assert cost_ratio([*runs, run("alone", 0, 0.1, 0.5, seconds=0.5)]) == 2.0


def test_the_verdict_is_plain() -> None:
    assert verdict([1.0, 0.5, 0.3]).startswith("The student gained from GPD on every seed: mean +0.60 points")
    assert "only on 2 of 3 seeds: mean +0.40 points" in verdict([1.0, 0.5, -0.3])
    assert verdict([-1.0, 0.5]).startswith("The student did not gain from GPD: mean -0.25 points")
    assert verdict([0.0]).startswith("The student did not gain")
    assert verdict([-0.34, 0.34, 0.001]).startswith("The student did not gain from GPD: mean +0.00 points")
    assert "on the one seed" in verdict([0.2])


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ArgumentError, match="is a file"):
        demo(tmp_path / "out")
    with pytest.raises(ArgumentError, match="epochs"):
        demo(tmp_path / "new", epochs=0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("package", ["accelerate", "timm", "matplotlib", "onnxruntime"])
def test_a_missing_package_names_the_extra_before_anything_is_done(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in ("sklearn", "accelerate", "timm", "onnxruntime", "onnxscript"):
        pytest.importorskip(needed)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ArgumentError, match=rf"the demo needs {package}.*pip install 'gpd_fx\[demo\]'"):
        demo(tmp_path / "new", console=Console(file=io.StringIO()))
    assert not (tmp_path / "new").exists()
