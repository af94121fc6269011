"""The examples run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import gpd_fx

README = Path(__file__).parents[1] / "README.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.zoo
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = examples()[0]
    names: dict[str, object] = {"loader": [(torch.randn(2, 3, 224, 224), torch.arange(2))]}
    exec(compile(code, "README.md", "exec"), names)
    student, model = names["student"], names["model"]
    assert isinstance(student, nn.Module)
    assert isinstance(model, nn.Module)
    assert type(student) is type(model)
    model.load_state_dict(student.state_dict(), strict=True)
    assert (tmp_path / "student.onnx").exists()


@pytest.mark.zoo
def test_the_trainers_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("accelerate", "timm", "yaml", "onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    small = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    names: dict[str, Any] = {"small": small, "train_set": pairs(32), "test_set": pairs(16)}
    exec(compile(examples()[1], "README.md", "exec"), names)
    results = names["results"]
    assert type(results.student) is nn.Sequential
    assert results.scores["student"].images == 16
    assert (tmp_path / "run" / "student.onnx").exists()


def pairs(count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, 3, 32, 32), torch.arange(count) % 10)


@pytest.mark.slow
@pytest.mark.zoo
def test_the_example_for_hugging_face_runs(tmp_path: Path) -> None:
    for package in ("accelerate", "transformers"):
        pytest.importorskip(package)
    names = runpy.run_path(str(README.parent / "examples" / "huggingface_trainer.py"))
    accuracy = names["main"](str(tmp_path), count=1024, epochs=2)
    assert accuracy > 0.55
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}


def test_every_public_name_that_the_readme_uses_exists() -> None:
    text = README.read_text(encoding="utf-8")
    used = set(re.findall(r"gpd_fx\.([A-Za-z_]+)", text)) | set(re.findall(r"^\| `([A-Za-z_]+)\(", text, re.MULTILINE))
    missing = {name for name in used if not hasattr(gpd_fx, name)} - {"teacher", "distill"}  # a variable, a package
    assert not missing
