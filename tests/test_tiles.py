"""The tile kernels under triton's interpreter: the same values and gradients as the reference by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gpd_fx
from gpd_fx.kernels.compose import launch, recipe
from gpd_fx.kernels.compose.compose import (
    InputFilter,
    Layer,
    Line,
    OutputFilter,
    Product,
    Term,
    compose,
)
from gpd_fx.kernels.compose.layout import Cut, KernelLayout, Slice
from gpd_fx.kernels.compose.reference import compose_reference
from gpd_fx.kernels.compose.tables import Blocks
from tests.tiles import Traffic, interpreted, traffic

# triton 3.6 makes numbers of arrays in a way that numpy warns about
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
KINDS = ("output", "input", "product", "lines")
SHAPES = {
    "dense": (KernelLayout(), (17, 19, 2, 2)),
    "3x3": (KernelLayout(), (5, 18, 3, 3)),
    "7x7": (KernelLayout(), (4, 17, 7, 7)),  # more taps than a tile has lines
    "several tiles": (KernelLayout(), (35, 70, 2, 1)),
    "1x1": (KernelLayout(), (18, 33, 1, 1)),
    "linear": (KernelLayout(), (20, 65)),
    "stem": (KernelLayout(), (18, 3, 3, 2)),
    "depthwise": (KernelLayout(70), (70, 1, 3, 2)),
    "grouped": (KernelLayout(2), (36, 18, 3)),
    "grouped, few": (KernelLayout(4), (16, 3, 2, 2)),
    "transposed": (KernelLayout(1, True), (18, 5, 2, 3)),
    "transposed, grouped": (KernelLayout(2, True), (8, 6, 2, 2)),
    "3d": (KernelLayout(), (4, 18, 2, 3, 1)),
}


@pytest.fixture(autouse=True)
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes the kernels, and they run under the interpreter."""
    interpreted()
    monkeypatch.setattr(launch, "usable", lambda tensors: True)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def terms(layout: KernelLayout, shape: Sequence[int], kinds: Sequence[str], width: int = 5) -> tuple[Term, ...]:
    g, o, i, *k = layout.canonical_shape(shape)
    found: list[Term] = []
    for kind in kinds if k else {*kinds} & {"product"}:
        if kind == "output":
            found += [OutputFilter(weight(g, o), weight(g, o, i), torch.randn(g, o, *k)) for _ in range(3)]
        elif kind == "input":
            found.append(InputFilter(weight(g, o), weight(g, o, i), weight(g, i, *k)))
        elif kind == "product":
            found.append(Product(weight(g, o), weight(g, width, i), weight(g, o, width, *k)))
        else:
            found += [Line(weight(g, o), weight(g, o, i, n), axis) for axis, n in enumerate(k)]
    return tuple(found)


def half(size: int, groups: int = 1) -> tuple[Cut, int]:
    """A slice that leaves about half of each group, and of the groups."""
    kept, length = -(-groups // 2), -(-size // groups // 2)
    return Cut(groups, kept, length), kept * length


def layer_of(name: str, kinds: Sequence[str], alpha: Sequence[int] = (0, 1), width: int = 5) -> Layer:
    layout, shape = SHAPES[name]
    (first, rows), (second, columns) = half(shape[0], layout.groups), half(shape[1])
    rest: tuple[Slice, ...] = (None,) * (len(shape) - 2)
    factors = [torch.rand(n) + 0.5 if d in alpha else None for d, n in enumerate(shape)]
    made = terms(layout, shape, kinds, width)
    return Layer(weight(*shape), layout, made, tuple(factors), (first, second, *rest), (rows, columns, *shape[2:]))


def bare(shape: Sequence[int], scaled: Sequence[int], cut: Sequence[int]) -> Layer:
    """A layer without terms."""
    slices = [half(n)[0] if d in cut else None for d, n in enumerate(shape)]
    sizes = [half(n)[1] if d in cut else n for d, n in enumerate(shape)]
    factors = [torch.rand(n) + 0.5 if d in scaled else None for d, n in enumerate(shape)]
    return Layer(weight(*shape), None, (), tuple(factors), tuple(slices), tuple(sizes))


def tensors(layers: Sequence[Layer]) -> list[Tensor]:
    return [t for layer in layers for t in (layer.weight, *(t for term in layer.terms for t in term.tensors))]


def cast(layer: Layer, dtype: torch.dtype, device: str | torch.device | None = None) -> Layer:
    """The same layer with tensors of its own in another dtype, and on another device where one is given."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype).requires_grad_(tensor.requires_grad)

    moved = tuple(
        replace(term, **{name: move(t) for name, t in vars(term).items() if isinstance(t, Tensor)})
        for term in layer.terms
    )
    alpha = tuple(None if a is None else a.to(device, dtype) for a in layer.alpha)
    return replace(layer, weight=move(layer.weight), terms=moved, alpha=alpha)


def worst(layers: Sequence[Layer], teacher: bool = True, student: bool = True) -> float:
    """The largest error of a value or gradient, relative to its tensor's largest element, against float64."""
    exact = [cast(layer, torch.float64) for layer in layers]
    found = [t for side in compose(layers, teacher, student) for t in side]
    expected = [t for side in compose_reference(exact, teacher, student) for t in side]
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in found]
    wanted = [[t for t in tensors(side) if t.requires_grad] for side in (layers, exact)]
    found += torch.autograd.grad(found, wanted[0], upstream, materialize_grads=True, allow_unused=True)
    doubles = [t.double() for t in upstream]
    expected += torch.autograd.grad(expected, wanted[1], doubles, materialize_grads=True, allow_unused=True)
    errors = [0.0]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.isfinite().all()
        errors.append(((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item())
    return max(errors)


@pytest.mark.parametrize("kinds", [k for n in range(5) for k in itertools.combinations(KINDS, n)], ids="+".join)
@pytest.mark.parametrize("name", ["dense", "grouped, few"])
def test_every_set_of_branches(name: str, kinds: tuple[str, ...]) -> None:
    with traffic() as found:
        assert worst([layer_of(name, kinds)]) <= 1e-6
    assert found.launches == ["compose_tiles", "differentiate_tiles"]


@pytest.mark.parametrize("name", SHAPES)
def test_every_form(name: str) -> None:
    with traffic() as found:
        assert worst([layer_of(name, KINDS)]) <= 1e-6
    assert found.launches == ["compose_tiles", "differentiate_tiles"]


def test_a_part_ends_where_a_chunk_does() -> None:
    with pytest.raises(ValueError, match=r"Blocks\(part=48\) must be a multiple of chunk=32"):
        replace(launch.BLOCKS, part=48)


@pytest.mark.parametrize("blocks", [launch.BLOCKS, launch.LARGE], ids=["usual", "large"])
def test_a_product_of_many_inner_channels(blocks: Blocks) -> None:
    with launch.trying(blocks, replace(blocks, part=32)), traffic() as found:  # 70 lines: one part
        assert worst([layer_of("several tiles", ("product",), width=67)]) <= 1e-6
    assert found.launches == ["compose_tiles", "differentiate_tiles"]
    with launch.trying(blocks, replace(blocks, part=32)), traffic() as found:
        assert worst([layer_of("dense", ("product",), width=13)]) <= 1e-6  # 68 lines in parts of 64
    assert found.launches == ["compose_tiles", "differentiate_tiles", "add_parts"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("blocks", [launch.BLOCKS, launch.LARGE], ids=["usual", "large"])
def test_sums_of_several_parts(blocks: Blocks, dtype: torch.dtype) -> None:
    """What sums over many outputs is made in parts, which one more launch adds."""
    names = ("several tiles", "grouped", "stem", "dense", "3x3", "linear")
    layers = [cast(layer_of(name, KINDS), dtype) for name in names]
    with launch.trying(blocks, replace(blocks, part=32)), traffic() as found:
        assert worst(layers) <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert found.launches == ["compose_tiles", "differentiate_tiles", "add_parts"]


@pytest.mark.parametrize(
    ("shape", "scaled", "cut"),
    [
        ((7,), (), (0,)),
        ((9, 4), (1,), (1,)),
        ((1, 5, 6), (2,), (2,)),
        ((3, 5, 6), (1,), (2,)),
        ((2, 5, 3, 6), (1,), (3,)),
        ((2, 5, 6, 3), (1, 2), (1, 2)),
        ((20, 17, 4), (0,), (1,)),
    ],
)
def test_layers_without_terms(shape: tuple[int, ...], scaled: tuple[int, ...], cut: tuple[int, ...]) -> None:
    with traffic() as found:
        assert worst([bare(shape, scaled, cut)]) <= 1e-6
    assert found.launches == ["compose_tiles", "differentiate_tiles"]


def test_half_precision() -> None:
    """Sums are in float32, so what comes out is off by one rounding: half a unit in the last place."""
    layers = [cast(layer_of(name, KINDS), torch.float16) for name in ("dense", "depthwise")]
    assert worst(layers) <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize(("teacher", "student"), [(True, False), (False, True)])
def test_one_network_alone(teacher: bool, student: bool) -> None:
    layers = [layer_of(name, KINDS) for name in ("dense", "stem")]
    assert worst(layers, teacher, student) <= 1e-6


def test_what_the_kernels_cannot_take_is_done_beside_them() -> None:
    indexed = replace(layer_of("dense", ("output",)), slices=(torch.tensor([3, 0, 2]), None, None, None), alpha=())
    indexed = replace(indexed, shape=(3, *indexed.weight.shape[1:]))
    trained = layer_of("stem", ("product",))
    g, o, i, *k = KernelLayout().canonical_shape(trained.weight.shape)
    trained = replace(trained, terms=(*trained.terms, OutputFilter(weight(g, o), weight(g, o, i), weight(g, o, *k))))
    assert worst([layer_of("dense", KINDS), indexed, trained, bare((6,), (), (0,))]) <= 1e-6


def test_only_what_is_needed() -> None:
    layer = layer_of("grouped, few", KINDS)
    product = next(term for term in layer.terms if isinstance(term, Product))
    (teacher,), _ = compose([layer], student=False)
    (reference,), _ = compose_reference([layer], student=False)
    for wanted in (product.scale, product.point, layer.terms[0].tensors[1]):
        mine, theirs = (torch.autograd.grad(t.sum(), wanted, retain_graph=True)[0] for t in (teacher, reference))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_a_teacher(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole composition, at uneven widths, against the same in plain torch."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.Conv2d(5, 5, (1, 2), groups=5), nn.Conv2d(5, 6, 1)),
        *(nn.GroupNorm(3, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )
    composition = gpd_fx.expand(model, ratio, (torch.randn(2, 3, 9, 9),), branches="orepa").composition
    with torch.no_grad():
        for parameter in composition.branches.parameters():
            parameter.add_(torch.randn_like(parameter))

    def results() -> list[Tensor]:
        composition.zero_grad()
        made = [t for side in composition() for t in side.values()]
        generator = torch.Generator().manual_seed(3)
        torch.autograd.backward(made, [torch.randn(t.shape, generator=generator) for t in made])
        return [*made, *(p.grad.clone() for p in composition.parameters() if p.grad is not None)]

    with traffic() as found:
        tiles = results()
    assert found.launches == ["compose_tiles", "differentiate_tiles"]
    monkeypatch.setattr(launch, "usable", lambda tensors: False)
    for mine, theirs in zip(tiles, results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 * max(1.0, theirs.abs().max().item()))


def test_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight and a product's kernel whose channels come last: what is made of them, and their gradients, lie so."""
    monkeypatch.setattr(recipe, "channels_last", lambda t: t.dim() == 4)  # on the CPU it never is
    layer = layer_of("dense", KINDS)
    lying = layer.weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    product = next(term for term in layer.terms if isinstance(term, Product))
    kernel = product.kernel.detach()[0].contiguous(memory_format=torch.channels_last)[None].requires_grad_()
    others = tuple(replace(t, kernel=kernel) if isinstance(t, Product) else t for t in layer.terms)
    moved = replace(layer, weight=lying, terms=others)
    (wide,), (narrow,) = compose([moved])
    (expected,), (smaller,) = compose_reference([layer])
    for mine, theirs in ((wide, expected), (narrow, smaller)):
        assert mine.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(wide, (lying, kernel), upstream)
    reference = torch.autograd.grad(expected, (layer.weight, product.kernel), upstream)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)
    for mine, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def layers_of(shapes: Sequence[tuple[int, ...]], kinds: Sequence[str]) -> list[Layer]:
    """Convs with their default inner widths, alpha on the inputs, and half of the channels the student's."""
    layers: list[Layer] = []
    for shape in shapes:
        (first, rows), (second, columns) = half(shape[0]), half(shape[1]) if shape[1] > 3 else (None, 3)
        made = terms(KernelLayout(), shape, kinds if shape[2] > 1 else ("product",), max(1, min(shape[:2]) // 8))
        alpha = (None, torch.rand(shape[1]), None, None) if shape[1] > 3 else (None,) * 4
        slices = (first, second, None, None)
        layers.append(Layer(weight(*shape), KernelLayout(), made, alpha, slices, (rows, columns, *shape[2:])))
        layers.append(bare((shape[0],), (), (0,)))
    return layers


def step(layers: Sequence[Layer]) -> tuple[Traffic, int]:
    """What a step of both passes moves, and the bytes of what it must read and write."""
    with traffic() as found:
        outputs = [t for side in compose(layers) for t in side]
        upstream = [torch.randn_like(t) for t in outputs]
        learnt = [t for t in tensors(layers) if t.requires_grad]
        gradients = list[Tensor | None](torch.autograd.grad(outputs, learnt, upstream, allow_unused=True))
    operands = [t for layer in layers for term in layer.terms for t in term.tensors]
    alphas = [a for layer in layers for a in layer.alpha if a is not None]
    made_new = [t for t in outputs if not any(t is layer.weight for layer in layers)]
    flowing = [u for t, u in zip(outputs, upstream, strict=True) if not any(t is layer.weight for layer in layers)]
    both = [*operands, *alphas] * 2  # read by both launches
    of_forward = [layer.weight for layer in layers] + made_new
    least = sum(t.nbytes for t in [*both, *of_forward, *flowing, *(g for g in gradients if g is not None)])
    return found, least


def test_launches_and_bytes_of_a_network() -> None:
    """A step takes two launches, and each moves little more than its inputs and outputs, each address once."""
    shapes = [(32, 3, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (64, 32, 1, 1)]
    with launch.trying(launch.LARGE, launch.LARGE):
        found, least = step(layers_of(shapes, ("output", "input", "product")))
    assert found.launches == ["compose_tiles", "differentiate_tiles"]
    assert least <= found.moved <= 1.1 * least
    assert found.requested <= 1.8 * least  # what every program asks for; most of it is still in the second-level cache


def test_bytes_behind_a_cache_much_smaller_than_the_layer() -> None:
    """What reads the same gradient runs close together: with the parts, a cache of a tenth of what moves is enough."""
    with launch.trying(launch.LARGE, replace(launch.LARGE, part=128)):
        found, least = step(layers_of([(136, 128, 3, 3)], ("output", "input", "product")))
    assert found.launches == ["compose_tiles", "differentiate_tiles", "add_parts"]
    assert found.from_memory(least // 10) <= 1.1 * least
