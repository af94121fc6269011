"""Which sizes of tiles compose fastest on a device: `python -m bench tune --device cuda`.

Each candidate composes every model, checked in values and gradients against the reference in float64, and is timed as a
CUDA graph, which leaves out what Python takes. Sizes for the forward pass are chosen first; those for the backward pass
are then tried beside them. The last line is the entry for `gpd_fx.kernels.launch.TUNED`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench.compose import Cases, composition_of
from bench.everything import RESNET18, RESNET50
from bench.machine import prepare
from bench.measure import Case, Check, measure
from bench.section import Section, report
from gpd_fx.kernels import launch
from gpd_fx.kernels.compose import compose
from gpd_fx.kernels.tables import Blocks

Pair = tuple[Blocks, Blocks]
SIDES = ("forward", "both")


def candidates() -> list[Blocks]:
    """The sizes that are tried; the first are those that are used without tuning.

    None of them spills registers on sm_90 by more than 8 bytes; tiles of 128 inputs, or of 32 x 64 with four warps, do.
    """
    grid = itertools.product((32, 64), (64, 32), (32, 16))
    tiles = [replace(launch.FORWARD, lines=o, inputs=i, inner=c) for o, i, c in grid]
    small = replace(launch.FORWARD, inputs=32, warps=4)
    return [*tiles, small, replace(launch.FORWARD, stages=2), replace(launch.FORWARD, stages=3)]


def name_of(blocks: Blocks) -> str:
    """Sizes in a few words."""
    return f"{blocks.lines}x{blocks.inputs}x{blocks.inner}, {blocks.warps} warps, {blocks.stages} stages"


def case_of(cases: Cases, name: str, pair: Pair, side: int) -> Case:
    """One pass (0) or both (1) with some sizes: its results are checked here, and a graph's once more by its case."""
    try:
        with launch.trying(*pair):
            plain = cases.make("grouped", compose)[side]
            found = list(plain.checks())
            if cases.device.type == "cuda":
                graph = cases.recorded(name)[side]
                return replace(graph, name=name, checks=lambda: [*found, *graph.checks()])
    except Exception as error:  # noqa: BLE001  too much shared memory, for one
        return Case.missing(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def interpreted() -> None:
        with launch.trying(*pair):
            plain.run()

    def checks() -> list[Check]:
        return found

    return Case(name, interpreted, checks)


def run(
    models: Sequence[str], tried: Sequence[Blocks], resolution: int, rounds: int, device: torch.device
) -> tuple[list[Section], Pair]:
    """Time all sizes on all models, and choose: the least sum of times relative to the first sizes."""
    every = {
        model: Cases(composition_of(model, 2.0, ["orepa"], resolution).to(device), device)  # float32, as in training
        for model in models
    }
    sections: list[Section] = []
    forward = tried[0]

    def choose(side: int, pair_of: Callable[[Blocks], Pair]) -> Blocks:
        totals = dict.fromkeys(tried, 0.0)
        for model, cases in every.items():
            rows = measure([case_of(cases, name_of(b), pair_of(b), side) for b in tried], rounds, device)
            for blocks, row in zip(tried, rows, strict=True):
                totals[blocks] += math.inf if row.ratio is None else row.ratio
            title = f"sizes of tiles, {SIDES[side]}, composition of {model}"
            sections.append(Section.of("tune", title, {"model": model}, rows, device))
        return min(totals, key=lambda blocks: totals[blocks])

    forward = choose(0, lambda blocks: (blocks, launch.BACKWARD))
    backward = choose(1, lambda blocks: (forward, blocks))
    return sections, (forward, backward)


def main(
    device: Annotated[str, typer.Option(help="cpu, where kernels are interpreted, or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 10,
    tiny: Annotated[bool, typer.Option("--tiny", help="Two sizes on a tiny network.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Try sizes of tiles and print which are best."""
    place = prepare(device, 1)
    if place.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
    tried = candidates()[:2] if tiny else candidates()
    models = ["bench.tiny:convs"] if tiny else [RESNET18, RESNET50]
    sections, pair = run(models, tried, 16 if tiny else 64, 1 if tiny else rounds, place)
    report(sections, out)
    entry = f'"{launch.architecture(place) or place.type}": ({pair[0]}, {pair[1]}),'
    Console(soft_wrap=True).print(entry, markup=False, highlight=False)
