"""Random models by the thousand: `python -m bench.fuzz --graphs 20000`.

Each is widened by several ratios and compared with itself in float64 (see `tests.graph_check`); some also go through
`expand`, a training step and fold. A failure is printed as the smallest program that shows it, and as a test to keep.
Models that torch.export cannot capture are counted, and are no failures.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import gpd_fx
from bench.progress import progress_bar
from gpd_fx.rules.table import RULES
from tests.graph_check import WrongError
from tests.graph_shrink import as_code, shrink
from tests.graph_trials import draw_trial

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", help=__doc__)
_CHUNK = 10  # trials that a process is given at a time
_LIFE = 100  # chunks after which a process makes room for a fresh one


@dataclass
class Failure:
    """A trial that failed: its number, how, and a smaller one as text."""

    number: int
    text: str
    smaller: str


@dataclass
class Tally:
    """What came of some trials."""

    right: int = 0
    refused: int = 0
    widened: int = 0
    nodes: int = 0
    seconds: float = 0.0
    ops: Counter[str] = field(default_factory=Counter[str])
    failures: list[Failure] = field(default_factory=list[Failure])

    @property
    def count(self) -> int:
        """How many there were."""
        return self.right + self.refused + len(self.failures)

    def add(self, other: Tally) -> None:
        """Take others in."""
        self.right += other.right
        self.refused += other.refused
        self.widened += other.widened
        self.nodes += other.nodes
        self.seconds += other.seconds
        self.ops.update(other.ops)
        self.failures += other.failures


def run_chunk(seed: int, numbers: range, shrink_seconds: float) -> Tally:
    """Run trials one after the other."""
    tally, started = Tally(), time.process_time()
    for number in numbers:
        trial = draw_trial(seed, number)
        try:
            found = trial.run()
        except gpd_fx.CaptureError:
            tally.refused += 1
        except WrongError as error:
            smaller = shrink(trial, shrink_seconds)
            text = f"{smaller}\n\n{as_code(smaller, f'graph_{seed}_{number}')}"
            tally.failures.append(Failure(number, str(error), text))
        else:
            tally.right += 1
            tally.widened += found.widened > 0
            tally.nodes += found.nodes
            tally.ops.update(found.ops)
    tally.seconds = time.process_time() - started
    return tally


def _prepare() -> None:
    """A process of the pool: one thread, and an interrupt is the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays


@app.command()
def fuzz(
    graphs: Annotated[int, typer.Option(help="How many random models.")] = 20000,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = os.cpu_count() or 1,
    seed: Annotated[int, typer.Option(help="Other models for another seed.")] = 0,
    first: Annotated[int, typer.Option(help="The number of the first model, to run a part again.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long.")] = None,
    failures: Annotated[int, typer.Option(help="Stop after so many failures.")] = 20,
    shrink_seconds: Annotated[float, typer.Option(help="How long a failure may be made smaller.")] = 120.0,
    ops: Annotated[bool, typer.Option("--ops", help="Also list the rules that no model had a use for.")] = False,
) -> None:
    """Check random models; print what failed; exit with code 1 if anything did."""
    console, total, started = Console(soft_wrap=True, highlight=False), Tally(), time.monotonic()
    chunks = (range(k, min(k + _CHUNK, first + graphs)) for k in range(first, first + graphs, _CHUNK))
    until = None if minutes is None else started + 60 * minutes
    broken = ""
    with _progress(graphs) as progress:
        task = next(iter(progress.task_ids))
        try:
            for tally in _tallies(seed, chunks, jobs, shrink_seconds, until):
                total.add(tally)
                progress.update(task, advance=tally.count, description=f"{len(total.failures)} failed")
                for failure in tally.failures:
                    console.print(f"\nseed {seed}, graph {failure.number}: {failure.text}", markup=False)
                    console.print(f"{failure.smaller}\n", markup=False)
                if len(total.failures) >= failures:
                    break
        except KeyboardInterrupt:
            console.print("interrupted")
        except BrokenProcessPool:
            broken = "a process died: run the graphs that are missing with --jobs 1"
    elapsed = time.monotonic() - started
    done = max(total.count, 1)
    console.print(
        f"seed {seed}: {total.count} random models in {elapsed:.0f} s, {total.seconds / done:.3f} s of processor time "
        f"and {total.nodes / max(total.right, 1):.0f} nodes each; {total.widened} widened, {total.refused} not captured"
    )
    if ops:
        unmet = [
            name for name in RULES if f"aten.{name}" not in total.ops and f"aten.{_in_place(name)}" not in total.ops
        ]
        console.print(f"{len(unmet)} rules without a use: {', '.join(sorted(unmet))}")
    if broken:
        console.print(broken)
    print(f"{total.right + total.refused} passed, {len(total.failures) + bool(broken)} failed")
    raise typer.Exit(1 if total.failures or broken else 0)


def _in_place(name: str) -> str:
    return name.replace(".", "_.", 1)


@contextmanager
def _progress(graphs: int) -> Generator[Progress]:
    with progress_bar() as progress:
        progress.add_task("0 failed", total=graphs)
        yield progress


def _tallies(
    seed: int, chunks: Iterator[range], jobs: int, shrink_seconds: float, until: float | None
) -> Iterator[Tally]:
    """The tally of each chunk, as they are done; no more begin after `until`."""
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_prepare, max_tasks_per_child=_LIFE
    ) as pool:
        running: set[Future[Tally]] = set()
        try:
            while True:
                if until is None or time.monotonic() < until:
                    for chunk in islice(chunks, 2 * jobs - len(running)):
                        running.add(pool.submit(run_chunk, seed, chunk, shrink_seconds))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    app()
