"""Save after load is the identity, an interruption costs nothing, and every wrong file is told apart."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_fx.api.checkpoint import load, save
from gpd_fx.api.expansion import expand
from gpd_fx.errors import ArgumentError, CheckpointError
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher

Randomise = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head((x + self.conv2(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Tied weights, integers that index a table, and a keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor, *, options: dict[str, Tensor]) -> Tensor:
        return self.out(F.gelu(self.mix(self.embed(ids) * options["gain"])))


IMAGES = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)),)


@pytest.fixture
def teacher(randomise: Randomise) -> DynamicTeacher:
    """A teacher after one training step, so that no value is what `expand` made it."""
    result = expand(randomise(Net()), 2.0, IMAGES, seed=5)
    result.train()
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1)
    for output in result.both(*IMAGES):
        output.square().mean().backward(retain_graph=True)
    optimizer.step()
    return result


def assert_same(left: DynamicTeacher, right: DynamicTeacher, *inputs: Any, **kwargs: Any) -> None:
    states = left.state_dict(), right.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    for ours, theirs in zip(left.eval().both(*inputs, **kwargs), right.eval().both(*inputs, **kwargs), strict=True):
        assert torch.equal(ours, theirs)


def description(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["gpd_fx"])


def rewrite(path: Path, **changes: Any) -> None:
    """Replace entries of the description; None removes one."""
    entries = {key: value for key, value in {**description(path), **changes}.items() if value is not None}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata={"gpd_fx": json.dumps(entries)})


def test_load_after_save_is_the_identity(tmp_path: Path, teacher: DynamicTeacher) -> None:
    save(teacher, tmp_path / "t.safetensors")
    loaded = load(tmp_path / "t.safetensors", Net())
    assert_same(teacher, loaded, torch.randn(3, 3, 8, 8))
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_save_after_load_writes_the_same_file(tmp_path: Path, teacher: DynamicTeacher) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save(teacher, first)
    save(load(first, Net()), second)
    assert safetensors.torch.load_file(first).keys() == safetensors.torch.load_file(second).keys()
    assert description(first) == description(second)


def test_saving_and_loading_change_neither_teacher_nor_model(tmp_path: Path, teacher: DynamicTeacher) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = Net().eval()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    save(teacher, tmp_path / "t")
    load(tmp_path / "t", model, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert teacher.training
    assert not model.training


@pytest.mark.parametrize(
    ("ratio", "branches"), [(1.5, None), (3.0, ["1x1"]), ({"conv.*": 2.0, "head.*": 1.0}, "orepa")]
)
def test_every_recipe_is_kept(tmp_path: Path, randomise: Randomise, ratio: Any, branches: Any) -> None:
    teacher = expand(randomise(Net()), ratio, IMAGES, branches=branches, seed=11)
    save(teacher, tmp_path / "t")
    loaded = load(tmp_path / "t", Net())
    assert loaded.recipe == teacher.recipe
    assert_same(teacher, loaded, *IMAGES)


def test_tied_parameters_integers_and_keywords(tmp_path: Path, randomise: Randomise) -> None:
    ids, options = torch.tensor([[0, 6, 2], [3, 3, 1]]), {"gain": torch.rand(2, 3, 1)}
    teacher = expand(randomise(Tokens()), 2.0, (ids,), example_kwargs={"options": options})
    save(teacher, tmp_path / "t")
    loaded = load(tmp_path / "t", Tokens())
    assert_same(teacher, loaded, ids, options=options)


def test_float64_is_kept_and_not_cast_silently(tmp_path: Path, randomise: Randomise) -> None:
    teacher = expand(randomise(Net()).double(), 2.0, (IMAGES[0].double(),))
    save(teacher, tmp_path / "t")
    assert_same(teacher, load(tmp_path / "t", Net().double()), IMAGES[0].double())
    with pytest.raises(CheckpointError, match=r"'conv.weight' is float64\[4, 3, 3, 3\].*float32.*dtype"):
        load(tmp_path / "t", Net())


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, teacher: DynamicTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t"
    save(teacher, path)
    old = path.read_bytes()

    def half(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(old[: len(old) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half)
        with pytest.raises(KeyboardInterrupt):
            save(teacher, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save(teacher, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.6, 0.999])
def test_a_file_that_is_cut_off(tmp_path: Path, teacher: DynamicTeacher, share: float) -> None:
    path = tmp_path / "t"
    save(teacher, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"(is empty|is cut off or damaged).*save it again"):
        load(path, Net())


def test_a_file_cut_off_inside_its_first_bytes(tmp_path: Path, teacher: DynamicTeacher) -> None:
    path = tmp_path / "t"
    save(teacher, path)
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load(path, Net())


def write_text(path: Path) -> None:
    path.write_text("just a text, nothing else\n" * 10)


def write_pickle(path: Path) -> None:
    torch.save(Net().state_dict(), path)


def write_foreign(path: Path) -> None:
    safetensors.torch.save_file(Net().state_dict(), path, metadata={"format": "pt"})


def write_nothing(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_text, "is not a safetensors file"),
        (write_pickle, "torch.save, which gpd_fx never reads"),
        (write_foreign, "gpd_fx.save did not write it"),
        (write_nothing, "does not exist"),
        (Path.mkdir, "is a folder"),
    ],
)
def test_foreign_files(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "t"
    write(path)
    with pytest.raises(CheckpointError, match=message):
        load(path, Net())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99, "gpd_fx": "9.9"}, r"format 99, written by gpd_fx 9\.9.*upgrade"),
        ({"plan": "0" * 64}, "widens in another way"),
        ({"recipe": None}, "damaged.*no recipe"),
        ({"format": None}, "damaged"),
        ({"format": "two"}, "damaged"),
    ],
)
def test_other_descriptions(tmp_path: Path, teacher: DynamicTeacher, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "t"
    save(teacher, path)
    rewrite(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(path, Net())


@pytest.mark.parametrize("name", ["composition.weights.conv.weight", "skeleton.norm.num_batches_tracked"])
@pytest.mark.parametrize("change", ["lost", "shape", "more"])
def test_tensors_that_do_not_fit(tmp_path: Path, teacher: DynamicTeacher, name: str, change: str) -> None:
    path = tmp_path / "t"
    save(teacher, path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    if change == "shape":
        tensors[name] = torch.zeros(2, 2)
    elif change == "lost":
        del tensors[name]
    else:
        tensors[f"{name}.more"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"(?s)does not fit this model.*{re.escape(name)}"):
        load(path, Net())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Net(width=6),
            r"saved from another model.*Net, whose parameter 'conv.weight' is .*\[4, 3, 3, 3\].*\[6, 3, 3, 3\]",
        ),
        (Tokens(), "saved from another model.*'conv.weight'.* lacks"),
        (nn.Sequential(), "saved from another model"),
    ],
)
def test_another_model(tmp_path: Path, teacher: DynamicTeacher, model: nn.Module, message: str) -> None:
    save(teacher, tmp_path / "t")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "t", model)


def test_a_model_with_more_parameters(tmp_path: Path, teacher: DynamicTeacher) -> None:
    save(teacher, tmp_path / "t")
    model = Net()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"lacks the given model's parameter 'extra.weight'"):
        load(tmp_path / "t", model)


def test_only_teachers_are_saved_and_only_to_files(tmp_path: Path, teacher: DynamicTeacher) -> None:
    with pytest.raises(ArgumentError, match=r"save takes what gpd_fx.expand returned, got Net"):
        save(Net(), tmp_path / "t")  # pyright: ignore[reportArgumentType]  that is the test
    with pytest.raises(ArgumentError, match="is a folder"):
        save(teacher, tmp_path)
    with pytest.raises(ArgumentError, match="does not exist"):
        save(teacher, tmp_path / "no" / "t")
