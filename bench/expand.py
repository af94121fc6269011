"""What `expand` costs beside the two captures it needs: `python -m bench expand [MODEL ...]`.

Verification is left out of what is timed: it is the check.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer

import gpd_fx
from bench.machine import prepare
from bench.measure import Case, Check, measure
from bench.section import Section, report
from bench.zoo.models import CORE, entry_of, inputs_for
from gpd_fx.verify.verification import relative_error

TOLERANCE, ROUNDING = 1e-9, 1e-4
"""In float64, and of the capture in the model's own float32."""


def run(name: str, ratio: float, rounds: int, until: float = math.inf) -> Section:
    """Measure one model."""
    model = entry_of(name).build()
    (image,), _ = inputs_for(model, torch.float32)

    def captures() -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
        return gpd_fx.capture(model, (image,), mode="eval"), gpd_fx.capture(model, (image,), mode="train")

    def expansion() -> gpd_fx.DynamicTeacher:
        return gpd_fx.expand(model, ratio, (image,), verify=False)

    def captured() -> list[Check]:
        with torch.no_grad():
            error = relative_error(model.eval()(image), captures()[0](image))
        return [Check("outputs", error, ROUNDING)]

    def exact() -> list[Check]:
        return [Check("verify", gpd_fx.verify(model, expansion(), (image,)), TOLERANCE)]

    cases = [Case("two captures", captures, captured), Case("expand", expansion, exact)]
    device = torch.device("cpu")
    rows = measure(cases, rounds, device, until)
    options = {"model": name, "ratio": ratio, "branches": "orepa"}
    return Section.of("expand", f"expand {name} at ratio {ratio:g} against its two captures", options, rows, device)


def main(
    models: Annotated[list[str] | None, typer.Argument(help="By default those of the core sweep.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 3,
    ratio: Annotated[float, typer.Option(help="Expansion ratio.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time captures and expansions."""
    prepare("cpu", 1)
    report([run(name, ratio, rounds) for name in models or CORE], out)
