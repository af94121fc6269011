"""The tile kernels compile for GPUs that are not here: nothing spills, shared memory fits, matrix units are used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KIB = 1024
TARGETS = {"cuda 80": 163 * KIB, "cuda 90": 227 * KIB, "cuda 100": 227 * KIB, "hip gfx942": 64 * KIB}
"""Shared memory that a block may have."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_the_device(target: str) -> None:
    root = Path(__file__).parents[1]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, "-W", "ignore", str(root / "tests" / "compile_tiles.py"), *target.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 6
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["matrix"] > 0, row
        assert row["shared"] <= TARGETS[target], row
        assert row["registers"] <= 255 if target.startswith("cuda") else row["registers"] <= 512, row
