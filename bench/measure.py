"""Timing cases side by side, each gated by its check, with the machine and versions beside the figures."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Case:
    """Something to time: `run` does it once, `error` is how far its result is from what it should be."""

    name: str
    run: Callable[[], object]
    error: Callable[[], float]
    tolerance: float


@dataclass
class Row:
    """What was found for one case; `seconds` is empty where the check failed."""

    name: str
    error: float
    correct: bool
    seconds: list[float] = field(default_factory=list[float])
    ratios: list[float] = field(default_factory=list[float])
    memory: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = asdict(self)
        if self.seconds:
            found["median"] = statistics.median(self.seconds)
        if self.ratios:
            found["ratio"] = statistics.median(self.ratios)
        return found


def clock(device: torch.device) -> str:
    """Processor time where one thread does all the work (what other programs take does not count), else wall time."""
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def timer(device: torch.device) -> Callable[[], float]:
    """A clock that has waited for the device."""
    if device.type == "cpu":
        return time.process_time if clock(device) == "processor" else time.perf_counter

    def wait() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wait


def measure(cases: Sequence[Case], rounds: int, device: torch.device) -> list[Row]:
    """Check every case; then time those that are right in turn, `rounds` times after one round that is not counted.

    Ratios are to the first case, within a round; there are none where the first case is wrong.
    """
    progress = Console(stderr=True)
    rows: list[Row] = []
    for case in cases:
        error = case.error()
        rows.append(Row(case.name, error, error <= case.tolerance))
        progress.print(f"checked {case.name}: error {error:.1e}")
    right = [(case, row) for case, row in zip(cases, rows, strict=True) if row.correct]
    now = timer(device)
    for case, row in right:
        row.memory = peak(case.run, device)
    for number in range(rounds):
        for case, row in right:
            gc.collect()
            started = now()
            case.run()
            row.seconds.append(now() - started)
        progress.print(f"round {number + 1} of {rounds}")
    if rows[0].correct:
        for _, row in right:
            row.ratios = [mine / base for mine, base in zip(row.seconds, rows[0].seconds, strict=True)]
    return rows


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory during a call beyond what was there before it, in bytes; None where the system does not say."""
    run()  # the first call may fill caches
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table; a case that failed its check shows no speed."""
    table = Table(title=title)
    for column in ("case", "median s", "min-max s", "ratio (min-max)", "peak MB", "error"):
        table.add_column(column, justify="left" if column == "case" else "right", overflow="fold")
    for row in rows:
        memory = "" if row.memory is None else f"{row.memory / 1e6:.0f}"
        if not row.correct:
            table.add_row(row.name, "WRONG", "", "", "", f"{row.error:.1e}")
            continue
        spread = f"{min(row.seconds):.3f}-{max(row.seconds):.3f}"
        ratio = ""
        if row.ratios:
            ratio = f"{statistics.median(row.ratios):.2f} ({min(row.ratios):.2f}-{max(row.ratios):.2f})"
        table.add_row(row.name, f"{statistics.median(row.seconds):.3f}", spread, ratio, memory, f"{row.error:.1e}")
    Console().print(table)


def save(path: Path, rows: Sequence[Row], device: torch.device, options: Mapping[str, Any]) -> None:
    """Write the figures, the options and the machine as JSON."""
    content = {
        "options": dict(options),
        "machine": machine(device),
        "clock": clock(device),
        "rows": [row.to_dict() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        if info.exists():
            models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
            name = models[0].partition(":")[2].strip() if models else name
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "huge pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1",
    }
