"""The demo in small: everything it writes, and what it says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gpd_fx.demo import demo, verdict
from gpd_fx.digits import load_digits
from gpd_fx.errors import ArgumentError

FILES = {"student.onnx", "teacher.safetensors", "report.txt", "report.json", "metrics.json", "curves.png"}


@pytest.mark.slow
def test_a_small_demo_writes_everything(tmp_path: Path) -> None:
    for package in ("sklearn", "matplotlib", "onnxruntime"):
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


def test_the_split_is_fixed_disjoint_and_stratified() -> None:
    pytest.importorskip("sklearn")
    parts: Any = load_digits(), load_digits()
    for name, size in (("train", 600), ("validation", 600), ("test", 597)):
        (images, labels), (again, _) = (getattr(digits, name)[:] for digits in parts)
        assert torch.equal(images, again)
        assert images.shape == (size, 1, 8, 8)
        assert 0 <= images.min() <= images.max() <= 1
        assert labels.bincount().min() > 0.08 * size


def test_the_verdict_is_plain() -> None:
    assert verdict([1.0, 0.5, 0.3]).startswith("The student gained from GPD on every seed: mean +0.60 points")
    assert "only on 2 of 3 seeds: mean +0.40 points" in verdict([1.0, 0.5, -0.3])
    assert verdict([-1.0, 0.5]).startswith("The student did not gain from GPD: mean -0.25 points")
    assert verdict([0.0]).startswith("The student did not gain")
    assert "on the one seed" in verdict([0.2])


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ArgumentError, match="is a file"):
        demo(tmp_path / "out")
    with pytest.raises(ArgumentError, match="epochs"):
        demo(tmp_path / "new", epochs=0)
    assert not (tmp_path / "new").exists()
