"""The benchmarks of the composition and of a training step, on a small model: every case passes its check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench import compose, measure, step
from bench.__main__ import app
from bench.measure import Case

# torch 2.11 says so while it calls a graph that it exported itself
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def small() -> nn.Module:
    """Strided, grouped and depthwise convs, one with a bias, and 1x1 convs."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


@pytest.mark.parametrize(
    ("command", "cases"),
    [
        (["step", "--batch", "4"], ["plain", "gpd_fx", "einsum", "convs"]),
        (["compose"], [f"{n}, {s}" for s in ("forward", "both") for n in ("einsum", "reference", "grouped")]),
    ],
    ids=["step", "compose"],
)
def test_every_case_is_right(
    command: list[str], cases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"bench.{command[0]}.resolve", lambda name: small())
    out = tmp_path / "results" / "found.json"
    result = CliRunner().invoke(app, [*command, "small", "--resolution", "16", "--rounds", "2", "--out", str(out)])
    assert result.exception is None, result.output
    found: dict[str, Any] = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == cases
    for row in found["rows"]:
        assert row["correct"]
        assert len(row["seconds"]) == len(row["ratios"]) == 2
    assert found["machine"]["torch"] == torch.__version__
    assert "WRONG" not in result.output


def test_an_unknown_case_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.step.resolve", lambda name: small())
    result = CliRunner().invoke(app, ["step", "small", "--resolution", "16", "--cases", "plain,fast"])
    assert result.exit_code == 2
    assert "there is no case 'fast'" in result.output


def test_a_wrong_case_shows_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [Case("right", lambda: None, lambda: 0.0, 1e-6), Case("fast", lambda: None, lambda: 0.1, 1e-6)]
    rows = measure.measure(cases, 2, torch.device("cpu"))
    assert [len(row.seconds) for row in rows] == [2, 0]
    assert "median" not in rows[1].to_dict()
    measure.show("table", rows)
    line = next(line for line in capsys.readouterr().out.splitlines() if "fast" in line)
    assert "WRONG" in line
    assert rows[1].ratios == []


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The check is red when the composition is off by one part in a hundred."""

    def wrong(layers: Any) -> tuple[list[Tensor], list[Tensor]]:
        wide, narrow = step.compose_by_einsum(layers)
        return [t * 1.01 if t.dim() == 4 and t.shape[2] == 3 else t for t in wide], narrow

    monkeypatch.setattr("bench.compose.resolve", lambda name: small())
    monkeypatch.setitem(compose.CASES, "einsum", wrong)
    out = tmp_path / "found.json"
    CliRunner().invoke(app, ["compose", "small", "--resolution", "16", "--rounds", "1", "--out", str(out)])
    rows = {row["name"]: row["correct"] for row in json.loads(out.read_text())["rows"]}
    assert not rows["einsum, both"]
    assert rows["grouped, both"]
