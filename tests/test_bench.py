"""The benchmarks' machinery: no speed without a right check, results files, the README's table, the whole tiny run."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import gpd_fx
from bench import everything, folded, step, table
from bench.__main__ import app
from bench.compose import awaken
from bench.convs import ConvBranches, LinearBranches, Unwritten, set_identity, with_branches
from bench.everything import RESULTS, Job, measure_all
from bench.machine import slug
from bench.measure import Case, Check, Row, measure
from bench.section import Results, SchemaError, Section
from bench.step import COMPILED, NAMES
from bench.tiny import network
from gpd_fx.kernels.compose import launch
from gpd_fx.passes import Merge
from gpd_fx.verify.verification import relative_error
from tests.tiles import interpreted

CPU = torch.device("cpu")
# torch 2.11 says so while it calls a graph that it exported itself
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def case(name: str, error: float = 0.0, base: str | None = None) -> Case:
    return Case(name, lambda: None, lambda: [Check("values", error, 1e-6)], base)


def broken() -> None:
    raise RuntimeError("out of memory")


def section(title: str = "step of bench.tiny:network", **errors: float) -> Section:
    rows = measure([case(name, error) for name, error in errors.items()], 2, CPU)
    options = {"model": "bench.tiny:network", "branches": "orepa", "batch": 4, "resolution": 16}
    return Section.of("step", title, options | {"amp": None, "channels_last": False}, rows, CPU)


@pytest.mark.parametrize("error", [0.1, math.nan, math.inf])
def test_a_wrong_case_shows_no_speed(error: float, capsys: pytest.CaptureFixture[str]) -> None:
    found = section(right=0.0, fast=error)
    assert [len(row.seconds) for row in found.rows] == [2, 0]
    assert found.rows[1].ratios == []
    assert found.rows[1].to_dict()["median"] is None
    found.show()
    line = next(line for line in capsys.readouterr().out.splitlines() if "fast" in line)
    assert "WRONG" in line
    assert " ms" not in line
    assert Results([found]).wrong == ["step of bench.tiny:network: fast"]


def test_a_case_without_a_check_or_that_fails_shows_no_speed() -> None:
    rows = measure(
        [
            case("right"),
            Case("unchecked", lambda: None, lambda: ()),
            Case("broken", broken, lambda: [Check("values", 0.0, 1.0)]),
            Case.missing("absent", "it is not written down"),
        ],
        2,
        CPU,
    )
    assert [row.correct for row in rows] == [True, False, False, False]
    assert [len(row.seconds) for row in rows] == [2, 0, 0, 0]
    assert rows[2].left_out == "failed: RuntimeError: out of memory"
    assert rows[3].left_out == "it is not written down"


def test_ratios_are_to_the_base_and_missing_without_it() -> None:
    rows = measure([case("a"), case("b"), case("c", base="b"), case("d", base="wrong"), case("wrong", 1.0)], 3, CPU)
    assert [row.base for row in rows[:4]] == ["a", "a", "b", "wrong"]
    assert rows[2].ratios == [c / b for c, b in zip(rows[2].seconds, rows[1].seconds, strict=True)]
    assert rows[3].ratios == []


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    results = Results([section(right=0.0, fast=1.0)], {"another": "no time"})
    path = tmp_path / "folder" / "found.json"
    results.save(path)
    again = Results.load(path)
    assert [one.to_dict() for one in again.sections] == [one.to_dict() for one in results.sections]
    assert again.left_out == {"another": "no time"}
    again.add(section(right=0.0))
    again.leave_out("step of bench.tiny:network", "too short")
    assert len(again.sections) == 1
    assert len(again.sections[0].rows) == 1
    assert again.left_out == {"another": "no time"}


def a_speed_without_a_check(row: dict[str, Any]) -> None:
    row["checks"] = [{"what": "values", "error": 1.0, "tolerance": 0.1}]


def a_wrong_verdict(row: dict[str, Any]) -> None:
    row["correct"] = False


def another_median(row: dict[str, Any]) -> None:
    row["median"] = 0.5 * row["median"] + 1


def a_key_too_many(row: dict[str, Any]) -> None:
    row["speed"] = 1.0


@pytest.mark.parametrize("harm", [a_speed_without_a_check, a_wrong_verdict, another_median, a_key_too_many])
def test_results_that_do_not_hold_together_are_refused(harm: Any, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    Results([section(right=0.0)]).save(path)
    content = json.loads(path.read_text())
    harm(content["sections"][0]["rows"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(SchemaError, match="right"):
        Results.load(path)


def test_jobs_are_left_out_when_time_is_short_or_they_fail() -> None:
    saved: list[int] = []
    jobs = [
        Job("long", 1e9, lambda until: section("long", a=0.0)),
        Job("broken", 0, lambda until: broken() or section()),
        Job("short", 0, lambda until: section("short", a=0.0)),
    ]
    results = Results()
    measure_all(iter(jobs), results, 1, lambda found: saved.append(len(found.sections)))
    assert [one.title for one in results.sections] == ["short"]
    assert saved == [1]
    assert results.left_out == {
        "long": "1 minutes were too short for it",
        "broken": "failed: RuntimeError: out of memory",
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_titles_are_unique_and_the_most_important_jobs_fit(device: str) -> None:
    jobs = list(everything.jobs_of(torch.device(device)))
    assert len({job.title for job in jobs}) == len(jobs)
    assert sum(job.seconds for job in jobs[:4]) <= 8 * 60
    if device == "cuda":
        assert sum(job.seconds for job in jobs) <= 8 * 60


@pytest.mark.slow
def test_the_whole_run_on_a_tiny_network(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    result = CliRunner().invoke(app, ["all", "--tiny", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = Results.load(out)
    assert [one.kind for one in found.sections] == ["step", "step", "compose", "depthwise", "onnx", "expand"]
    assert found.left_out == {}
    for one in found.sections:
        for row in one.rows:
            assert row.correct, (one.title, row.name, row.left_out, row.checks)
            assert row.median is not None
            assert row.ratio is not None
    assert tuple(row.name for row in found.sections[0].rows) == NAMES
    assert {row.base for row in found.sections[0].rows if row.name.endswith(COMPILED)} == {f"plain{COMPILED}"}
    original, student = found.sections[4].rows
    assert original.figures == student.figures
    shown = table.render({"tiny.json": found})
    assert shown.count("| tiny:network") == 0
    assert shown.count("| network |") == 6
    assert shown.count("compiled") == 1


@pytest.mark.slow
# triton 3.6 makes numbers of arrays in a way that numpy warns about
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
def test_the_tile_kernels_are_measured_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run, under triton's interpreter."""
    interpreted()
    monkeypatch.setattr(launch, "usable", lambda weights: weights[0].dtype in launch.DTYPES)
    setting = replace(everything.TINY_STEP, branches="1x1,1x1-kxk", schedule=False)
    for row in step.run(setting, ("plain", "gpd_fx"), 1, CPU).rows:
        assert row.correct, (row.name, row.left_out, row.checks)


def test_a_student_that_is_not_the_teachers_shows_no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = gpd_fx.fold

    def wrong(teacher: gpd_fx.DynamicTeacher) -> nn.Module:
        student = fold(teacher)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.01)
        return student

    monkeypatch.setattr("gpd_fx.fold", wrong)
    original, student = folded.run("bench.tiny:network", 32, 3).rows
    assert original.correct
    assert not student.correct
    assert student.seconds == []
    assert [check.what for check in student.checks if not check.passed] == ["outputs"]


def test_a_larger_student_shows_no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpd_fx.fold", lambda teacher: nn.Sequential(network(), nn.ReLU()))
    _, student = folded.run("bench.tiny:network", 32, 3).rows
    assert {"nodes"} <= {check.what for check in student.checks if not check.passed}
    assert student.seconds == []


@pytest.mark.parametrize("branches", [["1x1", "1x1-kxk", "1x1-avg", "dwsep", "prior", "lowrank"], ["1xk+kx1"]])
def test_branches_as_layers_are_the_same_function(branches: list[str]) -> None:
    """Every branch, on strided, dilated, grouped and depthwise convs, at odd sizes and borders."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), stride=2, padding=(0, 1)),
        nn.ReLU(),
        nn.Conv2d(8, 8, (5, 3), padding=(5, 0), dilation=(2, 1), groups=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 7),
        nn.ReLU(),
        nn.Linear(7, 5),
    ).double()
    image = torch.randn(3, 3, 17, 19, dtype=torch.float64)
    teacher = gpd_fx.expand(model, 2.0, (image,), branches=branches)
    awaken(teacher.composition)
    wide = Merge()(teacher.as_graph("eval")).graph_module
    layers = dict(zip((p.name for p in teacher.composition.plans), teacher.composition.layers(), strict=True))
    apart = with_branches(wide, layers).double()
    set_identity(apart)
    changed = [part for part in apart.modules() if isinstance(part, ConvBranches | LinearBranches)]
    assert len(changed) == (6 if len(branches) > 1 else 3)
    expected: Tensor = teacher.eval()(image)
    assert relative_error(expected, apart(image)) < 1e-12
    with torch.no_grad():
        next(p for name, p in apart.named_parameters() if "branches.1." in name)[0].mul_(1.01)
    assert relative_error(expected, apart(image)) > 1e-6


def test_a_branch_without_layers_of_its_own_is_said() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3))
    teacher = gpd_fx.expand(model, 2.0, (torch.randn(2, 3, 16),), branches=["1x1"])
    wide = Merge()(teacher.as_graph("train")).graph_module
    layers = dict(zip((p.name for p in teacher.composition.plans), teacher.composition.layers(), strict=True))
    with pytest.raises(
        Unwritten, match=r"2 layers with branches are neither a conv2d nor a linear: 0.weight, 2.weight"
    ):
        with_branches(wide, layers)


def test_a_table_is_put_between_its_markers() -> None:
    readme = f"before\n{table.BEGIN}\nold\n{table.END}\nafter {table.END}\n"
    new = table.put(readme, "new")
    assert new == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter {table.END}\n"
    assert table.put(new, "new") == new
    with pytest.raises(ValueError, match="the README has no"):
        table.put("nothing", "new")


def test_a_wrong_row_has_no_figure_in_the_table() -> None:
    found = section(plain=0.0, gpd_fx=1.0, einsum=0.0)
    for row in found.rows:
        row.figures["copies over plain"] = 1.5
    line = next(line for line in table.render({"a.json": Results([found])}).splitlines() if "network" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["network", "default", "4, 16x16", "float32"]
    assert cells[5] == ""
    assert cells[6] != ""
    assert cells[7:] == ["", ""]


def test_the_readme_is_in_step_with_the_results() -> None:
    text = table.README.read_text(encoding="utf-8")
    assert table.put(text, table.render(table.load_all())) == text


def test_every_results_file_is_named_after_its_device_and_is_right() -> None:
    files = table.load_all()
    assert files
    for name, results in files.items():
        assert results.wrong == []
        assert name in {f"{slug(one.machine['device'])}.json" for one in results.sections}


def test_results_are_not_shipped() -> None:
    import tomllib

    project = tomllib.loads((RESULTS.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]
    assert all(package.split(".")[0] == "gpd_fx" for package in packages)


def test_a_row_survives_a_copy() -> None:
    row = section(right=0.0).rows[0]
    assert Row.of_dict(copy.deepcopy(row.to_dict())) == row
