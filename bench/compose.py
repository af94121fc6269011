"""The composition alone, forward and backward: `python -m bench compose [MODEL]`.

The grouped operator against the reference by autograd and against per-layer einsum. A case is checked against the
reference in float64, values and every gradient, layer by layer.

*share* compares with a copy that moves as many bytes as the composition must at least: operands and gradients of its
results read once, results and gradients of operands written once. On a GPU the operator is also replayed as a CUDA
graph, which leaves out what Python takes, and the kernels that one call launches are counted. *host* is the other part:
what a call takes on the processor where the kernels are used but not started.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, cast
from unittest import mock

import torch
import typer
from torch import Tensor

import gpd_fx
from bench.cuda import kernels_launched, record
from bench.einsum import compose_by_einsum
from bench.machine import prepare
from bench.measure import Case, Check, Row, measure
from bench.section import Section, report
from gpd_fx.composition.composition import Composition
from gpd_fx.io.models import resolve
from gpd_fx.kernels.compose import launch
from gpd_fx.kernels.compose.compose import Layer, compose
from gpd_fx.kernels.compose.reference import compose_reference

Compose = Callable[[Sequence[Layer]], tuple[list[Tensor], list[Tensor]]]
CASES: dict[str, Compose] = {"einsum": compose_by_einsum, "reference": compose_reference, "grouped": compose}
TOLERANCE = 2e-5
"""Of each tensor's largest element, in float32."""
COPY = "copy of as many bytes"
GRAPH = "grouped as a CUDA graph"
HOST = "host, launches left out"


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


def worst(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to each tensor's largest element."""
    errors = [
        ((mine.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
        for mine, theirs in zip(found, expected, strict=True)
        if theirs.numel()
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


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


def bytes_moved(layers: Sequence[Layer]) -> tuple[int, int]:
    """The fewest bytes that composing must read and write, forward, and forward and backward together."""
    weights = {id(layer.weight) for layer in layers}
    forward = backward = 0
    for layer in layers:
        pair = [tensors[0] for tensors in compose([layer])]
        made = {id(t): t for t in pair if id(t) not in weights}
        if not made:
            continue
        terms = [t for term in layer.terms for t in term.tensors]
        factors = [a for a in layer.alpha if a is not None]
        trained = [t for t in (layer.weight, *terms) if t.requires_grad]
        forward += _size([layer.weight, *terms, *factors, *made.values()])
        backward += _size([*made.values(), *terms, *factors, *trained])  # gradients are as large as what they are of
    return forward, forward + backward


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _copy(size: int, name: str, device: torch.device) -> Case:
    """Reads half of `size` bytes and writes as many."""
    source = torch.rand(size // 8, device=device)
    target = torch.empty_like(source)
    return Case(
        name,
        lambda: target.copy_(source),
        lambda: [Check("values", worst([target.copy_(source)], [source]), 0.0)],
    )


class Cases:
    """What is timed for one composition."""

    def __init__(self, composition: Composition, device: torch.device) -> None:
        self.composition = composition
        self.device = device
        self.exact = copy.deepcopy(composition).double()
        self.layers = composition.layers()
        self.wanted = [p for p in composition.parameters() if p.requires_grad]
        self.upstream = [torch.randn_like(t) for t in outputs(compose_reference, self.layers)]

    def make(self, name: str, run: Compose) -> tuple[Case, Case]:
        """The forward pass alone, and both."""

        def checks() -> list[Check]:
            errors = [
                worst(results(run, self.composition, n), results(compose_reference, self.exact, n))
                for n in range(len(self.layers))
            ]
            found = [Check("values and gradients", max(errors), TOLERANCE)]
            if run is compose:
                with torch.no_grad():
                    apart = worst(self.tensors(run), [t for side in run(self.composition.layers()) for t in side])
                found.append(Check("as a step calls it", apart, 0.0))
            return found

        def forward() -> object:
            with torch.no_grad():
                return self.tensors(run)

        def both() -> None:
            made = [t for t in self.tensors(run) if t.requires_grad]
            torch.autograd.backward(made, self.upstream)
            self.composition.zero_grad()

        return Case(f"{name}, forward", forward, checks), Case(f"{name}, both", both, checks)

    def tensors(self, run: Compose) -> list[Tensor]:
        """Both networks' tensors: ours as a training step gets them, with what is kept from step to step."""
        if run is compose:
            return [t for side in self.composition() for t in side.values()]
        return [t for side in run(self.composition.layers()) for t in side]

    def host(self) -> Case:
        """What the operator takes where nothing is launched; what it makes is not looked at."""
        _, case = self.make("grouped", compose)

        def call() -> None:
            with mock.patch.multiple(launch, usable=lambda tensors: True, _launch=lambda *given, **told: None):  # pyright: ignore[reportUnknownLambdaType]
                case.run()

        return Case(f"{HOST}, both", call, case.checks)

    def recorded(self, name: str = GRAPH) -> tuple[Case, Case]:
        """The operator as CUDA graphs."""

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return self.tensors(compose)

        def both() -> list[Tensor]:
            results = [t for t in self.tensors(compose) if t.requires_grad]
            pairs = zip(results, self.upstream, strict=True)
            made, upstream = zip(*((t, u) for t, u in pairs if t.grad_fn is not None), strict=True)
            found = cast(tuple[Tensor | None, ...], torch.autograd.grad(made, self.wanted, upstream, allow_unused=True))
            return [*made, *(g for g in found if g is not None)]

        def case(name: str, run: Callable[[], list[Tensor]]) -> Case:
            try:
                replay, kept = record(run)
            except Exception as error:  # noqa: BLE001  whatever capture does not allow; the row says so
                return Case.missing(name, f"not captured: {' '.join(str(error).split())[:200]}")
            expected = [t.detach().clone() for t in run()]

            def checks() -> list[Check]:
                for tensor in kept:
                    tensor.detach().fill_(math.nan)  # a replay that writes nothing is found
                replay()
                return [Check("values and gradients", worst(kept, expected), TOLERANCE)]

            return Case(name, replay, checks)

        own = {id(p) for p in self.composition.parameters()}

        def made(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
            return lambda: [t for t in run() if id(t) not in own]

        return case(f"{name}, forward", made(forward)), case(f"{name}, both", made(both))


def run(
    model: str, ratio: float, branches: str, resolution: int, rounds: int, device: torch.device, until: float = math.inf
) -> Section:
    """Measure the composition of a model."""
    composition = composition_of(model, ratio, branches.split(","), resolution).to(device)
    cases = Cases(composition, device)
    pairs = [cases.make(name, how) for name, how in CASES.items()]
    if device.type == "cuda":
        pairs.append(cases.recorded())
    moved = bytes_moved(cases.layers)
    rows: list[Row] = []
    for number, (side, size) in enumerate(zip(("forward", "both"), moved, strict=True)):
        copied = f"{COPY}, {side}"
        hosted = [cases.host()] if side == "both" else []
        chosen = [*(pair[number] for pair in pairs), *hosted, _copy(size, copied, device)]
        found = measure(chosen, rounds, device, until)
        _compare(found, size)
        rows += found
    if device.type == "cuda":
        row = next(row for row in rows if row.name == "grouped, both")
        launched = kernels_launched(pairs[list(CASES).index("grouped")][1].run) if row.correct else None
        if launched is not None:
            row.figures["kernels"] = launched
    parameters = sum(p.numel() for p in composition.parameters())
    options = {"model": model, "ratio": ratio, "branches": branches, "parameters": parameters}
    title = f"composition of {model}, ratio {ratio:g}, branches {branches}, float32"
    return Section.of("compose", title, options, rows, device)


def _compare(rows: Sequence[Row], size: int) -> None:
    """Bytes a second, and the share of what the copy reaches in the same round."""
    copied = rows[-1]
    for row in rows:
        if row.median is not None and copied.seconds and not row.name.startswith(HOST):
            row.figures["GB/s"] = size / row.median / 1e9
            row.figures["share"] = statistics.median(
                c / mine for c, mine in zip(copied.seconds, row.seconds, strict=True)
            )


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
    report([run(model, ratio, branches, resolution, rounds, prepare(device, threads))], out)
