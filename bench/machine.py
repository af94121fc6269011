"""The machine that figures depend on: its description, its clock, and the memory that a call takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import typer

import gpd_fx


def prepare(device: str, threads: int) -> torch.device:
    """Settings that all cases share. On CUDA, float32 means float32 (no TF32) and convs are autotuned.

    Raises:
        BadParameter: the device is not there.
    """
    place = torch.device(device)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.compiler.reset()
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise typer.BadParameter("there is no CUDA device here; use --device cpu")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    return place


@contextlib.contextmanager
def untuned() -> Generator[None]:
    """Without cuDNN's search for the fastest kernels, which costs more than what is run once."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory during a call beyond what was there before it, in bytes; None where the system does not say."""
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
    return max(0, _status("VmHWM") - before)


def resident_peak() -> int:
    """Most memory that this process ever had, in bytes; what `getrusage` says may be its parent's."""
    if sys.platform.startswith("linux"):
        return _status("VmHWM")
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def name_of(device: torch.device) -> str:
    """What the maker calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), platform.processor() or platform.machine())


def slug(name: str) -> str:
    """A device's name as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": name_of(device),
        "threads": torch.get_num_threads(),
        "clock": clock(device),
        "torch": torch.__version__,
        "gpd_fx": gpd_fx.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "huge pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1",
    }
