"""The composition alone, forward and backward: `python -m bench compose [MODEL]`.

The grouped operator against the reference by autograd and against per-layer einsum. A case is checked against the
reference in float64, values and every gradient, layer by layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import gpd_fx
from bench.einsum import compose_by_einsum
from bench.measure import Case, measure, save, show
from gpd_fx.composition import Composition
from gpd_fx.kernels.compose import Layer, compose
from gpd_fx.kernels.reference import compose_reference
from gpd_fx.models import resolve

Compose = Callable[[Sequence[Layer]], tuple[list[Tensor], list[Tensor]]]
CASES: dict[str, Compose] = {"einsum": compose_by_einsum, "reference": compose_reference, "grouped": compose}
TOLERANCE = 2e-5
"""Of each tensor's largest element, in float32."""


def composition_of(model: str, ratio: float, branches: Sequence[str], resolution: int) -> Composition:
    """The composition of a model, its branches with scales other than zero."""
    image = torch.randn(2, 3, resolution, resolution)
    composition = gpd_fx.expand(resolve(model), ratio, (image,), branches=branches, verify=False).composition
    awaken(composition)
    return composition


def awaken(composition: Composition) -> None:
    """Give the branches' scales values, as training does: at zero, nothing would show an error in them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in composition.branches.named_parameters():
            if name.endswith(".v"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def outputs(run: Compose, layers: Sequence[Layer]) -> list[Tensor]:
    """The tensors that gradients flow through."""
    return [tensor for side in run(layers) for tensor in side if tensor.requires_grad]


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to each tensor's largest element."""
    errors = [
        ((mine.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
        for mine, theirs in zip(found, expected, strict=True)
        if theirs.numel()
    ]
    return max(errors, default=0.0)


def results(run: Compose, composition: Composition, index: int) -> list[Tensor]:
    """Values and gradients of one layer."""
    made = outputs(run, composition.layers()[index : index + 1])
    if not made:
        return []
    generator = torch.Generator().manual_seed(index)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in made]
    wanted = [p for p in composition.parameters() if p.requires_grad]
    torch.autograd.backward(made, upstream, inputs=wanted)
    found = [p.grad for p in wanted if p.grad is not None]
    composition.zero_grad()
    return [*(t.detach() for t in made), *found]


def main(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or package.module:factory.")] = (
        "torchvision:resnet18"
    ),
    ratio: Annotated[float, typer.Option(help="Expansion ratio.")] = 2.0,
    branches: Annotated[str, typer.Option(help="Names, separated by commas.")] = "orepa",
    resolution: Annotated[int, typer.Option(help="Of the image that the model is captured with.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 7,
    threads: Annotated[int, typer.Option(help="Threads that torch uses on the CPU.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time the composition of a model, forward and backward."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    place = torch.device(device)
    composition = composition_of(model, ratio, branches.split(","), resolution).to(place)
    exact = copy.deepcopy(composition).double()
    layers = composition.layers()
    upstream = [torch.randn_like(t) for t in outputs(compose_reference, layers)]

    def case(name: str, run: Compose) -> list[Case]:
        def error() -> float:
            return max(
                worst(results(run, composition, n), results(compose_reference, exact, n)) for n in range(len(layers))
            )

        def forward() -> None:
            with torch.no_grad():
                run(composition.layers())

        def both() -> None:
            torch.autograd.backward(outputs(run, composition.layers()), upstream)
            composition.zero_grad()

        return [Case(f"{name}, forward", forward, error, TOLERANCE), Case(f"{name}, both", both, error, TOLERANCE)]

    pairs = [case(name, run) for name, run in CASES.items()]
    parameters = sum(p.numel() for p in composition.parameters()) / 1e6
    options = {"model": model, "ratio": ratio, "branches": branches, "parameters": f"{parameters:.1f} million"}
    rows = [row for side in zip(*pairs, strict=True) for row in measure(side, rounds, place)]
    show(f"composition of {model} at ratio {ratio:g}, branches {branches}, float32, ratios to einsum", rows)
    if out is not None:
        save(out, rows, place, options)
