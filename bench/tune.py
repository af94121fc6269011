"""Which sizes of tiles compose fastest on a device: `python -m bench tune --device cuda`.

Each candidate composes every model, checked in values and gradients against the reference in float64, and is timed as a
CUDA graph, which leaves out what Python takes. Sizes for the forward pass are chosen first; those for the backward pass
are then tried beside them. The last line is the entry for `gpd_fx.kernels.launch.SIZES`.
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
from gpd_fx.kernels.compose import launch
from gpd_fx.kernels.compose.compose import compose
from gpd_fx.kernels.compose.tables import Blocks

Pair = tuple[Blocks, Blocks]
SIDES = ("forward", "both")


def candidates(side: int, now: Blocks) -> list[Blocks]:
    """The sizes that are tried for one pass (0) or the other (1); the first are those that are used now.

    On sm_90, in float32, none spills more than 8 bytes but backward those of four warps and of two stages, which spill
    less than 100; tiles of 128 lines or inputs spill more than a thousand.
    """
    grid = itertools.product((64, 32), (64, 32), (32, 16))
    tiles = [replace(now, lines=o, **{("inputs", "inner")[side]: i}, chunk=c) for o, i, c in grid]
    tiles += [replace(now, inputs=32, warps=4), replace(now, stages=2), replace(now, stages=3)]
    tiles += [replace(now, part=part) for part in (512, 2048)] if side else []
    return list(dict.fromkeys([now, *tiles]))


def name_of(blocks: Blocks) -> str:
    """Sizes in a few words."""
    tile = f"{blocks.lines}x{blocks.inputs}, inner {blocks.inner}, {blocks.chunk} at a time, parts of {blocks.part}"
    return f"{tile}, {blocks.warps} warps, {blocks.stages} stages"


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
    models: Sequence[str], tried: Sequence[Sequence[Blocks]], resolution: int, rounds: int, device: torch.device
) -> tuple[list[Section], Pair]:
    """Time all sizes, of either pass, on all models; choose those with the least sum of times relative to the first."""
    every = {
        model: Cases(composition_of(model, 2.0, ["orepa"], resolution).to(device), device)  # float32, as in training
        for model in models
    }
    sections: list[Section] = []

    def choose(side: int, pair_of: Callable[[Blocks], Pair]) -> Blocks:
        totals = dict.fromkeys(tried[side], 0.0)
        for model, cases in every.items():
            rows = measure([case_of(cases, name_of(b), pair_of(b), side) for b in tried[side]], rounds, device)
            for blocks, row in zip(tried[side], rows, strict=True):
                totals[blocks] += math.inf if row.ratio is None else row.ratio
            title = f"sizes of tiles, {SIDES[side]}, composition of {model}"
            sections.append(Section.of("tune", title, {"model": model}, rows, device))
        if min(totals.values()) == math.inf:
            reasons = {row.left_out or "wrong" for section in sections for row in section.rows}
            raise typer.BadParameter(f"no sizes of tiles could be timed: {', '.join(sorted(reasons))}")
        return min(totals, key=lambda blocks: totals[blocks])

    forward = choose(0, lambda blocks: (blocks, tried[1][0]))
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
    if place.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # torch may have imported triton already
        raise typer.BadParameter("on a CPU kernels are interpreted: TRITON_INTERPRET=1 python -m bench tune --tiny")
    now = launch.sizes_on(launch.architecture(place))
    tried = [candidates(side, now[side])[: 2 if tiny else None] for side in range(2)]
    models = ["bench.tiny:convs"] if tiny else [RESNET18, RESNET50]
    sections, pair = run(models, tried, 16 if tiny else 64, 1 if tiny else rounds, place)
    report(sections, out)
    entry = f'"{launch.architecture(place) or place.type}": ({pair[0]}, {pair[1]}),'
    Console(soft_wrap=True).print(entry, markup=False, highlight=False)
