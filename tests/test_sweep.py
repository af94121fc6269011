"""The sweep's own machinery: workers that survive their models, records, the page and the plot made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench.zoo.__main__ import app, read
from bench.zoo.check import Record, check, check_shapes
from bench.zoo.models import GROUPS, entry_of
from bench.zoo.page import markdown, row
from bench.zoo.plot import REWRITE, draw, exponent, in_words, points
from bench.zoo.worker import Worker


def record(name: str, **fields: Any) -> dict[str, Any]:
    """A record of a model that was found exact, but for the given fields."""
    made = Record(name, parameters=1000, coverage=1.0, factor=3.5, capture_seconds=2.0, nodes=100)
    made.eval_error, made.train_error = {"2.0": 1e-15, "3.0": 2e-15, "1.5": 1e-15}, {"2.0": 1e-14}
    made.analysis_seconds, made.rewrite_seconds = 0.1, 0.1
    for field, value in fields.items():
        assert hasattr(made, field)
        setattr(made, field, value)
    return made.to_dict()


class Net(nn.Module):
    """Small, with what a check looks at: statistics, dropout, channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class Stateful(Net):
    """Computes something else in the wide network: what no capture can see."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if torch.compiler.is_compiling() else 1.01)


def images() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(2, 3, 7, 9, dtype=torch.float64),), {}


def test_a_sound_model_has_a_sound_record() -> None:
    found = check("net", Net, images())
    assert found.exact
    assert set(found.eval_error) == set(found.train_error) == {"2.0", "3.0", "1.5"}
    assert 0 < max(found.train_error.values()) < 1e-12
    assert found.fold_error == 0.0
    assert found.onnx_error is not None
    assert found.onnx_error < 1e-5
    assert found.ops["aten.conv2d.default"] == 2  # one in either graph
    assert found.coverage > 0.9
    assert found.capture_seconds > 0
    assert found.rewrite_seconds > 0


def test_a_model_that_is_not_what_was_captured_is_not_exact() -> None:
    found = check("stateful", Stateful, images(), ratios=[2.0], step=False, onnx=False)
    assert not found.exact
    assert found.eval_error["2.0"] == pytest.approx(0.01, rel=0.02)


def test_a_model_on_the_meta_device_is_checked_by_shape() -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return Net()

    found = check_shapes("net", build, images())
    assert found.exact
    assert not found.eval_error
    assert found.coverage > 0.9
    assert "meta" in found.note


def test_workers_survive_their_models() -> None:
    with Worker(["--no-step", "--no-onnx", "--ratio=2"], timeout=300, threads=1) as worker:
        bad = worker.check("torchvision:no_such_model")
        assert not bad["exact"]
        assert "no_such_model" in bad["error"]
        process = worker._process  # pyright: ignore[reportPrivateUsage]  to kill it as the system would
        assert process is not None
        process.kill()
        assert "exit code -9" in worker.check("own:wave")["error"]
        assert worker.check("own:wave")["exact"]


def test_a_worker_counts_its_own_memory_alone() -> None:
    """A process begins with its parent's peak in `getrusage`."""
    ballast = bytearray(2 << 30)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    with Worker(["--no-step", "--no-onnx", "--ratio=2"], timeout=300, threads=1) as worker:
        assert 0 < worker.check("own:wave")["peak"] < len(ballast)


def test_a_worker_gives_up_in_time() -> None:
    with Worker([], timeout=0.2, threads=1) as worker:
        assert worker.check("own:wave")["error"] == "more than 0 s"


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, page, plot = tmp_path / "zoo.jsonl", tmp_path / "zoo.md", tmp_path / "zoo.svg"
    done = [record("own:wave"), record("own:unet", error="Traceback\nMemoryError: no"), record("hf:gpt2", nodes=300)]
    out.write_text("".join(json.dumps(r) + "\n" for r in done))
    args = ["own:wave", "own:unet", "hf:gpt2", "--out", str(out), "--page", str(page), "--plot", str(plot)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1
    assert "2 passed, 1 failed: own:unet" in result.output
    assert len(read(out)) == 3
    assert "| own:wave | yes | 2e-15 | 1e-14 |" in page.read_text()
    assert "FAILED" in page.read_text()
    assert plot.read_text().startswith("<?xml")


def test_the_page_says_what_holds_parameters_back() -> None:
    frozen = [("aten.conv1d.default", "the op works along this axis", 60), ("output", "it is an output", 20)]
    text = markdown([record("timm:eca", coverage=0.92, frozen=frozen)])
    assert "- timm:eca (0.9200): `aten.conv1d.default`: the op works along this axis (6.0% of parameters)" in text


def test_rows_tell_fewer_ratios_and_poor_conditioning() -> None:
    assert row(record("a:b", eval_error={"1.5": 1e-15}))[-1] == "ratios 1.5"
    poor = record("a:b", train_error={"2.0": 1e-7}, train_conditioning=1e-8)
    assert poor["exact"]
    assert "one unit in the last place does 1e-08 in train mode" in row(poor)[-1]
    assert not record("a:b", train_error={"2.0": 1e-7}, train_conditioning=1e-10)["exact"]


def test_the_exponent_of_growth(tmp_path: Path) -> None:
    records = [record("a:b", nodes=n, analysis_seconds=1e-6 * n**2, rewrite_seconds=0.0) for n in (10, 100, 1000)]
    assert exponent(points(records)[REWRITE]) == pytest.approx(2.0)
    assert "to the power of 2.00" in in_words(records)
    for name in ("a.svg", "b.svg"):
        draw(records, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_groups_name_models_that_exist() -> None:
    names = GROUPS["all"]()
    assert len(names) == len(set(names)) > 400
    assert {name.partition(":")[0] for name in names} == {"own", "hf", "torchvision", "timm"}
    assert set(GROUPS["core"]()) <= set(names)
    entry = entry_of("torchvision:resnet18")
    assert entry.inputs()[0][0].shape == (2, 3, 64, 64)
