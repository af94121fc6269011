"""Growth in steps: 2 then 4 computes what 2 computed, and folds to the same student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpd_fx import DynamicTeacher, GPDLoss, expand, fold, grow, load, save
from gpd_fx.digits import DigitNet
from gpd_fx.errors import ArgumentError, VerificationError

Randomise = Callable[[nn.Module], nn.Module]


class Mixed(nn.Module):
    """Groups, concatenation, a tied layer, layer norm, and if wanted attention whose heads widen."""

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        self.attention = attention
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Linear(8, 8)
        self.ln = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24).requires_grad_(attention)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.norm(torch.cat([x, self.grouped(x)], 1)).flatten(2).transpose(1, 2)
        x = x + self.mix(torch.nn.functional.gelu(self.mix(x)))
        if not self.attention:
            return self.head(self.ln(x).mean(1))
        q, k, v = self.qkv(self.ln(x)).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-3, -2)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


def trained(model: nn.Module, x: Tensor, ratio: float) -> DynamicTeacher:
    """A teacher whose copies and branches have parted."""
    teacher = expand(model, ratio, (x,), verify=False).double().train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        teacher_out, student_out = teacher.both(x)
        GPDLoss()(student_out, teacher_out, torch.arange(len(x)) % 5).total.backward()
        optimizer.step()
    return teacher


@pytest.mark.parametrize(("first", "then"), [(2.0, 4.0), (2.0, 6.0), (1.0, 2.0), (2.0, 2.0)])
@pytest.mark.parametrize("kind", [DigitNet, Mixed])
def test_a_grown_teacher_computes_the_same(first: float, then: float, kind: type, randomise: Randomise) -> None:
    model = randomise(kind().double())
    x = torch.randn(6, 1 if kind is DigitNet else 3, 6, 6, dtype=torch.float64)
    teacher = trained(model, x, first)
    assert (teacher.eval()(x) - teacher.student(x)).abs().max() > 1e-3 or first == 1.0
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    grown = grow(teacher, then)
    assert all(value.equal(state[name]) for name, value in teacher.state_dict().items())
    for training in (False, True):
        wanted, found = (each.train(training)(x) for each in (teacher, grown))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
        teacher.load_state_dict(state)
    narrow, wide = fold(teacher).state_dict(), fold(grow(teacher, then)).state_dict()
    assert narrow.keys() == wide.keys()
    assert all(value.equal(wide[name]) for name, value in narrow.items())
    sizes = [each.composition.weights.get_parameter("head.weight").shape[1] for each in (teacher, grown)]
    assert sizes[1] == sizes[0] * then / first


def test_it_trains_and_folds_on(randomise: Randomise) -> None:
    x = torch.randn(6, 1, 6, 6, dtype=torch.float64)
    grown = grow(trained(randomise(DigitNet().double()), x, 2.0), 4.0).train()
    teacher_out, student_out = grown.both(x)
    GPDLoss()(student_out, teacher_out, torch.arange(6)).total.backward()
    assert all(parameter.grad is not None for parameter in grown.parameters())
    images = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(fold(grown.eval())(images), grown.student(images))


def test_float32_is_as_exact_as_its_rounding() -> None:
    x = torch.randn(6, 1, 6, 6)
    teacher = expand(DigitNet(), 2.0, (x,), verify=False).eval()
    grown = grow(teacher, 4.0)
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float32}
    assert not grown.training
    torch.testing.assert_close(grown(x), teacher(x), rtol=1e-4, atol=1e-5)
    assert grown.student(x).equal(teacher.student(x))


def test_what_cannot_grow_says_why() -> None:
    x = torch.randn(6, 1, 6, 6)
    teacher = expand(DigitNet(), 4.0, (x,), verify=False)
    with pytest.raises(ArgumentError, match="would become narrower along dimension 0"):
        grow(teacher, 2.0)
    with pytest.raises(ArgumentError, match="got DigitNet"):
        grow(DigitNet(), 2.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    teacher.composition.weights.get_submodule("head").bfloat16()
    with pytest.raises(ArgumentError, match="of one dtype on one device, the teacher has 2"):
        grow(teacher, 8.0)


def test_shares_within_the_graph_are_refused(randomise: Randomise) -> None:
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    teacher = trained(randomise(Mixed(attention=True).double()), x, 2.0)
    with pytest.raises(VerificationError, match="expand the folded student by ratio=4"):
        grow(teacher, 4.0)


def test_a_grown_teacher_is_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(6, 1, 6, 6)
    grown = grow(expand(DigitNet(), 2.0, (x,), verify=False), 4.0).eval()
    save(grown, tmp_path / "teacher.safetensors")
    assert load(tmp_path / "teacher.safetensors", DigitNet()).eval()(x).equal(grown(x))
