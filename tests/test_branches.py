"""Each branch's kernel against the sequence of torch ops that it stands for, run on an input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gpd_fx.composition.branches import (
    KINDS,
    MAIN,
    SETS,
    Sizes,
    cosine_filters,
    find_kind,
    resolve_branches,
)
from gpd_fx.composition.composition import Composition
from gpd_fx.errors import ArgumentError
from gpd_fx.kernels.compose.layout import KernelLayout
from gpd_fx.plan.parameter_plan import ParamPlan

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


class Case(NamedTuple):
    """A layer: sizes of a group, stride and dilation of every axis."""

    sizes: Sizes
    transposed: bool = False
    stride: int = 1
    dilation: int = 1

    @property
    def dims(self) -> int:
        return len(self.sizes.kernel)

    @property
    def layout(self) -> KernelLayout:
        return KernelLayout(self.sizes.groups, self.transposed, self.sizes.groups)

    @property
    def shape(self) -> tuple[int, ...]:
        g, o, i, k = self.sizes
        return (g * i, o, *k) if self.transposed else (g * o, i, *k)

    def conv(self, x: Tensor, kernel: Tensor, *, dense: bool = True) -> Tensor:
        """The layer with a canonical kernel; `dense=False`: stride and dilation 1, as for a 1x1 conv beside it."""
        stride, dilation = (self.stride, self.dilation) if dense else (1, 1)
        g = kernel.shape[0]
        if not self.dims:
            return functional.linear(x, kernel.squeeze(0))
        if self.transposed and dense:
            weight = kernel.transpose(1, 2).flatten(0, 1)
            return TRANSPOSED[self.dims](x, weight, stride=stride, groups=g, dilation=dilation)
        return CONV[self.dims](x, kernel.flatten(0, 1), stride=stride, groups=g, dilation=dilation)

    def pointwise(self, x: Tensor, kernel: Tensor) -> Tensor:
        """A 1x1 conv with a (g, o, i) kernel."""
        return self.conv(x, kernel.reshape(*kernel.shape, *(1,) * self.dims), dense=False)

    def output(self, x: Tensor) -> list[int]:
        """The spatial sizes of the layer's output."""
        g, _, i, k = self.sizes
        return list(self.conv(x[:1], x.new_zeros(g, 1, i, *k)).shape[2:])

    def through_tap(self, y: Tensor, sizes: list[int], axes: list[int]) -> Tensor:
        """What reaches the output through the one tap of `axes`, given their stride and dilation."""
        for axis in axes:
            dim, n = axis + 2, self.sizes.kernel[axis]
            offset = (n - 1) // 2 * self.dilation
            if self.transposed:
                at = torch.arange(y.shape[dim]) * self.stride + offset
                shape = [*y.shape[:dim], sizes[axis], *y.shape[dim + 1 :]]
                y = y.new_zeros(shape).index_copy(dim, at, y)
            else:
                y = y.index_select(dim, torch.arange(sizes[axis]) * self.stride + offset)
        return y

    def depthwise(self, x: Tensor, filters: Tensor) -> Tensor:
        """A depthwise conv with the layer's stride and dilation, `filters` (channels, *k)."""
        return self.conv(x, filters[:, None, None])

    def input(self) -> Tensor:
        g, _, i, k = self.sizes
        return torch.randn(2, g * i, *(n * self.dilation + 5 + axis for axis, n in enumerate(k)), dtype=torch.float64)


def case(g: int, o: int, i: int, *k: int, t: bool = False, s: int = 1, d: int = 1) -> object:
    kind = "linear" if not k else f"conv{'T' if t else ''}{len(k)}d"
    name = f"{kind}-{'x'.join(map(str, k))}-g{g}o{o}i{i}" + (f"-s{s}" if s > 1 else "") + (f"-d{d}" if d > 1 else "")
    return pytest.param(Case(Sizes(g, o, i, k), t, s, d), id=name)


CASES = [
    case(1, 5, 9, 3),
    case(2, 3, 4, 4, s=2, d=2),
    case(1, 17, 19, 3, 3, s=2),
    case(1, 5, 4, 1, 7),
    case(1, 4, 5, 3, 5, d=3),
    case(1, 6, 3, 2, 2, s=2),
    case(3, 2, 3, 4, 3, s=2, d=2),
    case(6, 1, 1, 5, 5, s=2),
    case(7, 1, 1, 2, 4),
    case(3, 2, 1, 3, 3),
    case(1, 3, 1, 3, 3),
    case(1, 4, 3, 3, 2, 1),
    case(2, 2, 3, 2, 3, 4, s=2),
    case(1, 9, 8, 1, 1, s=2),
    case(2, 17, 18, 1),
    case(1, 11, 25),
    case(1, 1, 3),
    case(1, 4, 3, 3, t=True),
    case(2, 3, 4, 4, 4, t=True, s=2),
    case(1, 3, 4, 3, 2, t=True, s=3, d=2),
    case(5, 1, 1, 3, 3, t=True, s=2),
    case(2, 3, 2, 2, 3, 2, t=True, s=2),
    case(2, 17, 16, 1, 1, t=True, s=2),
]
SEQUENCES: dict[str, Callable[[Case, Tensor, Mapping[str, Tensor]], Tensor]] = {}


def sequence(name: str) -> Callable[[Callable[[Case, Tensor, Mapping[str, Tensor]], Tensor]], None]:
    def register(function: Callable[[Case, Tensor, Mapping[str, Tensor]], Tensor]) -> None:
        SEQUENCES[name] = function

    return register


@sequence("1x1")
def _(layer: Case, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
    return layer.through_tap(layer.pointwise(x, theta["point"]), layer.output(x), list(range(layer.dims)))


@sequence("1x1-kxk")
def _(layer: Case, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
    return layer.conv(layer.pointwise(x, theta["point"]), theta["kernel"])


@sequence("1x1-avg")
def _(layer: Case, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
    y = layer.pointwise(x, theta["point"])
    if layer.dilation == 1 and not layer.transposed:
        return POOL[layer.dims](y, layer.sizes.kernel, stride=(layer.stride,) * layer.dims)
    return layer.depthwise(y, y.new_full((y.shape[1], *layer.sizes.kernel), 1 / math.prod(layer.sizes.kernel)))


@sequence("dwsep")
def _(layer: Case, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
    return layer.pointwise(layer.depthwise(x, theta["filters"].flatten(0, 1)), theta["point"])


@sequence("1xk+kx1")
def _(layer: Case, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(())
    for name, line in theta.items():
        axis = int(name[-1])
        others = [a for a in range(layer.dims) if a != axis]
        kernel = line.reshape(*line.shape[:3], *(layer.sizes.kernel[a] if a == axis else 1 for a in range(layer.dims)))
        stride = [layer.stride if a == axis else 1 for a in range(layer.dims)]
        g = kernel.shape[0]
        if layer.transposed:
            weight = kernel.transpose(1, 2).flatten(0, 1)
            y = TRANSPOSED[layer.dims](x, weight, stride=stride, groups=g, dilation=layer.dilation)
        else:
            y = CONV[layer.dims](x, kernel.flatten(0, 1), stride=stride, groups=g, dilation=layer.dilation)
        total = total + layer.through_tap(y, layer.output(x), others)
    return total


@sequence("prior")
def _(layer: Case, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
    y = layer.pointwise(x, theta["point"])
    table = cosine_filters(layer.sizes.kernel)
    return layer.depthwise(y, torch.stack([table[c % len(table)] for c in range(y.shape[1])]))


@sequence("lowrank")
def _(layer: Case, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
    return layer.conv(layer.pointwise(x, theta["down"]), theta["up"])


def compose_one(layer: Case, branches: list[str], *, seed: int = 0) -> tuple[Composition, Tensor]:
    """A composition of one unwidened weight, with all of its tensors random."""
    torch.manual_seed(seed)
    weight = torch.randn(layer.shape, dtype=torch.float64)
    plan = ParamPlan.identity("w", layer.shape, layer.layout)
    composition = Composition([plan], {"w": weight}, {"w": True}, branches)
    for parameter in composition.branches.parameters():
        nn.init.normal_(parameter)
    return composition, weight


def theta_of(composition: Composition, branch: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The scale, and the other tensors with the dimension of groups in front."""
    tree = composition.branches.get_submodule(f"w.{KINDS[branch]().identifier}")
    layout = composition.plans[0].kernel
    assert layout is not None
    theta = {name: p.detach().unflatten(0, (layout.groups, -1)) for name, p in tree.named_parameters()}
    return theta.pop("v").flatten(), theta


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("layer", CASES)
@pytest.mark.parametrize("branch", list(KINDS))
def test_kernel_is_the_sequence_of_ops(layer: Case, branch: str) -> None:
    composition, weight = compose_one(layer, [branch])
    if KINDS[branch]().fits(layer.sizes) is not None:
        assert composition.branch_names("w") == (MAIN,)
        assert list(composition.skipped["w"]) == [branch]
        return
    assert composition.branch_names("w") == (MAIN, branch)
    v, theta = theta_of(composition, branch)
    x = layer.input()
    extra = SEQUENCES[branch](layer, x, theta)
    scaled = extra * v.reshape(-1, *(1,) * layer.dims)
    assert extra.abs().max() > 1e-3
    merged = composition.merged()["w"]
    close(layer.conv(x, layer.layout.canonical(merged)), layer.conv(x, layer.layout.canonical(weight)) + scaled)
    close(composition.teacher()["w"], merged)


@pytest.mark.parametrize("layer", CASES)
def test_all_branches_together_are_the_sum_of_each(layer: Case) -> None:
    composition, weight = compose_one(layer, list(KINDS))
    expected = weight.clone()
    for branch in composition.branch_names("w")[1:]:
        alone = Composition([ParamPlan.identity("w", layer.shape, layer.layout)], {"w": weight}, {}, [branch])
        alone.load_state_dict({k: v for k, v in composition.state_dict().items() if k in alone.state_dict()})
        expected += alone.merged()["w"] - weight
    close(composition.merged()["w"], expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_exact_at_the_borders(mode: Literal["zeros", "reflect", "replicate", "circular"]) -> None:
    """The composed layer equals branches that all see the padded input: 1x1 then 3x5, without padding in between."""
    layer = Case(Sizes(1, 6, 4, (3, 5)), stride=2)
    composition, weight = compose_one(layer, ["1x1-kxk"])
    conv = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(2, 3), padding_mode=mode, bias=False, dtype=torch.float64)
    conv.weight = nn.Parameter(composition.merged()["w"])
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    padded = functional.pad(x, (3, 3, 2, 2), mode="constant" if mode == "zeros" else mode)
    v, theta = theta_of(composition, "1x1-kxk")
    extra = layer.conv(layer.pointwise(padded, theta["point"]), theta["kernel"])
    close(conv(x), layer.conv(padded, weight[None]) + v[:, None, None] * extra)


@pytest.mark.parametrize(
    ("branch", "sizes", "reason"),
    [
        ("1x1", Sizes(1, 4, 4, (1, 1)), "one tap"),
        ("1x1-kxk", Sizes(1, 4, 4, (1,)), "one tap"),
        ("1x1-avg", Sizes(1, 4, 4, (1, 1)), "one tap"),
        ("prior", Sizes(1, 4, 4, ()), "no kernel axes"),
        ("dwsep", Sizes(8, 1, 1, (3, 3)), "depthwise"),
        ("dwsep", Sizes(1, 4, 4, (1, 1)), "one tap"),
        ("1xk+kx1", Sizes(1, 4, 4, (1, 7)), "two kernel axes longer than 1, has 1"),
        ("1xk+kx1", Sizes(1, 4, 4, ()), "two kernel axes longer than 1, has 0"),
        ("lowrank", Sizes(1, 4, 4, (3, 2)), "3x2"),
        ("lowrank", Sizes(8, 1, 1, (1, 1)), "one weight a channel"),
    ],
)
def test_a_branch_that_does_not_fit_says_why(branch: str, sizes: Sizes, reason: str) -> None:
    assert reason in (KINDS[branch]().fits(sizes) or "")


def test_default_set_of_a_conv_and_of_a_linear_layer() -> None:
    conv = [name for name in SETS["orepa"][1:] if KINDS[name]().fits(Sizes(1, 8, 8, (3, 3))) is None]
    linear = [name for name in SETS["orepa"][1:] if KINDS[name]().fits(Sizes(1, 8, 8, ())) is None]
    assert conv == ["1x1", "1x1-kxk", "1x1-avg", "dwsep", "prior"]
    assert linear == ["lowrank"]


@pytest.mark.parametrize("kernel", [(3,), (4,), (1, 7), (3, 5), (2, 2, 3)])
def test_cosine_filters_are_an_orthonormal_basis_without_the_mean(kernel: tuple[int, ...]) -> None:
    filters = cosine_filters(kernel)
    assert filters.shape == (math.prod(kernel) - 1, *kernel)
    flat = torch.cat([filters.flatten(1), filters.new_full((1, filters[0].numel()), filters[0].numel() ** -0.5)])
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat), dtype=torch.float64), rtol=0, atol=1e-14)


def test_cosine_filters_start_with_low_frequencies() -> None:
    first = cosine_filters((3,))[0]
    close(first, torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64) / math.sqrt(2))


@pytest.mark.parametrize("kernel", [(), (1, 1), (4,), (3, 3), (3, 2, 2)])
@pytest.mark.parametrize("branch", list(KINDS))
def test_random_kernels_have_a_sensible_scale(kernel: tuple[int, ...], branch: str) -> None:
    """The kernel that a branch starts from maps unit variance to about unit variance (1/taps for the average)."""
    wide = Case(Sizes(2, 96, 64, kernel))
    if KINDS[branch]().fits(wide.sizes) is not None:
        return
    plan = ParamPlan.identity("w", wide.shape, wide.layout)
    composition = Composition([plan], {"w": torch.zeros(wide.shape)}, {}, [branch])
    v = composition.branches.get_parameter(f"w.{KINDS[branch]().identifier}.v")
    nn.init.ones_(v)
    power = composition.merged()["w"].square().sum().item() / (wide.sizes.groups * wide.sizes.outputs)
    expected = 1 / wide.sizes.taps if branch == "1x1-avg" else 1.0
    assert expected / 1.6 <= power <= expected * 1.6


@pytest.mark.parametrize("given", [None, [], (), "kxk", ["kxk"]])
def test_no_extra_branches(given: str | list[str] | None) -> None:
    assert resolve_branches(given) == ("kxk",)


def test_sets_names_and_widths() -> None:
    assert resolve_branches("orepa") == SETS["orepa"]
    assert resolve_branches(["dwsep", "kxk", "dwsep", "1x1-kxk:16"]) == ("kxk", "dwsep", "1x1-kxk:16")
    assert resolve_branches(["orepa", "1xk+kx1"]) == (*SETS["orepa"], "1xk+kx1")
    assert resolve_branches(resolve_branches("orepa")) == SETS["orepa"]
    assert find_kind("1x1-kxk:5").theta(Sizes(1, 8, 9, (3,)))["kernel"].shape == (1, 8, 5, 3)
    assert find_kind("lowrank").theta(Sizes(2, 32, 16, ()))["down"].shape == (2, 2, 16)
    assert find_kind("lowrank").theta(Sizes(1, 3, 64, ()))["down"].shape == (1, 1, 64)
    assert resolve_branches(["lowrank:full", "1x1-kxk:full"]) == ("kxk", "lowrank:full", "1x1-kxk:full")
    wide = find_kind("1x1-kxk:full").theta(Sizes(2, 8, 9, (3,)))
    assert (wide["point"].shape, wide["kernel"].shape) == ((2, 9, 9), (2, 8, 9, 3))
    assert find_kind("lowrank:full").theta(Sizes(1, 3, 64, ()))["up"].shape == (1, 3, 64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("orpea", "no branch 'orpea'; did you mean 'orepa'"),
        (["1x1-ave"], "did you mean '1x1-avg'"),
        (["zzz"], "Known: orepa, kxk, 1x1, 1x1-kxk"),
        ([""], "no branch ''"),
        (["lowrank:0"], "whole number above 0"),
        (["lowrank:-3"], "whole number above 0"),
        (["lowrank:x"], "whole number above 0"),
        (["lowrank:"], "whole number above 0"),
        (["1x1-kxk:FULL"], "or '1x1-kxk:full'"),
        (["1x1:full"], "no inner width"),
        (["1x1-kxk", "1x1-kxk:full"], "given twice"),
        (["dwsep:4"], "no inner width"),
        (["lowrank:2", "lowrank:4"], "given twice"),
        ([3], "a branch is a name, got 3"),
    ],
)
def test_bad_branches(given: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=r"^branches: ") as caught:
        resolve_branches(given)
    assert message in str(caught.value)
