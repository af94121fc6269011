"""Checks models one after the other: `python -m bench.zoo.one` reads names from standard input, a line each.

For each it prints `RECORD` and a line of JSON. What does not fit into memory is checked less: ratios fall away from the
widest on, and what remains too large is built on the meta device, where shapes alone can be compared.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import typer
from torch import nn

from bench.machine import resident_peak
from bench.zoo.check import Record, check, check_shapes
from bench.zoo.models import entry_of

MARK = "RECORD "
_COPIES = 2  # of the teacher's parameters, in float64: its own, and those that a call composes
_DEFAULT = (2.0, 3.0, 1.5)


def main(
    ratio: Annotated[list[float] | None, typer.Option()] = None,
    step: Annotated[bool, typer.Option()] = True,
    onnx: Annotated[bool, typer.Option()] = True,
    memory: Annotated[float, typer.Option(help="GiB that this process may take.")] = 20.0,
) -> None:
    """Check the models whose names come in."""
    for line in sys.stdin:
        name, started = line.strip(), time.perf_counter()
        try:
            record = run(name, ratio or _DEFAULT, step=step, onnx=onnx, memory=memory)
        except Exception:  # noqa: BLE001  whatever goes wrong belongs to the model's record
            record = Record(name, error=traceback.format_exc()[-4000:])
        record.seconds = time.perf_counter() - started
        record.peak = resident_peak()
        print(MARK + json.dumps(record.to_dict()), flush=True)


def run(name: str, ratios: Sequence[float], *, step: bool, onnx: bool, memory: float) -> Record:
    """Check one model as wholly as memory allows."""
    entry = entry_of(name)
    parameters = sum(parameter.numel() for parameter in _cheaply(entry.build).parameters())
    fit = [r for r in ratios if 8 * parameters * (_COPIES * r * r + 2) < 0.7 * memory * 2**30]
    if not fit:
        return check_shapes(name, lambda: _cheaply(entry.build), entry.inputs(), ratios=ratios)
    return check(name, entry.build, entry.inputs(), ratios=fit, step=step, onnx=onnx)


def _cheaply(build: Callable[[], nn.Module]) -> nn.Module:
    """A model without memory behind it, where it can be built so."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # noqa: BLE001  some compute on tensors as they are built
        return build()


if __name__ == "__main__":
    typer.run(main)
