"""Which timm models a sweep takes: the smallest of every model file, and the smallest ones of all.

Counting parameters means building more than a thousand models, if only on the meta device, so the counts stand in
`timm_models.json`. `python -m bench.zoo.timm_models` makes it anew for the timm that is installed.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import timm
import torch
from rich.progress import track

FILE = Path(__file__).with_suffix(".json")
SMALLEST = 200


def measure() -> dict[str, tuple[str, int]]:
    """Every architecture of timm -> the file that it stands in, and its parameters."""
    found: dict[str, tuple[str, int]] = {}
    for name in track(timm.list_models(), description="timm models", disable=not sys.stderr.isatty()):
        module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            try:
                model = timm.create_model(name, pretrained=False)
            except Exception as error:  # noqa: BLE001  some cannot be built on the meta device
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
        found[name] = (module, sum(parameter.numel() for parameter in model.parameters()))
    return found


def names() -> tuple[str, ...]:
    """The smallest model of each file, then the smallest of all that are left, smallest first."""
    counts: dict[str, tuple[str, int]] = {
        name: (file, size) for name, (file, size) in json.loads(FILE.read_text()).items()
    }
    order = sorted(counts, key=lambda name: (counts[name][1], name))
    first: dict[str, str] = {}
    for name in order:
        first.setdefault(counts[name][0], name)
    return tuple(sorted({*first.values(), *order[:SMALLEST]}, key=order.index))


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in measure().items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
