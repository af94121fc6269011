"""Growth in steps: 2 then 4 computes what 2 computed, and folds to the same student."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_fx import (
    DynamicTeacher,
    GPDLoss,
    expand,
    fold,
    grow,
    load,
    save,
)
from gpd_fx.axes.expressions import Expr
from gpd_fx.axes.widening import Widening
from gpd_fx.demo.digits import DigitNet
from gpd_fx.errors import ArgumentError, CheckpointError, VerificationError
from gpd_fx.plan.ratios import Ratio
from tests.test_checkpoint import assert_same, description, rewrite

Randomise = Callable[[nn.Module], nn.Module]


class Mixed(nn.Module):
    """Groups, concatenation, a tied layer, layer norm, and attention, whose heads widen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Linear(8, 8)
        self.ln = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.norm(torch.cat([x, self.grouped(x)], 1)).flatten(2).transpose(1, 2)
        x = x + self.mix(F.gelu(self.mix(x)))
        q, k, v = self.qkv(self.ln(x)).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-3, -2)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


class Activations(nn.Module):
    """Shares that only the graph can take: single-head attention, norms, sums and a softmax over widened channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 7)
        self.gate, self.last = nn.Linear(7, 6), nn.Linear(3, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(2).transpose(1, 2)
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = F.glu(self.gate((F.normalize(q, dim=-1) @ k.transpose(1, 2)).softmax(-1) @ v))
        y = self.last(y * y.softmax(-1)) + v.sum(-1, keepdim=True) + q.norm(dim=-1, keepdim=True)
        both = torch.einsum("blc,bmc->blm", y, x) @ y
        return self.head((both * F.cosine_similarity(y, x, dim=-1)[..., None]).mean(1)) + v.mean((1, 2))[:, None]


class Convolutions(nn.Module):
    """Depthwise, transposed and standardised convs, gates made of means, group and instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.norm, self.up = nn.GroupNorm(2, 6), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.register_buffer("shift", torch.randn(4, 1, 1), persistent=False)
        self.instance, self.last = nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn(self.first(x)))
        y = self.depthwise(x)
        y = y * self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        y = F.relu6(self.instance(self.up(self.norm(x + y)) * 3) + self.shift)
        w = self.last.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 0.1)
        return F.conv2d(y, w).mean((2, 3))


class Recurrent(nn.Module):
    """An LSTM in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.lstm = nn.LSTM(4, 3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.first(x).flatten(2).transpose(1, 2))[0].mean(1))


STEPS: list[tuple[type, tuple[float, ...]]] = [
    (DigitNet, (2.0, 4.0)),
    (DigitNet, (1.0, 2.0, 2.0)),
    (Mixed, (2.0, 4.0)),
    (Activations, (2.0, 4.0)),
    (Activations, (1.5, 2.0, 3.0)),
    (Convolutions, (2.0, 3.0)),
    (Convolutions, (1.5, 4.0)),
    (Recurrent, (2.0, 3.0)),
]


def images(kind: type, batch: int = 6) -> Tensor:
    return torch.randn(batch, 1 if kind is DigitNet else 3, 6, 6, dtype=torch.float64)


def step(teacher: DynamicTeacher, x: Tensor) -> None:
    """One step of training; every parameter has a gradient."""
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.01)
    teacher_out, student_out = teacher.train().both(x)
    GPDLoss()(student_out, teacher_out, torch.arange(len(x)) % 5).total.backward()
    assert all(parameter.grad is not None for parameter in teacher.parameters())
    optimizer.step()


def trained(model: nn.Module, x: Tensor, ratio: Ratio) -> DynamicTeacher:
    """A teacher of which nothing is what `expand` made it: parameters, branches, statistics."""
    return scrambled(expand(model, ratio, (x,), verify=False), x)


def scrambled(teacher: DynamicTeacher, x: Tensor) -> DynamicTeacher:
    step(teacher, x)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
            if tensor.is_floating_point() and "_gpd_" not in name:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
                tensor.add_(0.1 * (noise.abs() if name.endswith("running_var") else noise))
    return teacher


def check_same(old: DynamicTeacher, new: DynamicTeacher, x: Tensor) -> None:
    """The same function in both modes, and the same student bit by bit."""
    for training in (False, True):
        wanted, found = (copy.deepcopy(each).train(training).both(x) for each in (old, new))
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-9, atol=1e-9 * float(wanted[0].detach().abs().max()))
        torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0)
    narrow, wide = fold(old).state_dict(), fold(new).state_dict()
    assert narrow.keys() == wide.keys()
    assert all(value.equal(wide[name]) for name, value in narrow.items())


def widths(teacher: DynamicTeacher) -> dict[str, int]:
    return {name: weight.numel() for name, weight in teacher.composition.weights.named_parameters()}


@pytest.mark.parametrize(("kind", "ratios"), STEPS)
def test_a_grown_teacher_computes_the_same(kind: type, ratios: tuple[float, ...], randomise: Randomise) -> None:
    x = images(kind)
    teacher = trained(randomise(kind().double()), x, ratios[0])
    assert (teacher.eval()(x) - teacher.student(x)).abs().max() > 1e-3 or ratios[0] == 1.0
    for then in ratios[1:]:
        state = {name: value.clone() for name, value in teacher.state_dict().items()}
        grown = grow(teacher, then, seed=int(10 * then))
        assert all(value.equal(state[name]) for name, value in teacher.state_dict().items())
        check_same(teacher, grown, images(kind, 4))
        before, after = widths(teacher), widths(grown)
        assert all(after[name] >= before[name] for name in before)
        assert (before == after) == (then == teacher.recipe["ratio"])
        assert grown.recipe["grown"] == [*teacher.recipe["grown"], [teacher.recipe["ratio"], teacher.recipe["seed"]]]
        teacher = scrambled(grown, x).eval()
        torch.testing.assert_close(fold(teacher)(x), teacher.student(x), rtol=1e-12, atol=1e-12)


def test_copies_part_after_growth(randomise: Randomise) -> None:
    x = images(Mixed)
    grown = grow(trained(randomise(Mixed().double()), x, 2.0), 4.0)
    weight = grown.composition.weights.get_parameter("first.weight")
    assert len(weight.flatten(1).unique(dim=0)) == len(weight) / 2
    step(grown, x)
    assert len(weight.flatten(1).unique(dim=0)) == len(weight)


def test_ratios_by_glob_and_what_is_excluded(randomise: Randomise) -> None:
    x = images(Activations)
    teacher = expand(randomise(Activations().double()), {"v.*": 2.0}, (x,), exclude=["k.*"], verify=False)
    grown = grow(scrambled(teacher, x), {"v.*": 2.0, "gate.*": 3.0})
    check_same(teacher, grown, x)
    sizes = [each.composition.weights.get_parameter("gate.weight").shape for each in (teacher, grown)]
    assert sizes == [(6, 14), (18, 14)]
    with pytest.raises(ArgumentError, match=r"the channels of v.weight\[0\] would become narrower, 7 instead of 14"):
        grow(teacher, {"gate.*": 3.0})


def test_statistics_need_a_multiple_of_the_copies(randomise: Randomise) -> None:
    x = images(Mixed)
    grown = grow(trained(randomise(Mixed().double()), x, 1.5), 3.0)
    assert grown.composition.weights.get_parameter("mix.weight").shape == (32, 32)  # 1.5 had become 2
    assert grown.composition.weights.get_parameter("qkv.weight").shape == (96, 32)
    assert any("one ratio, a multiple of the 2 that they have" in note for note in grown.report().notes)


@pytest.mark.parametrize("kind", [Mixed, Activations, Convolutions])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_as_exact_as_their_rounding(kind: type, dtype: torch.dtype) -> None:
    x = images(kind).to(dtype)
    teacher = trained(kind().to(dtype), x, 2.0).eval()
    grown = grow(teacher, 4.0)
    assert {parameter.dtype for parameter in grown.parameters()} == {dtype}
    assert not grown.training
    scale = float(teacher(x).detach().abs().max())
    torch.testing.assert_close(grown(x), teacher(x), rtol=0, atol=100 * torch.finfo(dtype).eps * scale)
    assert grown.student(x).equal(teacher.student(x))
    assert all(v.equal(fold(grown).state_dict()[name]) for name, v in fold(teacher).state_dict().items())


def test_a_teacher_that_was_cast_grows(randomise: Randomise) -> None:
    x = images(DigitNet)
    teacher = trained(randomise(DigitNet()), x.float(), 2.0).double()
    check_same(teacher, grow(teacher, 4.0), x)


def test_what_cannot_grow_says_why() -> None:
    x = torch.randn(6, 1, 6, 6)
    teacher = expand(DigitNet(), 4.0, (x,), verify=False)
    with pytest.raises(ArgumentError, match=r"channels of stem.weight\[0\] would become narrower, 8 instead of 16"):
        grow(teacher, 2.0)
    with pytest.raises(ArgumentError, match="must be a finite number >= 1"):
        grow(teacher, 0.5)
    with pytest.raises(ArgumentError, match="got DigitNet"):
        grow(DigitNet(), 2.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    other = copy.deepcopy(teacher)
    other.recipe["seed"] += 1
    with pytest.raises(ArgumentError, match="shares are not those that expand makes here"):
        grow(other, 8.0)
    teacher.composition.weights.get_submodule("head").bfloat16()
    with pytest.raises(ArgumentError, match="of one dtype on one device, the teacher has 2"):
        grow(teacher, 8.0)


def test_what_comes_out_wrong_is_refused(randomise: Randomise, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(Activations)
    teacher = trained(randomise(Activations().double()), x, 2.0)
    even = Widening.even

    def off(self: Widening, expr: Expr) -> Tensor:
        return even(self, expr) * (1.0 if self.base is None else 1.01)

    monkeypatch.setattr(Widening, "even", off)
    with pytest.raises(VerificationError, match=r"in eval mode.*expand the folded student by ratio=4"):
        grow(teacher, 4.0)


@pytest.mark.parametrize("kind", [DigitNet, Activations])
def test_a_grown_teacher_is_saved_loaded_and_grown_again(kind: type, tmp_path: Path) -> None:
    x = images(kind).float()
    path, model = tmp_path / "teacher.safetensors", kind()
    teacher = scrambled(grow(trained(model, x, 1.5), 2.0, seed=3), x)
    save(teacher, path)
    loaded = load(path, kind())
    assert loaded.recipe == teacher.recipe == description(path)["recipe"]
    assert loaded.recipe["grown"] == [[1.5, 0]]
    assert_same(teacher, loaded, x)
    first, second = grow(teacher, 4.0), grow(loaded, 4.0)
    assert_same(first, second, x)
    save(second, path)
    third = load(path, kind())
    assert third.recipe["grown"] == [[1.5, 0], [2.0, 3]]
    assert_same(first, third, x)


def test_files_from_before_growth_was_recorded(tmp_path: Path) -> None:
    x = images(DigitNet).float()
    path = tmp_path / "teacher.safetensors"
    teacher = trained(DigitNet(), x, 2.0)
    save(teacher, path)
    recipe = {key: value for key, value in teacher.recipe.items() if key != "grown"}
    rewrite(path, format=1, recipe=recipe)
    loaded = load(path, DigitNet())
    assert_same(teacher, loaded, x)
    check_same(loaded.double(), grow(loaded, 4.0), x.double())


def test_steps_that_a_file_lost_are_missed(tmp_path: Path) -> None:
    x = images(DigitNet).float()
    path = tmp_path / "teacher.safetensors"
    grown = grow(expand(DigitNet(), 2.0, (x,), verify=False), 4.0)
    save(grown, path)
    assert safetensors.torch.load_file(path).keys() == grown.state_dict().keys()
    rewrite(path, recipe={**grown.recipe, "grown": []})
    with pytest.raises(CheckpointError, match="widens in another way"):
        load(path, DigitNet())
