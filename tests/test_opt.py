"""Pipelines as text, and passes over exported programs in files, which are read without running what lies in them."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpd_fx.errors import ArgumentError, PassError
from gpd_fx.io.programs import read_program, write_program
from gpd_fx.passes import Branch, FuseDepthwise, Merge, Normalize, Widen
from gpd_fx.passes.pipeline_text import PASSES, options_of, parse_pipeline
from gpd_fx.verify.verification import relative_error
from tests.test_cli import plain
from tests.test_cli import run as run_command


class Sized(nn.Module):
    """Sizes in its arithmetic, a region without gradients, a lifted constant, and a name that begins like torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.torch_last = nn.Conv2d(5, 4, 1)
        self.shift = torch.randn(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        with torch.no_grad():
            scale = 1 + h.mean().square()
        y = self.torch_last(h * scale) + self.shift
        return y * (x.shape[2] // 2 + x.shape[3] % 3) + y.flatten(2)[..., : max(x.shape[2], 2)].sum()


AUTO = torch.export.Dim.AUTO


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Sized().double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return model


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: AUTO, 2: AUTO, 3: AUTO},))
    return write_program(program, tmp_path_factory.mktemp("program") / "model.pt2")


run = partial(run_command, "opt")


# --------------------------------------------------------------------------------------------------- the text


def test_a_pipeline_from_text() -> None:
    text = "normalize, widen{ratio=1.5 exclude=['head.*', tail] seed=3},branch{branches=[orepa,'1x1-kxk:full']}, merge"
    assert parse_pipeline(text) == (
        Normalize(),
        Widen(1.5, ("head.*", "tail"), 3),
        Branch(("orepa", "1x1-kxk:full")),
        Merge(),
    )
    assert parse_pipeline("widen{ratio={'*': 2, head.*: 1.5}, equal_alpha=true}") == (
        Widen({"*": 2, "head.*": 1.5}, equal_alpha=True),
    )
    assert parse_pipeline("branch{branches=none}") == (Branch(None),)
    assert parse_pipeline("fuse-depthwise{but={conv: 'not this, please'}}") == (
        FuseDepthwise({"conv": "not this, please"}),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no pass"),
        ("normalise", r"no pass 'normalise'; did you mean 'normalize'\?"),
        ("squash", r"no pass 'squash'\. Known: normalize, propagate, widen"),
        ("widen{ratio=2", "lacks a closing bracket"),
        ("widen}", "closes a bracket that it does not open"),
        ("widen{exclude=['a]}", "lacks a closing quote"),
        ("widen{ratio}", "widen: cannot read 'ratio'; options are written option=value"),
        ("widen{width=2}", "there is no option 'width'; its options are ratio, exclude, seed, equal_alpha"),
        ("merge{a=1}", "there is no option 'a'; it has none"),
        ("normalize{example_inputs=[1]}", "there is no option 'example_inputs'"),
        ("widen{ratio=wide}", r"ratio=wide is not of the type float or \{str: float, \.\.\.\}"),
        ("widen{seed=1.5}", "seed=1.5 is not of the type int"),
        ("widen{seed=true}", "seed=true is not of the type int"),
        ("widen{ratio=2 ratio=3}", "'ratio' is given twice"),
        ("widen{ratio=2}x", "cannot read 'widen{ratio=2}x'"),
    ],
)
def test_what_is_no_pipeline(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        parse_pipeline(text)


# --------------------------------------------------------------------------------------------------- the command


def test_every_pass_is_listed_with_its_options() -> None:
    result = run("--list")
    assert result.exit_code == 0
    for name, kind in PASSES.items():
        assert name in result.stdout
        assert all(option in result.stdout for option in options_of(kind))


def test_a_program_is_widened_and_folded_again(model: nn.Module, file: Path, tmp_path: Path) -> None:
    wide, narrow, plan = tmp_path / "wide.pt2", tmp_path / "narrow.pt2", tmp_path / "plan.safetensors"
    passes = "normalize,widen{ratio=2},branch,merge"
    result = run(file, "-p", passes, "-o", wide, "--verify", "--plan", plan, "--print-after", "widen")
    assert result.exit_code == 0, result.output
    assert "Widen: changed the graph" in result.stdout
    assert re.search(r"f64\[s\d+, 10, s\d+, s\d+\]", result.stdout)
    assert "verified: no pass changed the values" in result.stdout
    assert run(wide, "-p", f"normalize,fold{{plan='{plan}' source={file}}}", "-o", narrow).exit_code == 0
    counts = {path: sum(p.numel() for p in read_program(path).parameters()) for path in (file, wide, narrow)}
    assert counts[narrow] == counts[file] < counts[wide]
    for shape in ((2, 3, 7, 6), (3, 3, 5, 9)):
        x = torch.randn(shape, dtype=torch.float64)
        for path in (wide, narrow):
            assert relative_error(model(x), read_program(path).module()(x)) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give the file of an exported program"),
        (("no.pt2",), "'no.pt2' cannot be read: No such file"),
        (("{file}", "-p", "widen"), "Normalize"),
        (("{file}", "-p", "normalise"), "did you mean 'normalize'"),
        (("{file}", "--print-after", "merge"), "the pipeline has no such pass"),
        (("{file}", "-o", "x.pt2", "--plan", "x.pt2"), "both name the file 'x.pt2'"),
        (("{file}", "-o", "none/x.pt2"), "does not exist"),
        (("{file}", "-p", "normalize,fold"), "Fold"),
    ],
)
def test_what_the_command_refuses(arguments: tuple[str, ...], message: str, file: Path) -> None:
    result = run(*[argument.format(file=file) for argument in arguments])
    assert result.exit_code == 2
    assert message in plain(result.output)


# --------------------------------------------------------------------------------------------------- the file


class Trap:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, ("trapped", "w")


def altered(file: Path, change: Callable[[str, bytes], bytes | None], more: dict[str, bytes] | None = None) -> Path:
    """The archive with other contents, in the current folder."""
    target = Path("altered.pt2")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(target, "w") as made:
        for name in source.namelist():
            content = change(name, source.read(name))
            if content is not None:
                made.writestr(name, content)
        top = source.namelist()[0].partition("/")[0]
        for name, content in (more or {}).items():
            made.writestr(f"{top}/{name}", content)
    return target


def in_graph(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if "/models/" not in name:
            return content
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    return change


def in_inputs(name: str, content: bytes) -> bytes:
    if "sample_inputs" not in name:
        return content
    made = io.BytesIO()
    torch.save(((Trap(),), {}), made)
    return made.getvalue()


def in_weights(name: str, content: bytes) -> bytes:
    if not name.endswith("weights_config.json"):
        return pickle.dumps(Trap()) if name.endswith("weight_0") else content
    config = json.loads(content)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


def as_is(name: str, content: bytes) -> bytes:
    del name
    return content


CALLS = "os.system('touch trapped')"


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (in_graph("torch.ops.aten.relu.default", "torch.os.system"), None, "calls 'torch.os.system', which is no oper"),
        (in_graph("torch.ops.aten.relu.default", "torchy.os.system"), None, "calls 'torchy.os.system'"),
        (in_graph("torch.ops.aten.relu.default", "torch.ops.load_library"), None, "calls 'torch.ops.load_library'"),
        (in_graph("_operator.floordiv", "_operator.attrgetter"), None, "calls '_operator.attrgetter'"),
        (
            in_graph("Symbol('s77', positive=True, integer=True)", f"__import__('os') and {CALLS}"),
            None,
            "no arithmetic",
        ),
        (in_graph("Symbol('s77', positive=True, integer=True)", "sympify('open')('trapped')"), None, "no arithmetic"),
        (in_inputs, None, "holds more than tensors and plain values"),
        (in_weights, None, "is pickled"),
        (as_is, {"data/weights/model.pt": pickle.dumps(Trap())}, "its tensors are pickled"),
        (as_is, {"DATA/constants/model.pt": pickle.dumps(Trap())}, "its tensors are pickled"),
        (as_is, {"Models/model.json": b"{}"}, "twice"),
        (as_is, {"data/aotinductor/model/code.so": b""}, "compiled code"),
    ],
)
def test_code_in_a_file_is_not_run(
    change: Callable[[str, bytes], bytes],
    more: dict[str, bytes] | None,
    message: str,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    target = altered(file, change, more)
    with pytest.raises(ArgumentError, match=message):
        read_program(target)
    assert not Path("trapped").exists()


def test_the_text_of_guards_is_not_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def change(name: str, content: bytes) -> bytes:
        if "/models/" not in name:
            return content
        program = json.loads(content)
        program["guards_code"] = ["open('trapped', 'w')"]
        return json.dumps(program).encode()

    program = read_program(altered(file, change))
    program.module()(torch.randn(2, 3, 7, 6, dtype=torch.float64))
    assert not Path("trapped").exists()


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_damaged_file(keep: int, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "damaged.pt2"
    target.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArgumentError, match=r"damaged\.pt2' is no program that torch\.export\.save"):
        read_program(target)
