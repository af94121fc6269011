"""ONNX export: right on random weights, several shapes of inputs and outputs, and nothing written when it is not."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_fx.api import export
from gpd_fx.api.export import export_onnx
from gpd_fx.errors import ArgumentError, ExportError, InputError
from gpd_fx.fxtools.flat_module import draw

Randomise = Callable[[nn.Module], nn.Module]


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.norm2 = nn.BatchNorm2d(width, eps=1e-3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Tokens(nn.Module):
    """Integers, a mask and a float scale in; a dict with a nested tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 4)

    def forward(self, ids: Tensor, mask: Tensor, *, scale: Tensor | None = None) -> dict[str, Any]:
        hidden = self.embed(ids) * mask.unsqueeze(-1)
        if scale is not None:
            hidden = hidden * scale
        logits = self.mix(hidden.sum(1))
        return {"logits": logits, "states": (hidden, logits.tanh()), "note": "not a tensor", "loss": None}


@dataclasses.dataclass
class Pair:
    mean: Tensor
    rest: list[Tensor]


class Dataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, parts: list[Tensor], options: dict[str, Tensor]) -> Pair:
        x = self.layer(parts[0] + parts[1]) * options["gain"]
        return Pair(x.mean(1), [x, x + 1])


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def runtime(path: Path, **inputs: Tensor) -> list[Any]:
    session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def test_residual_network_agrees_with_onnx_runtime_on_other_batch_sizes(tmp_path: Path, randomise: Randomise) -> None:
    module = randomise(Residual())
    path = tmp_path / "student.onnx"
    report = export_onnx(module, path, (torch.randn(2, 3, 8, 8),))
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert len(set(report.batches)) > 2
    assert 1 in report.batches
    assert report.exporter == "dynamo"
    assert report.bytes == path.stat().st_size
    assert report.parameters == sum(p.numel() for p in module.parameters())
    assert json.loads(json.dumps(report.to_dict()))["nodes"] == report.nodes
    assert str(path) in str(report)
    image = torch.randn(6, 3, 8, 8)
    (output,) = runtime(path, x=image)
    torch.testing.assert_close(torch.as_tensor(output), module.eval()(image), atol=1e-5, rtol=1e-4)


def test_the_module_is_left_as_it_was(tmp_path: Path, randomise: Randomise) -> None:
    module = randomise(Residual()).train()
    module.get_submodule("norm").eval()
    before, modes = state(module), {name: part.training for name, part in module.named_modules()}
    example = torch.randn(2, 3, 8, 8)
    kept = example.clone()
    export_onnx(module, tmp_path / "student.onnx", (example,))
    after = module.state_dict()
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert torch.equal(example, kept)
    assert [file.name for file in tmp_path.iterdir()] == ["student.onnx"]


def test_weights_keep_their_names_and_no_source_paths_are_written(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    export_onnx(Residual(), path, (torch.randn(2, 3, 8, 8),))
    names = {weight.name for weight in onnx.load(path).graph.initializer}
    assert {"head.weight", "head.bias"} <= names
    assert not any(name.startswith("module.") for name in names)
    assert b"stack_trace" not in path.read_bytes()
    assert str(Path(__file__).parent).encode() not in path.read_bytes()


def test_several_inputs_integers_keywords_and_a_nested_dict_out(tmp_path: Path, randomise: Randomise) -> None:
    module = randomise(Tokens())
    path = tmp_path / "tokens.onnx"
    args = (torch.randint(0, 11, (2, 7)), torch.ones(2, 7, dtype=torch.bool))
    scale = torch.rand(2, 1, 1)
    report = export_onnx(module, path, args, example_kwargs={"scale": scale})
    assert report.max_error is not None
    assert report.max_error < 1e-5
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["ids", "mask", "scale"]
    assert [value.name for value in graph.output] == ["logits", "states_0", "states_1"]
    ids, mask, gain = torch.randint(0, 11, (5, 7)), torch.rand(5, 7) > 0.3, torch.rand(5, 1, 1)
    logits, hidden, _ = runtime(path, ids=ids, mask=mask, scale=gain)
    expected = module(ids, mask, scale=gain)
    torch.testing.assert_close(torch.as_tensor(logits), expected["logits"])
    torch.testing.assert_close(torch.as_tensor(hidden), expected["states"][0])


def test_nested_inputs_and_a_dataclass_out(tmp_path: Path, randomise: Randomise) -> None:
    path = tmp_path / "nested.onnx"
    export_onnx(randomise(Dataclass()), path, ([torch.randn(2, 4), torch.randn(2, 4)], {"gain": torch.rand(2, 1)}))
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["parts_0", "parts_1", "options_gain"]
    assert [value.name for value in graph.output] == ["mean", "rest_0", "rest_1"]


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_any_example_batch_gives_a_free_batch(tmp_path: Path, batch: int) -> None:
    path = tmp_path / "linear.onnx"
    export_onnx(nn.Sequential(nn.Linear(4, 3)), path, (torch.randn(batch, 4),))
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert runtime(path, input=torch.randn(6, 4))[0].shape == (6, 3)


def test_float64(tmp_path: Path, randomise: Randomise) -> None:
    module = randomise(nn.Sequential(nn.Linear(4, 3))).double()
    report = export_onnx(module, tmp_path / "d.onnx", (torch.randn(2, 4, dtype=torch.float64),))
    assert report.max_error is not None
    assert report.max_error < 1e-12


def test_weights_beside_the_file_where_they_are_too_large_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_EXTERNAL_BYTES", 1000)
    module, path = Residual(32), tmp_path / "student.onnx"
    report = export_onnx(module, path, (torch.randn(2, 3, 8, 8),))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["student.onnx", "student.onnx.data"]
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    image = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(torch.as_tensor(runtime(path, x=image)[0]), module.eval()(image), atol=1e-5, rtol=1e-4)


def wrong(value: float) -> Callable[[Any, dict[str, Tensor]], list[Tensor]]:
    """Stands in for ONNX Runtime: right but for one element of a batch that is not the example's size."""
    real = export._run  # pyright: ignore[reportPrivateUsage]  the point where a wrong result can be injected

    def run(session: Any, feeds: dict[str, Tensor]) -> list[Tensor]:
        results = [result.clone() for result in real(session, feeds)]
        if next(iter(feeds.values())).shape[0] == 3:
            results[0].view(-1)[-1] += value
        return results

    return run


@pytest.mark.parametrize("value", [0.01, float("nan"), float("inf")])
def test_a_mismatch_raises_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(export, "_run", wrong(value))
    with pytest.raises(ExportError, match=r"(?s)no file was written.*dynamo: .*'output'.*batch of 3.*torchscript: "):
        export_onnx(nn.Sequential(nn.Linear(4, 3)), tmp_path / "student.onnx", (torch.randn(2, 4),))
    assert list(tmp_path.iterdir()) == []


def test_a_mismatch_leaves_an_older_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student.onnx"
    path.write_bytes(b"the older one")
    monkeypatch.setattr(export, "_run", wrong(0.01))
    with pytest.raises(ExportError):
        export_onnx(nn.Sequential(nn.Linear(4, 3)), path, (torch.randn(2, 4),))
    assert path.read_bytes() == b"the older one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("bad", "used"), [(1, "dynamo, unoptimized"), (2, "torchscript")])
def test_the_next_exporter_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, used: str) -> None:
    real, calls = export._session, 0  # pyright: ignore[reportPrivateUsage]  called once an attempt

    def session(path: Path) -> Any:
        nonlocal calls
        calls += 1
        if calls <= bad:
            raise RuntimeError("this file does not load")
        return real(path)

    monkeypatch.setattr(export, "_session", session)
    report = export_onnx(Residual(), tmp_path / "student.onnx", (torch.randn(2, 3, 8, 8),))
    assert report.exporter == used
    assert len(report.failed) == bad
    assert "this file does not load" in report.failed[0]
    assert report.max_error is not None
    assert report.max_error < 1e-5


def test_without_verification_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = export_onnx(nn.Sequential(nn.Linear(4, 3)), tmp_path / "a.onnx", (torch.randn(2, 4),), verify=False)
    assert report.max_error is None
    assert report.batches == ()
    assert "not compared" in str(report)


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(Residual(), tmp_path / "student.onnx", (torch.randn(2, 3, 8, 8),))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"(?s){package}.*pip install 'gpd_fx\[onnx\]'"):
        export_onnx(nn.Linear(4, 3), tmp_path / "a.onnx", (torch.randn(2, 4),))


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_a_random_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="deterministic in eval mode"):
        export_onnx(Random(), tmp_path / "a.onnx", (torch.randn(2, 4),))
    assert list(tmp_path.iterdir()) == []


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 2, 2).sum(2)


def test_a_module_that_fixes_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"FixedBatch.*x \(1, 4\).*every batch size"):
        export_onnx(FixedBatch(), tmp_path / "a.onnx", (torch.randn(2, 4),))


def test_nan_in_the_module_is_named(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    nn.init.constant_(module.get_parameter("0.bias"), float("nan"))
    with pytest.raises(ExportError, match=r"'output' of Sequential is NaN"):
        export_onnx(module, tmp_path / "a.onnx", (torch.randn(2, 4),))


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_that_cannot_fail_is_refused(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(ArgumentError, match="tolerance="):
        export_onnx(nn.Linear(4, 3), tmp_path / "a.onnx", (torch.randn(2, 4),), tolerance=tolerance)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"student is a str; pass a torch\.nn\.Module"):
        export_onnx("resnet18", tmp_path / "a.onnx")  # pyright: ignore[reportArgumentType]  that is the test
    with pytest.raises(ArgumentError, match="is a folder"):
        export_onnx(nn.Linear(4, 3), tmp_path, (torch.randn(2, 4),))
    with pytest.raises(ArgumentError, match="does not exist"):
        export_onnx(nn.Linear(4, 3), tmp_path / "no" / "a.onnx", (torch.randn(2, 4),))
    with pytest.raises(InputError, match="no tensor"):
        export_onnx(nn.Linear(4, 3), tmp_path / "a.onnx", (3,))
    with pytest.raises(InputError, match=r"Linear.*\(2, 5\)"):
        export_onnx(nn.Linear(4, 3), tmp_path / "a.onnx", (torch.randn(2, 5),))


def test_random_inputs_stay_in_the_examples_range() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = draw(torch.tensor([[2, 9], [4, 4]]), generator)
    assert ids.dtype == torch.int64
    assert 2 <= int(ids.min()) <= int(ids.max()) <= 9
    assert draw(torch.ones(50, dtype=torch.bool), generator).float().mean() < 1
    mask = draw(torch.tensor([0.0, -torch.inf]).repeat(20), generator)
    assert set(mask.tolist()) == {0.0, -torch.inf}
    assert draw(torch.zeros(50), generator).std() > 0.5
