"""What `expand` costs beside the two captures it needs: `python -m bench.expand [MODEL ...]`.

Both are timed in turn, in one process, on the processor's clock (time that other programs take does not count);
verification is left out of `expand`. The table gives medians and the ratio of each pair.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import gpd_fx
from bench.zoo.models import CORE, entry_of, inputs_for


def seconds(run: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def main(
    models: Annotated[list[str] | None, typer.Argument(help="By default those of the core sweep.")] = None,
    rounds: Annotated[int, typer.Option(help="Pairs that are timed, after one that is not.")] = 3,
    ratio: Annotated[float, typer.Option(help="Expansion ratio.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time captures and expansions."""
    torch.set_num_threads(1)
    table = Table(title=f"expand at ratio {ratio:g}, default branches, float32, against its two captures")
    for column in ("model", "captures s", "expand s", "ratio (min-max)"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    rows: list[dict[str, object]] = []
    for name in models or CORE:
        model = entry_of(name).build()
        (image,), _ = inputs_for(model, torch.float32)

        def captures(model: torch.nn.Module = model, image: torch.Tensor = image) -> None:
            gpd_fx.capture(model, (image,), mode="eval")
            gpd_fx.capture(model, (image,), mode="train")

        def expansion(model: torch.nn.Module = model, image: torch.Tensor = image) -> None:
            gpd_fx.expand(model, ratio, (image,), verify=False)

        pairs = [(seconds(captures), seconds(expansion)) for _ in range(rounds + 1)][1:]
        ratios = sorted(whole / alone for alone, whole in pairs)
        alone, whole = (statistics.median(side) for side in zip(*pairs, strict=True))
        middle = statistics.median(ratios)
        rows.append({"model": name, "captures": alone, "expand": whole, "ratio": middle, "ratios": ratios})
        spread = f"{middle:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        table.add_row(name, f"{alone:.2f}", f"{whole:.2f}", spread)
        Console(stderr=True).print(f"{name}: {spread}")
    Console().print(table)
    if out is not None:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        out.write_text(json.dumps(machine | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
