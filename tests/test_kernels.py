"""The grouped composition against its reference by autograd, and how it behaves as an operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

from gpd_fx.kernels.compose import plain
from gpd_fx.kernels.compose.compose import (
    InputFilter,
    Layer,
    Line,
    OutputFilter,
    Product,
    Term,
    compose,
)
from gpd_fx.kernels.compose.grouped import backward_op, compose_op
from gpd_fx.kernels.compose.layout import Cut, KernelLayout, Slice
from gpd_fx.kernels.compose.recipe import (
    Recipe,
    encode,
    flatten,
    parse,
)
from gpd_fx.kernels.compose.reference import compose_reference

KINDS = ("output", "input", "product", "lines")
SHAPES = {
    "3x3": (KernelLayout(), (6, 5, 3, 3)),
    "3x2": (KernelLayout(), (7, 4, 3, 2)),
    "1x1": (KernelLayout(), (6, 10, 1, 1)),
    "1d, grouped": (KernelLayout(2), (8, 3, 3)),
    "depthwise": (KernelLayout(6), (6, 1, 3, 3)),
    "transposed": (KernelLayout(1, True), (4, 6, 4, 4)),
    "3d, transposed, grouped": (KernelLayout(2, True), (4, 3, 2, 3, 2)),
    "linear": (KernelLayout(), (9, 20)),
}


def terms_of(
    layout: KernelLayout, shape: Sequence[int], kinds: Sequence[str], make: Callable[..., Tensor]
) -> list[Term]:
    g, o, i, *k = layout.canonical_shape(shape)
    terms: list[Term] = []
    for kind in kinds if k else {*kinds} & {"product"}:  # only a product has a meaning for a linear layer
        if kind == "output":  # two of them, one with a filter that is trained
            terms.append(OutputFilter(make(g, o), make(g, o, i), make(g, o, *k).detach()))
            terms.append(OutputFilter(make(g, o), make(g, o, i), make(g, o, *k)))
        elif kind == "input":
            terms.append(InputFilter(make(g, o), make(g, o, i), make(g, i, *k)))
        elif kind == "product":
            terms.append(Product(make(g, o), make(g, 3, i), make(g, o, 3, *k)))
            terms.append(Product(make(g, o), make(g, 1, i), make(g, o, 1, *k)))
        else:
            terms += [Line(make(g, o), make(g, o, i, n), axis) for axis, n in enumerate(k)]
    return terms


def slice_of(size: int, how: str) -> tuple[Slice, int]:
    """A slice of a dimension, and its length."""
    if size == 1 or how == "whole":
        return None, size
    if how == "index":
        index = torch.randperm(size)[: size // 2 + 1]
        return index, len(index)
    if how == "blocks" and size % 2 == 0:
        return Cut(2, 2, max(1, size // 4)), 2 * max(1, size // 4)
    return Cut(1, 1, size // 2 + 1), size // 2 + 1


def layer_of(
    name: str, kinds: Sequence[str], how: Sequence[str], dtype: torch.dtype = torch.float64, alpha: Sequence[int] = (1,)
) -> Layer:
    layout, shape = SHAPES[name]

    def make(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype).requires_grad_()

    parts = [slice_of(n, how[dim] if dim < len(how) else "whole") for dim, n in enumerate(shape)]
    factors = [torch.rand(n, dtype=dtype) + 0.5 if dim in alpha else None for dim, n in enumerate(shape)]
    slices, sizes = zip(*parts, strict=True)
    return Layer(make(*shape), layout, tuple(terms_of(layout, shape, kinds, make)), tuple(factors), slices, sizes)


def network(dtype: torch.dtype = torch.float64) -> list[Layer]:
    """Layers of all kinds, with branches and without, scaled and not, in one call."""
    bare = Layer(torch.randn(5, dtype=dtype).requires_grad_(), None, (), (None,), (Cut(1, 1, 3),), (3,))
    whole = Layer(torch.randn(5, 2, dtype=dtype).requires_grad_(), None, (), (None, None), (None, None), (5, 2))
    scaled = Layer(torch.randn(4, dtype=dtype).requires_grad_(), None, (), (torch.rand(4).to(dtype),), (None,), (4,))
    made = [layer_of(name, KINDS, ("cut", "index"), dtype) for name in SHAPES]
    return [bare, *made, whole, layer_of("linear", (), ("blocks",), dtype), scaled]


def inputs(layers: Sequence[Layer]) -> Iterator[Tensor]:
    for layer in layers:
        yield layer.weight
        yield from (tensor for term in layer.terms for tensor in term.tensors)


def gradients(
    run: Callable[..., tuple[list[Tensor], list[Tensor]]], layers: Sequence[Layer], **flags: bool
) -> list[Tensor]:
    """Values, then gradients of something that depends on all of them."""
    outputs = [tensor for side in run(layers, **flags) for tensor in side]
    wanted = [tensor for tensor in inputs(layers) if tensor.requires_grad]
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, upstream, materialize_grads=True, allow_unused=True)]


def agree(layers: Sequence[Layer], rtol: float = 1e-12, **flags: bool) -> None:
    found, expected = gradients(compose, layers, **flags), gradients(compose_reference, layers, **flags)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=rtol * max(scale, 1.0))


@pytest.fixture(params=[1, 700, plain.CHUNK], ids=lambda n: f"chunk{n}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Scratch for one row, for some rows or groups, and for everything."""
    monkeypatch.setattr(plain, "CHUNK", request.param)
    return request.param


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("kinds", [k for n in range(5) for k in itertools.combinations(KINDS, n)], ids="+".join)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name: str, kinds: tuple[str, ...]) -> None:
    agree([layer_of(name, kinds, ("cut", "cut"))])


@pytest.mark.parametrize("alpha", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("how", list(itertools.product(("whole", "cut", "blocks", "index"), repeat=2)), ids="-".join)
def test_every_slice_and_factor(how: tuple[str, str], alpha: tuple[int, ...]) -> None:
    for name, kinds in itertools.product(("3x3", "transposed", "linear"), ((), ("output", "product"))):
        agree([layer_of(name, kinds, how, alpha=alpha)])


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)], ids=str)
def test_a_network_in_one_call(flags: tuple[bool, bool]) -> None:
    agree(network(), teacher=flags[0], student=flags[1])


def test_a_product_that_is_multiplied_by_convs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks by convs, and a last one that is too small for them."""
    o, c, i, k = 80, 65, 1025, (3, 2)

    def make(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64).requires_grad_()

    product = Product(make(1, o), make(1, c, i), make(1, o, c, *k))
    alpha = (None, torch.rand(i, dtype=torch.float64), None, None)
    slices = (Cut(1, 1, 41), Cut(1, 1, 500), None, None)
    monkeypatch.setattr(plain, "CHUNK", 34 * i * 6 * 8)
    by_conv: list[bool] = []
    choose = plain._by_conv  # pyright: ignore[reportPrivateUsage]

    def noted(rows: Tensor, matrix: Tensor) -> bool:
        by_conv.append(choose(rows, matrix))
        return by_conv[-1]

    monkeypatch.setattr(plain, "_by_conv", noted)
    agree([Layer(make(o, i, *k), KernelLayout(), (product,), alpha, slices, (41, 500, *k))])
    assert by_conv[:3] == [True, True, False]


@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_of_a_large_layer(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than fit into one chunk of the usual size, and a last chunk that is not full."""
    monkeypatch.setitem(SHAPES, "large", (KernelLayout(), (75, 250, 3, 3)))
    monkeypatch.setattr(plain, "CHUNK", plain.CHUNK // 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    agree([layer_of("large", KINDS, ("cut", "cut"))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """As far from the reference as rounding explains: it rounds in another order."""
    torch.manual_seed(0)
    rtol = 2e-6 if dtype is torch.float32 else 40 * torch.finfo(dtype).eps
    agree(network(dtype), rtol)


def test_gradcheck() -> None:
    layers = [layer_of("3x2", KINDS, ("cut", "index"))]
    wanted = [tensor for tensor in inputs(layers) if tensor.requires_grad]

    def run(*given: Tensor) -> list[Tensor]:
        del given  # the same tensors, which gradcheck changes in place
        return [tensor for side in compose(layers) for tensor in side]

    assert torch.autograd.gradcheck(run, wanted)


def test_only_what_is_needed() -> None:
    """Each tensor alone, through each output alone, gets the gradient that it gets among all."""
    for name, kinds in itertools.product(("3x3", "depthwise"), KINDS):
        layer = layer_of(name, (kinds,), ("cut", "cut"))
        tensors = [tensor for tensor in inputs([layer]) if tensor.requires_grad]
        for side in (0, 1):
            together = torch.autograd.grad(compose([layer])[side][0].sin().sum(), tensors)
            for tensor, expected in zip(tensors, together, strict=True):
                alone = torch.autograd.grad(compose([layer])[side][0].sin().sum(), tensor)[0]
                assert torch.equal(alone, expected)
                for other in tensors:
                    other.requires_grad_(other is tensor)
                frozen = torch.autograd.grad(compose([layer])[side][0].sin().sum(), tensor)[0]
                assert torch.equal(frozen, expected)
                for other in tensors:
                    other.requires_grad_()


def test_a_layer_nobody_used_gets_no_gradient() -> None:
    layers = network()
    wide, _ = compose(layers)
    wide[3].sum().backward()
    assert [layer.weight.grad is not None for layer in layers] == [n == 3 for n in range(len(layers))]


def test_no_argument_is_written_to() -> None:
    layers = network()
    given = [t for layer in layers for t in (layer.weight, *flatten(layer))]
    before = [t.detach().clone() for t in given]
    versions = [t._version for t in given]
    upstream = [torch.randn_like(t) for side in compose(layers) for t in side]
    kept = [t.clone() for t in upstream]
    torch.autograd.backward([t for side in compose(layers) for t in side], upstream)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(upstream, kept, strict=True))
    assert versions == [t._version for t in given]


def test_nothing_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, and whoever reads it shows it."""
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        agree(network())
    finally:
        torch.use_deterministic_algorithms(before)


def test_shared_and_separate_results() -> None:
    """What needs no arithmetic is the weight itself; no other two results share memory."""
    bare = Layer(torch.randn(5, 2), None, (), (None, None), (None, None), (5, 2))
    wide, narrow = compose([bare])
    assert wide[0] is narrow[0] is bare.weight
    same = layer_of("3x3", ("output",), (), alpha=())
    wide, narrow = compose([same])
    assert wide[0] is narrow[0]
    *layers, _, _, _ = network()  # without those that need no arithmetic for one network or both
    places = [t.untyped_storage().data_ptr() for t in (*(t for side in compose(layers) for t in side), *inputs(layers))]
    assert len(set(places)) == len(places) - 1  # the teacher's tensor of the first layer


def test_recipes_are_read_as_written() -> None:
    layers = network()
    recipes = parse("\n".join(encode(Recipe.of(layer), True, False) for layer in layers))
    for layer, recipe in zip(layers, recipes, strict=True):
        assert recipe.wide == tuple(layer.weight.shape)
        assert recipe.shape == layer.shape
        assert recipe.layout == layer.layout
        assert (recipe.teacher, recipe.student) == (True, False)
        tensors = flatten(layer)
        read = recipe.operands(iter(tensors))
        assert [type(term) for term in read.terms] == [type(term) for term in layer.terms]
        assert all(a is b for a, b in zip(read.alpha, layer.alpha, strict=True))
        assert all(a is b or a == b for a, b in zip(read.slices, layer.slices, strict=True))
        assert [tuple(t.shape) for t in tensors[recipe.constants :]] == [shape for shape, _ in recipe.shapes()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at them itself
def test_opcheck() -> None:
    layers = [layer_of("3x2", KINDS, ("cut", "index")), layer_of("linear", ("product",), ("cut", "cut"))]
    weights, operands = [layer.weight for layer in layers], [t for layer in layers for t in flatten(layer)]
    recipes = "\n".join(encode(Recipe.of(layer)) for layer in layers)
    torch.library.opcheck(compose_op, (weights, operands, recipes))
    made = [torch.randn_like(t) for t in compose_op(weights, operands, recipes)]
    needed = " ".join("1" * (1 + len(recipe.shapes())) for recipe in parse(recipes))
    detached = [t.detach() for t in operands]
    torch.library.opcheck(backward_op, (made, detached, recipes, needed))
    torch.library.opcheck(backward_op, ([None, *made[1:]], detached, recipes, needed[:-1] + "0"))


def test_compiles_as_one_graph() -> None:
    layers = network()
    found = gradients(torch.compile(compose, fullgraph=True, backend="aot_eager"), layers)
    for mine, theirs in zip(found, gradients(compose, layers), strict=True):
        assert torch.equal(mine, theirs)


def test_saves_no_more_than_its_operands() -> None:
    saved: list[Tensor] = []
    layers = network()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compose(layers)
    operands = {t.data_ptr() for layer in layers for t in flatten(layer)}
    assert {t.data_ptr() for t in saved} <= operands


def test_large_results_are_ordinary_tensors() -> None:
    """Memory above the size where huge pages are asked for."""
    tensor = plain.fresh((3, 1 << 20), torch.zeros(()))
    assert tensor.numel() * tensor.element_size() > plain.CHUNK
    assert math.isclose(tensor.fill_(0.5).sum().item(), 1.5 * (1 << 20))
