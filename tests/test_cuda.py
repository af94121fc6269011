"""The composition compiled for a CUDA device: `make test-gpu`. Without one nearly all of it is skipped."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

import gpd_fx
from gpd_fx.composition.composition import Composition
from gpd_fx.kernels.compose import transfer
from gpd_fx.kernels.compose.compose import Layer, compose
from tests.test_tiles import KINDS, SHAPES, bare, cast, layer_of, tensors, worst

DEVICE = "cuda"
on_device = pytest.mark.skipif(
    os.environ.get("GPD_FX_DEVICE") != DEVICE or not torch.cuda.is_available(),
    reason="needs GPD_FX_DEVICE=cuda and such a device",
)
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""float32 by three products of tf32; the others by two roundings, of what goes in and of what comes out."""


@on_device
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_every_form(name: str, dtype: torch.dtype) -> None:
    assert worst([cast(layer_of(name, KINDS), dtype, DEVICE)]) <= BOUNDS[dtype]


@on_device
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_network_in_one_launch(dtype: torch.dtype) -> None:
    layers = [layer_of(name, KINDS) for name in SHAPES] + [bare((7,), (), (0,)), bare((2, 5, 6, 3), (1, 2), (1, 2))]
    assert worst([cast(layer, dtype, DEVICE) for layer in layers]) <= BOUNDS[dtype]


def results(layers: list[Layer]) -> list[Tensor]:
    """Values and gradients."""
    made = [t for side in compose(layers) for t in side]
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in made]
    wanted = [t for t in tensors(layers) if t.requires_grad]
    return [*made, *torch.autograd.grad(made, wanted, upstream, materialize_grads=True, allow_unused=True)]


@on_device
def test_the_same_bits_every_time() -> None:
    layers = [cast(layer_of(name, KINDS), torch.float32, DEVICE) for name in ("several tiles", "stem", "depthwise")]
    first = results(layers)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, results(layers), strict=True))


def composition() -> Composition:
    """One whose branches add something, with channels last."""
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 24, 3))
    made = gpd_fx.expand(model, 2.0, (torch.randn(2, 3, 9, 9),), branches="orepa").composition
    with torch.no_grad():
        for parameter in made.branches.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.to(DEVICE)
    return made.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch's stub lacks it


def step(made: Composition) -> list[Tensor]:
    """Values and gradients of a composition, which lie where they did before."""
    outputs = [t for side in made() for t in side.values() if t.requires_grad]
    wanted = [p for p in made.parameters() if p.requires_grad]
    upstream = [t.detach().sin() for t in outputs]
    found = list[Tensor | None](torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))
    return [*outputs, *(g for g in found if g is not None)]


@on_device
def test_a_captured_graph_follows_the_parameters() -> None:
    made = composition()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(made)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step(made)
    for _ in range(100):  # what eager steps send must not touch what the graph reads
        step(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    graph.replay()
    for mine, theirs in zip(kept, step(made), strict=True):
        assert torch.equal(mine, theirs)


@on_device
def test_a_capture_without_a_step_before_it_says_so() -> None:
    made = composition()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=DEVICE)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="run a step first"):
            made()


@on_device
def test_the_student_lies_as_the_teacher() -> None:
    wide, narrow = composition()()
    for side in (wide, narrow):
        assert side["3.weight"].is_contiguous(memory_format=torch.channels_last)


def test_pinned_memory_is_handed_out_once() -> None:
    """On the CPU it is not pinned, and everything else is the same."""
    pinned = transfer.Pinned()
    with pytest.raises(RuntimeError, match="capture fewer"):
        pinned.take(torch.arange(5))
    pinned.reserve(5000)
    taken = [pinned.take(torch.full((5000,), n)) for n in range(16)]
    pinned.reserve(200_000)  # new memory, and the old stays
    taken += [pinned.take(torch.full((200_000,), n)) for n in range(16, 20)]
    assert all((piece == n).all() for n, piece in enumerate(taken))
    assert len({piece.data_ptr() for piece in taken}) == len(taken)
