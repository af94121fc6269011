"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from gpd_fx import expand, fold, save
from gpd_fx.cli.app import app
from gpd_fx.cli.options import parse_ratios
from gpd_fx.demo.digits import DigitNet
from gpd_fx.distill.config import load_config
from gpd_fx.distill.show.metrics import read_metrics
from gpd_fx.io.models import save_weights
from tests.distill_data import write_images

DIGITS = "gpd_fx.demo.digits:DigitNet"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def plain(text: str) -> str:
    """Without the boxes and line breaks that depend on the width of the terminal."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("command", ["demo", "inspect", "distill", "fold", "export", "opt"])
def test_help_teaches_with_examples(command: str) -> None:
    assert f"gpd-fx {command}" in plain(run("--help").stdout)
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Examples • gpd-fx {command}" in plain(result.stdout)


def test_version_and_no_command() -> None:
    assert run("--version").stdout.startswith("gpd-fx ")
    assert "Usage" in run().output


def test_python_m_is_the_same() -> None:
    result = subprocess.run([sys.executable, "-m", "gpd_fx", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("gpd-fx ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "resnet18"), "torchvision:NAME"),
        (("inspect", DIGITS, "--ratio", "0.5"), "0.5"),
        (("inspect", DIGITS, "--input", "1,8,x"), "'1,8,x' must be positive whole numbers"),
        (("inspect", DIGITS, "--json", "/nowhere/report.json"), "does not exist"),
        (("inspect", DIGITS, "--markdown", "/nowhere/report.md"), "does not exist"),
        (("inspect", DIGITS, "--picture", "/nowhere/report.svg"), "does not exist"),
        (("inspect", DIGITS, "--picture", "."), "is a folder"),
        (("distill", "--data", "."), "no student is named"),
        (("distill", "--student", DIGITS, "--out", "/dev/null/run"), "cannot be made"),
        (("distill", "--student", DIGITS, "--epochs", "0"), "epochs is 0; it must be 1 or more"),
        (("distill", "--student", DIGITS, "--set", "clip_grad"), "--set 'clip_grad' must be NAME=VALUE"),
        (("distill", "--student", DIGITS, "--set", "clip=5"), "unknown option 'clip'; did you mean clip_grad"),
        (("distill", "--student", DIGITS, "--weight", "distill:3"), "must be LOSS=WEIGHT"),
        (("distill", "--student", DIGITS, "--weight", "kd=3"), "unknown weight 'kd'"),
        (("distill", "--config", "/nowhere.yaml"), "'/nowhere.yaml' cannot be read"),
        (("distill", "--out", "/nowhere", "--resume"), "holds no run to take up"),
        (("distill", "--resume", "--epochs", "3"), "leave epochs out"),
        (("inspect", DIGITS, "--picture", "net.png"), "call it 'net.svg'"),
        (("inspect", DIGITS, "--json", "a", "--markdown", "./a"), "--json and --markdown both name the file 'a'"),
        (("inspect", DIGITS, "--ratio", "x"), "--ratio 'x' must be a number"),
        (("inspect", DIGITS, "--ratio", "*.weight=wide"), "--ratio '*.weight=wide' must be a number"),
        (("inspect", DIGITS, "--ratio", "none.*=2", "--input", "1,8,8"), "'none.*' matches no parameter"),
        (("fold", DIGITS, "/nowhere/teacher", "/nowhere/student"), "does not exist"),
        (("fold", DIGITS, "no-such-file", "student.safetensors"), "no-such-file"),
        (("export", DIGITS, "student.onnx", "--weights", "no-such-file"), "no-such-file"),
        (("demo", "--seeds", "0"), "seeds=0"),
        (("demo", "--epochs", "0"), "epochs=0"),
    ],
)
def test_our_errors_are_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_inspect_prints_the_report_and_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = run("inspect", DIGITS, "--input", "1,8,8", "--ratio", "3", "--json", path)
    assert result.exit_code == 0
    report = json.loads(path.read_text())
    assert report["student_parameters"] == sum(parameter.numel() for parameter in DigitNet().parameters())
    assert report["teacher_parameters"] > 5 * report["student_parameters"]
    assert f"{report['student_parameters']:,}" in result.stdout


def test_inspect_writes_markdown_and_a_picture(tmp_path: Path) -> None:
    page, picture = tmp_path / "report.md", tmp_path / "net.svg"
    result = run("inspect", DIGITS, "--input", "1,8,8", "--markdown", page, "--picture", picture)
    assert result.exit_code == 0
    assert f"written: {page}" in result.stdout
    assert page.read_text().startswith("# Expansion of DigitNet\n")
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.svg", "report.md"]


@pytest.mark.parametrize(
    ("given", "ratio"),
    [
        (None, 2.0),
        (["3"], 3.0),
        (["1.5", "2.5"], 2.5),
        (["1.5", "a.*=2"], {"*": 1.5, "a.*": 2.0}),
        (["a.*=2", "1.5"], {"a.*": 2.0, "*": 1.5}),
        (["a=1", "b=c=2", "a=3"], {"b=c": 2.0, "a": 3.0}),
    ],
)
def test_ratios_by_glob(given: list[str] | None, ratio: float | dict[str, float]) -> None:
    parsed = parse_ratios(given)
    assert parsed == ratio
    assert not isinstance(ratio, dict) or (isinstance(parsed, dict) and list(parsed) == list(ratio))


def test_inspect_with_ratios_by_glob(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    arguments = ("--input", "1,8,8", "--ratio", "1", "--ratio", "head.*=1", "--ratio", "*=3", "--json", path)
    assert run("inspect", DIGITS, *arguments).exit_code == 0
    assert json.loads(path.read_text())["ratio"] == {"head.*": 1.0, "*": 3.0}


def test_fold_then_export(tmp_path: Path) -> None:
    images = torch.rand(3, 1, 8, 8)
    teacher = expand(DigitNet(), 2.0, (images,), verify=False)
    save(teacher, tmp_path / "teacher.safetensors")
    weights = tmp_path / "student.safetensors"
    result = run("fold", DIGITS, tmp_path / "teacher.safetensors", weights, "--input", "1,8,8")
    assert result.exit_code == 0, result.output
    folded, wanted = load_file(weights), fold(teacher).state_dict()
    assert folded.keys() == wanted.keys()
    assert all(torch.equal(folded[key], wanted[key]) for key in wanted)

    pytest.importorskip("onnxruntime")
    onnx = tmp_path / "student.onnx"
    result = run("export", DIGITS, onnx, "--weights", weights, "--input", "1,8,8")
    assert result.exit_code == 0, result.output
    assert "ONNX Runtime differs by at most" in result.stdout
    assert onnx.stat().st_size > 1000


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_weights(DigitNet(width=8), tmp_path / "wide.safetensors")
    result = run("export", DIGITS, tmp_path / "student.onnx", "--weights", tmp_path / "wide.safetensors")
    assert result.exit_code == 2
    assert "does not fit the model" in result.stderr


@pytest.mark.slow
def test_distill_and_take_it_up_again(tmp_path: Path) -> None:
    for package in ("accelerate", "timm", "torchvision", "onnxruntime", "yaml"):
        pytest.importorskip(package)
    data, out = write_images(tmp_path / "data"), tmp_path / "run"
    arguments = ("distill", "--student", "tests.distill_data:Net,width=5", "--data", data, "--out", out)
    arguments += ("--input", "3,8,8", "--epochs", "2", "--batch-size", "8", "--workers", "0", "--device", "cpu")
    arguments += ("--weight", "distill=0:0,1.5:3", "--ratio", "stem.*=3", "--ratio", "2", "--ema-decay", "0.5")
    arguments += ("--dataset", "torch/image_folder", "--lr", "0.05", "--set", "clip_grad=5")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "student in ONNX Runtime" in result.stderr
    config = load_config(out / "config.yaml")
    assert (config.weights["distill"], config.ratio) == ({0.0: 0.0, 1.5: 3.0}, {"stem.*": 3.0, "*": 2.0})
    assert (config.clip_grad, config.learning_rate) == (5, 0.05)
    first = (out / "student.safetensors").read_bytes()
    result = run("distill", "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert "going on after update 6" in result.stderr
    assert (out / "student.safetensors").read_bytes() == first
    folded = run("fold", "tests.distill_data:Net,width=5", out / "teacher.safetensors", tmp_path / "s.safetensors")
    assert folded.exit_code == 0, folded.output
    weights = load_file(tmp_path / "s.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in load_file(out / "student.safetensors").items())
    assert len(read_metrics(out)) == 2
