"""Rules and branches that a user brings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

import gpd_fx
from gpd_fx.composition import branches
from gpd_fx.composition.branches import BranchKind, Pointwise, PointwiseKernel, Sizes
from gpd_fx.errors import ArgumentError, VerificationError
from gpd_fx.kernels.compose.terms import OutputFilter, Term
from gpd_fx.rules import RULES, Entry, Kernel, Site, Value, rule_of
from gpd_fx.rules.notation import Einsum
from gpd_fx.verify.verification import relative_error


@torch.library.custom_op("gpd_fx_tests::gain", mutates_args=())
def gain(x: Tensor, factor: Tensor) -> Tensor:
    """Each channel times a factor of its own."""
    return x * factor[:, None, None]


@gain.register_fake
def _(x: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, factor = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]  torch's way
    return gradient * factor[:, None, None], (gradient * x).sum((0, 2, 3))


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


gain.register_autograd(_backward, setup_context=_keep)


class Gained(nn.Module):
    """Two convs with an op of one's own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 2)
        self.factor = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(gain(self.first(x), self.factor))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with patch.dict(RULES), patch.dict(branches.KINDS):
        yield
    rule_of.cache_clear()


IMAGE = (torch.randn(2, 3, 9, 8, dtype=torch.float64),)


@pytest.mark.parametrize(
    "rule", ["n c _ _, c -> n c _ _", Entry(Einsum("n c _ _, c -> n c _ _"))], ids=["line", "entry"]
)
def test_a_rule_lets_channels_through_an_op_of_ones_own(rule: str | Entry) -> None:
    model = Gained().double()
    before = gpd_fx.inspect_model(model, 2.0, IMAGE)
    assert {entry.op for entry in before.frozen} >= {"gpd_fx_tests.gain.default"}
    gpd_fx.register_rule(gain, rule)
    teacher = gpd_fx.expand(model, 2.0, IMAGE)
    report = teacher.report()
    assert report.coverage > before.coverage
    assert not [entry for entry in report.frozen if "gain" in entry.op]
    assert relative_error(model(*IMAGE), teacher(*IMAGE)) < 1e-12
    teacher(*IMAGE).sum().backward()
    model(*IMAGE).sum().backward()
    wide = teacher.composition.get_parameter("weights.factor")
    assert wide.shape == (10,)
    assert wide.grad is not None
    assert model.factor.grad is not None
    assert relative_error(model.factor.grad.sum(), wide.grad.sum()) < 1e-9


def test_a_wrong_rule_is_found_by_verification() -> None:
    gpd_fx.register_rule(torch.ops.aten.softmax.int, "* c -> * c", replace=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)).double()
    with pytest.raises(VerificationError, match="softmax"):
        gpd_fx.expand(model, 2.0, (torch.randn(2, 3).double(),))


def test_an_op_of_another_library_is_named_in_full() -> None:
    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(5, 2, 1)
            self.offset = nn.Conv2d(3, 18, 3, padding=1)
            self.weight = nn.Parameter(torch.randn(5, 6, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(deform_conv2d(self.first(x), self.offset(x), self.weight, padding=(1, 1)))

    model = Deformed().double()
    assert "torchvision.deform_conv2d.default" in str(gpd_fx.inspect_model(model, 2.0, IMAGE))
    calls: list[str] = []

    def deformed(site: Site) -> Value:
        calls.append(site.op)
        return site.freeze_all("positions are data")

    gpd_fx.register_rule(torch.ops.torchvision.deform_conv2d, Entry(deformed, Kernel(groups="groups")))
    assert "positions are data" in str(gpd_fx.inspect_model(model, 2.0, IMAGE))
    assert set(calls) == {"torchvision.deform_conv2d.default"}


@pytest.mark.parametrize(
    ("op", "rule", "message"),
    [
        (torch.ops.aten.relu.default, "a -> a", r"aten\.relu\.default has a rule already; pass replace=True"),
        (torch.ops.aten.linalg_inv, "* a ->", r"linalg_inv has the overloads default, out; pass one"),
        (torch.relu, "a -> a", "op is .*relu.*, not an overload such as"),
        ("aten.relu", "a -> a", "op is 'aten.relu', not an overload"),
        (torch.ops.aten.linalg_inv.default, "* a ! -> a", r"'\* a ! -> a' of aten\.linalg_inv\.default cannot be read"),
        (torch.ops.aten.linalg_inv.default, 3, "is 3; pass a line of the notation or a function"),
    ],
)
def test_what_is_no_rule(op: object, rule: str, message: str) -> None:
    rules = dict(RULES)
    with pytest.raises(ArgumentError, match=message):
        gpd_fx.register_rule(op, rule)
    assert rules == RULES


def test_replacing_a_rule() -> None:
    gpd_fx.register_rule(torch.ops.aten.relu.default, "... -> ...", replace=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    report = gpd_fx.inspect_model(model, 2.0, (torch.randn(2, 3),))
    assert not report.groups


class Centre(Pointwise):
    """The branch `1x1` once more."""

    name = "centre"


class Unknown(Pointwise):
    name = "unknown"

    def terms(self, scale: Tensor, theta: Mapping[str, Tensor]) -> tuple[Term, ...]:
        del scale
        return (theta["point"],)  # pyright: ignore[reportReturnType]  what is tested


class Changed(Pointwise):
    name = "changed"

    def terms(self, scale: Tensor, theta: Mapping[str, Tensor]) -> tuple[Term, ...]:
        return (OutputFilter(scale * 2, theta["point"], theta["filters"]),)


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()


def test_a_branch_from_outside() -> None:
    assert gpd_fx.register_branch(Centre) is Centre
    model = _net()
    teacher = gpd_fx.expand(model, 2.0, IMAGE, branches=["centre", "1x1-kxk"])
    assert teacher.report().branches["2.weight"] == ("kxk", "centre", "1x1-kxk")
    assert relative_error(model(*IMAGE), teacher(*IMAGE)) < 1e-12
    assert not teacher.report().left_by_kernels
    assert "Triton" not in str(teacher.report())


def test_the_report_says_which_layers_the_kernels_leave() -> None:
    """They have room for three output filters, so four of them go to torch's ops."""
    gpd_fx.register_branch(Centre)
    model = _net()
    teacher = gpd_fx.expand(model, 2.0, IMAGE, branches=["orepa", "centre"])
    report = teacher.report()
    reason = "its branches have 4 terms of the kind OutputFilter; the kernels have room for 3"
    assert report.left_by_kernels == {"0.weight": reason, "2.weight": reason}
    assert f"left to torch's ops by the Triton kernels\n  {reason} (0.weight, 2.weight)" in str(report)
    assert "## Left to torch's ops by the Triton kernels" in report.to_markdown()
    assert relative_error(model(*IMAGE), teacher(*IMAGE)) < 1e-12


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Unknown,
            "branch 'unknown': Tensor is no term that a kernel is composed of; its `terms` may return Out",
        ),
        (Changed, "branch 'changed': its terms must hold the tensors that it is given"),
    ],
)
def test_terms_that_no_kernel_knows(kind: type[BranchKind], message: str) -> None:
    gpd_fx.register_branch(kind)
    with pytest.raises(ArgumentError, match=message):
        gpd_fx.expand(_net(), 2.0, IMAGE, branches=[kind.name])


class Nameless(PointwiseKernel):
    name = "a:b"


class Half(BranchKind):
    name = "half"

    def fits(self, sizes: Sizes) -> str | None:
        del sizes
        return None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Pointwise, "a branch or a set called '1x1' already"),
        (Nameless, "Nameless needs a class attribute `name` .*, got 'a:b'"),
        (Half, "Half lacks terms, theta"),
        (Sizes, "pass a subclass of gpd_fx.composition.branches.BranchKind"),
        ("1x1", "pass a subclass of gpd_fx.composition.branches.BranchKind, got '1x1'"),
    ],
)
def test_what_is_no_branch(kind: type[BranchKind], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        gpd_fx.register_branch(kind)
