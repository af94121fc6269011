"""The kernels compile for GPUs that are not here: nothing spills, shared memory fits, products use matrix units."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KIB = 1024
TARGETS = {"cuda 80": 163 * KIB, "cuda 90": 227 * KIB, "cuda 100": 227 * KIB, "hip gfx942": 64 * KIB}
"""Shared memory that a block may have."""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def compiled(script: str, target: str) -> list[dict[str, Any]]:
    """What a script says of each kernel."""
    root = Path(__file__).parents[1]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, "-W", "ignore", str(root / "tests" / script), *target.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= TARGETS[target], row
        assert row["registers"] <= 255 if target.startswith("cuda") else row["registers"] <= 512, row
    return rows


@pytest.mark.parametrize("target", TARGETS)
def test_the_composition_compiles_without_the_device(target: str) -> None:
    rows = compiled("compile_tiles.py", target)
    assert len(rows) == 6
    assert all(row["matrix"] > 0 for row in rows)


@pytest.mark.parametrize("target", TARGETS)
def test_the_depthwise_kernels_compile_without_the_device(target: str) -> None:
    rows = compiled("compile_depthwise.py", target)
    assert len({row["kernel"] for row in rows}) == 6
    assert len({row["case"] for row in rows}) == 4
