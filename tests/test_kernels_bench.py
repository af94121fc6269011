"""The benchmarks of the composition and of a training step, on a tiny network: every case passes its check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench import compose, depthwise, tune
from bench.__main__ import app
from bench.einsum import compose_by_einsum
from bench.everything import TINY
from bench.measure import Case
from bench.section import Results
from gpd_fx.kernels.compose.compose import Layer, OutputFilter
from gpd_fx.kernels.compose.layout import Cut, KernelLayout
from gpd_fx.kernels.depthwise import launch as depthwise_launch
from gpd_fx.kernels.depthwise import op as kernels
from tests.tiles import interpreted, traffic

pytestmark = [
    # torch 2.11 says so while it calls a graph that it exported itself
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    # triton 3.6 makes numbers of arrays in a way that numpy warns about
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("command", "cases"),
    [
        (["step", "--batch", "4"], ["plain", "gpd_fx", "convs", "einsum"]),
        (
            ["compose"],
            [f"{n}, forward" for n in (*compose.CASES, compose.COPY)]
            + [f"{n}, both" for n in (*compose.CASES, compose.HOST, compose.COPY)],
        ),
    ],
    ids=["step", "compose"],
)
def test_every_case_is_right(command: list[str], cases: list[str], tmp_path: Path) -> None:
    out = tmp_path / "results" / "found.json"
    result = CliRunner().invoke(app, [*command, TINY, "--resolution", "16", "--rounds", "2", "--out", str(out)])
    assert result.exception is None, result.output
    (found,) = Results.load(out).sections
    assert [row.name for row in found.rows] == cases
    for row in found.rows:
        assert row.correct
        assert len(row.seconds) == len(row.ratios) == 2
    assert found.machine["torch"] == torch.__version__
    assert "WRONG" not in result.output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--cases", "plain,fast", "there is no case 'fast'"), ("--amp", "fp8", "there is no autocast to 'fp8'")],
)
def test_an_unknown_choice_is_refused(option: str, value: str, message: str) -> None:
    result = CliRunner().invoke(app, ["step", TINY, "--resolution", "16", option, value])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
def test_sizes_of_tiles_are_chosen(tmp_path: Path) -> None:
    """What a device is tuned by, whole, under the interpreter."""
    interpreted()
    out = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["tune", "--tiny", "--out", str(out)])
    assert result.exception is None, result.output
    sections = Results.load(out).sections
    assert [len(section.rows) for section in sections] == [2, 2]
    assert all(row.correct and row.median is not None for section in sections for row in section.rows)
    assert '": (Blocks(lines=' in result.output


def test_sizes_that_cannot_be_timed_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "case_of", lambda cases, name, pair, side: Case.missing(name, "no shared memory"))  # pyright: ignore[reportUnknownLambdaType]
    result = CliRunner().invoke(app, ["tune", "--tiny"], env={"TRITON_INTERPRET": "1"})
    assert result.exit_code == 2
    assert "no sizes of tiles could be timed: no shared memory" in " ".join(result.output.split())
    assert "Blocks(" not in result.output


def test_tuning_on_a_cpu_says_how_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = CliRunner().invoke(app, ["tune", "--tiny"])
    assert result.exit_code == 2
    assert "TRITON_INTERPRET=1" in result.output


def wrong_kernels(layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """Composed by einsum, the first input of each 3x3 kernel off by a hundredth (batch norm would undo an output's)."""
    wide, narrow = compose_by_einsum(layers)
    return [wrong(t) if t.dim() == 4 and t.shape[2] == 3 else t for t in wide], narrow


def wrong(kernel: Tensor) -> Tensor:
    factor = torch.ones(1, kernel.shape[1], 1, 1, dtype=kernel.dtype)
    factor[0, 0] = 1.01
    return kernel * factor


def test_a_wrong_composition_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(compose.CASES, "einsum", wrong_kernels)
    out = tmp_path / "found.json"
    CliRunner().invoke(app, ["compose", TINY, "--resolution", "16", "--rounds", "1", "--out", str(out)])
    rows = {row.name: row.correct for row in Results.load(out).sections[0].rows}
    assert not rows["einsum, both"]
    assert rows["grouped, both"]


@pytest.mark.parametrize("amp", [[], ["--amp", "bf16"]])
def test_a_wrong_step_is_found(amp: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.step.compose_by_einsum", wrong_kernels)
    out = tmp_path / "found.json"
    names = "plain,einsum,convs"
    options = ["--cases", names, "--resolution", "16", "--rounds", "1", "--batch", "4", *amp, "--out", str(out)]
    CliRunner().invoke(app, ["step", TINY, *options])
    rows = {row.name: row.correct for row in Results.load(out).sections[0].rows}
    assert rows == {"plain": True, "einsum": False, "convs": True}


def test_depthwise_layers_by_the_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interpreted()
    monkeypatch.setattr(kernels, "usable", kernels.fitting)
    out, some = tmp_path / "found.json", ["--rounds", "1", "--batch", "2", "--backend", "aot_eager", "--channels-last"]
    with traffic(depthwise_launch) as counted:
        result = CliRunner().invoke(app, ["depthwise", "--tiny", *some, "--dtype", "float16", "--out", str(out)])
    assert result.exception is None, result.output
    assert "normalise" in counted.launches
    (found,) = Results.load(out).sections
    assert [row.name.rpartition(", ")[2] for row in found.rows] == ["torch", "compiled", "fused"] * 2
    assert all(row.correct for row in found.rows)
    assert found.rows[0].figures["MB"] * 10 == pytest.approx(found.rows[2].figures["MB"] * 14)


def test_a_wrong_depthwise_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Tensor:
        return 1.001 * kernels.depthwise_norm(*args)

    monkeypatch.setattr(depthwise, "depthwise_norm", wrong)
    found = depthwise.run(depthwise.TINY, depthwise.Setting(2), 1, torch.device("cpu"))
    assert [row.correct for row in found.rows] == [True, False] * 2


def test_a_dtype_that_the_kernels_do_not_know_is_refused() -> None:
    result = CliRunner().invoke(app, ["depthwise", "--tiny", "--dtype", "float64"])
    assert result.exit_code == 2
    assert "there is no 'float64' here" in result.output


def test_the_bytes_of_a_composition_are_counted() -> None:
    layer = Layer(
        weight=nn.Parameter(torch.randn(8, 4, 3, 3)),
        layout=KernelLayout(),
        terms=(
            OutputFilter(nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.randn(1, 8, 4)), torch.ones(1, 8, 3, 3)),
        ),
        alpha=(None, torch.rand(4), None, None),
        slices=(Cut(1, 1, 4), Cut(1, 1, 2), None, None),
        shape=(4, 2, 3, 3),
    )
    untouched = Layer(nn.Parameter(torch.randn(5)), None, (), (None,), (None,), (5,))
    operands, made = 8 * 4 * 9 + 8 + 8 * 4 + 8 * 9 + 4, 8 * 4 * 9 + 4 * 2 * 9
    gradients = 8 * 4 * 9 + 8 + 8 * 4
    forward, both = compose.bytes_moved([layer, untouched])
    assert forward == 4 * (operands + made)
    assert both - forward == 4 * (made + operands - 8 * 4 * 9 + gradients)
