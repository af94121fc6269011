"""All benchmarks of a device, most important first, within a time: `python -m bench all --device cpu|cuda`.

Writes `bench/results/<device>.json` after each section, so that what was measured is kept. Sections of an earlier run
stay where this run does not measure them again; each says with what it was measured. `--only` picks some by title.
What there was no time for, and what failed, is listed with its reason. The exit status is 1 where a check is red.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench import compose, depthwise, expand, folded, step
from bench.machine import name_of, prepare, slug
from bench.section import Results, Section
from bench.step import COMPILED, EAGER, NAMES, Setting

RESULTS = Path(__file__).parent / "results"
FULL = "1x1,1x1-kxk:full,1x1-avg,dwsep,prior,lowrank"
"""The default branches with the full inner width."""
RESNET18, RESNET50, MOBILENET, CONVNEXT, DEIT = folded.MODELS
TINY = "bench.tiny:network"
TINY_STEP = Setting(TINY, 2.0, "1x1,1x1-kxk:full,1xk+kx1,dwsep,lowrank", 4, 16, backend="aot_eager")


@dataclass(frozen=True)
class Job:
    """A section to come: `seconds` is what it takes at least, `run` is given the time when it should end."""

    title: str
    seconds: float
    run: Callable[[float], Section]


def step_job(setting: Setting, names: tuple[str, ...], rounds: int, device: torch.device, seconds: float) -> Job:
    """A training step."""
    return Job(setting.title, seconds, lambda until: step.run(setting, names, rounds, device, until))


def compose_job(model: str, branches: str, rounds: int, device: torch.device, seconds: float) -> Job:
    """The composition alone."""
    title = f"composition of {model}, ratio 2, branches {branches}, float32"
    side = 32 if model == TINY else 64
    return Job(title, seconds, lambda until: compose.run(model, 2.0, branches, side, rounds, device, until))


def depthwise_job(setting: depthwise.Setting, rounds: int, device: torch.device, seconds: float) -> Job:
    """Depthwise convs with batch norm."""
    layers = depthwise.TINY if setting.batch < 8 else depthwise.MOBILENET
    return Job(setting.title, seconds, lambda until: depthwise.run(layers, setting, rounds, device, until))


def onnx_job(model: str, resolution: int, rounds: int, seconds: float, repeats: int = 1) -> Job:
    """The folded student's file."""
    title = f"folded student of {model} in ONNX Runtime, batch 1, {resolution}x{resolution}"
    return Job(title, seconds, lambda until: folded.run(model, resolution, rounds, 2.0, repeats, until))


def expand_job(model: str, rounds: int, seconds: float) -> Job:
    """`expand` against its captures."""
    title = f"expand {model} at ratio 2 against its two captures"
    return Job(title, seconds, lambda until: expand.run(model, 2.0, rounds, until))


def jobs_of(device: torch.device) -> Iterator[Job]:
    """What there is to measure, most important first."""
    return _on_cuda(device) if device.type == "cuda" else _on_cpu(device)


def _on_cuda(device: torch.device) -> Iterator[Job]:
    # `expand` and files for ONNX Runtime are the CPU's business, and measured there
    large = Setting(batch=256, resolution=224, channels_last=True, amp="bf16")
    yield compose_job(RESNET18, "orepa", 15, device, 12)
    yield step_job(large, NAMES, 10, device, 90)
    yield step_job(replace(large, batch=128, resolution=32), NAMES, 10, device, 80)
    yield step_job(replace(large, model=RESNET50), (*EAGER, f"plain{COMPILED}", f"gpd_fx{COMPILED}"), 5, device, 110)
    yield step_job(replace(large, branches=FULL), EAGER, 5, device, 15)
    yield step_job(replace(large, batch=128, resolution=32, branches=FULL), EAGER, 10, device, 12)
    yield compose_job(RESNET18, FULL, 10, device, 12)
    for model in (MOBILENET, CONVNEXT, DEIT):
        yield step_job(replace(large, model=model), EAGER, 5, device, 20)
    yield depthwise_job(depthwise.Setting(256, "bfloat16", True, "inductor"), 10, device, 40)
    yield depthwise_job(depthwise.Setting(64), 10, device, 15)
    yield compose_job(RESNET50, "orepa", 10, device, 20)


def _on_cpu(device: torch.device) -> Iterator[Job]:
    yield step_job(Setting(), EAGER, 3, device, 200)
    yield step_job(Setting(batch=16, resolution=112, branches=FULL), EAGER, 3, device, 120)
    yield compose_job(RESNET18, "orepa", 5, device, 20)
    yield onnx_job(RESNET18, 224, 60, 25)
    small = Setting(batch=8, resolution=64)
    for model, change in ((RESNET50, {}), (MOBILENET, {}), (CONVNEXT, {}), (DEIT, {"batch": 4, "resolution": 224})):
        yield step_job(replace(small, model=model, **change), EAGER, 3, device, 30)
    yield step_job(replace(small, batch=16), ("plain", "gpd_fx", "einsum", *NAMES[4:]), 3, device, 200)
    for model in folded.MODELS[1:]:
        yield onnx_job(model, 224, 40, 40)
    for model in folded.MODELS:
        yield expand_job(model, 3, 40)


def tiny_jobs(device: torch.device) -> Iterator[Job]:
    """Every kind of section on a tiny network, compiled without a code generator."""
    yield step_job(TINY_STEP, NAMES, 2, device, 15)
    yield step_job(replace(TINY_STEP, amp="bf16", channels_last=True), EAGER, 2, device, 5)
    yield compose_job(TINY, "orepa", 2, device, 5)
    yield depthwise_job(depthwise.Setting(2, backend="aot_eager"), 2, device, 2)
    yield onnx_job(TINY, 32, 5, 10, repeats=20)
    yield expand_job(TINY, 2, 5)


def measure_all(
    jobs: Iterator[Job], results: Results, minutes: float, save: Callable[[Results], object] = lambda _: None
) -> None:
    """Run the jobs that there is time for."""
    progress = Console(stderr=True)
    end = time.monotonic() + 60 * minutes
    for job in jobs:
        left = end - time.monotonic()
        if left < job.seconds:
            results.leave_out(job.title, f"{minutes:g} minutes were too short for it")
            continue
        progress.print(f"{job.title} ({left:.0f} s left)", style="bold")
        try:
            section = job.run(end)
        except Exception as error:  # noqa: BLE001  a section that cannot be built must not lose the others
            results.leave_out(job.title, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        if section.title != job.title:
            raise AssertionError(f"{section.title!r} was announced as {job.title!r}")
        section.show()
        results.add(section)
        save(results)
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    minutes: Annotated[float, typer.Option(help="How long it may take.")] = 8.0,
    threads: Annotated[int, typer.Option(help="Threads that torch uses on the CPU.")] = 1,
    tiny: Annotated[bool, typer.Option("--tiny", help="All of it on a tiny network; written only to --out.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Titles to measure, as globs such as '*resnet50*'.")] = None,
    out: Annotated[Path | None, typer.Option(help="By default bench/results/<device>.json.")] = None,
) -> None:
    """Measure everything on a device, most important first."""
    place = prepare(device, threads)
    path = out if out is not None or tiny else RESULTS / f"{slug(name_of(place))}.json"
    results = Results.load(path) if path is not None and path.exists() else Results()
    jobs = tiny_jobs(place) if tiny else jobs_of(place)
    chosen = (job for job in jobs if not only or any(fnmatch(job.title, pattern) for pattern in only))
    save = results_saver(path)
    measure_all(chosen, results, math.inf if tiny else minutes, save)
    save(results)
    console = Console()
    for title, reason in results.left_out.items():
        console.print(f"left out: {title}: {reason}")
    for name in results.wrong:
        console.print(f"WRONG: {name}", style="red")
    if path is not None:
        console.print(f"written to {path}")
    if results.wrong:
        raise typer.Exit(1)


def results_saver(path: Path | None) -> Callable[[Results], object]:
    """What writes results to a path; nothing where there is none."""
    return lambda results: None if path is None else results.save(path)
