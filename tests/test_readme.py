"""The example in the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import gpd_fx

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
@pytest.mark.zoo
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {"loader": [(torch.randn(2, 3, 224, 224), torch.arange(2))]}
    exec(compile(code, "README.md", "exec"), names)
    student, model = names["student"], names["model"]
    assert isinstance(student, nn.Module)
    assert isinstance(model, nn.Module)
    assert type(student) is type(model)
    model.load_state_dict(student.state_dict(), strict=True)
    assert (tmp_path / "student.onnx").exists()


def test_every_public_name_that_the_readme_uses_exists() -> None:
    text = README.read_text(encoding="utf-8")
    used = set(re.findall(r"gpd_fx\.([A-Za-z_]+)", text)) | set(re.findall(r"^\| `([A-Za-z_]+)\(", text, re.MULTILINE))
    missing = {name for name in used if not hasattr(gpd_fx, name)} - {"teacher"}
    assert not missing
