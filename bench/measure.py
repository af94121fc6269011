"""Timing cases side by side, each gated by its checks."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from bench.machine import peak, timer

LEAST = 3
"""Rounds that are run even when time is up."""
SAMPLE = 0.05
"""Seconds that a sample lasts at least on a GPU; shorter calls are repeated without waiting in between."""


@dataclass(frozen=True)
class Check:
    """How far something is from what it should be, and how far it may be."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Case:
    """Something to time: `run` does it once, `checks` says whether it is right.

    Ratios are to the case called `base`, or to the first. A case that cannot be run says why in `left_out`. One whose
    first call does more than the next, beyond what its checks have done, is called once more: `warm`.
    """

    name: str
    run: Callable[[], object]
    checks: Callable[[], Sequence[Check]]
    base: str | None = None
    left_out: str | None = None
    warm: bool = False

    @staticmethod
    def missing(name: str, reason: str) -> Case:
        """A case that cannot be run."""
        return Case(name, lambda: None, lambda: (), left_out=reason)


@dataclass
class Row:
    """What was found for one case; `seconds` is empty where a check failed."""

    name: str
    checks: list[Check] = field(default_factory=list[Check])
    left_out: str | None = None
    base: str | None = None
    seconds: list[float] = field(default_factory=list[float])
    ratios: list[float] = field(default_factory=list[float])
    memory: int | None = None
    figures: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def correct(self) -> bool:
        """Whether there were checks and all passed."""
        return self.left_out is None and bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def median(self) -> float | None:
        """Seconds of a call; None where a check failed."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def ratio(self) -> float | None:
        """Time over that of the base, the median of the rounds."""
        return statistics.median(self.ratios) if self.ratios else None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "name": self.name,
            "correct": self.correct,
            "left_out": self.left_out,
            "checks": [{"what": c.what, "error": c.error, "tolerance": c.tolerance} for c in self.checks],
            "base": self.base,
            "median": self.median,
            "ratio": self.ratio,
            "seconds": self.seconds,
            "ratios": self.ratios,
            "memory": self.memory,
            "figures": self.figures,
        }

    @staticmethod
    def of_dict(found: dict[str, Any]) -> Row:
        """The row that `to_dict` was called on."""
        checks = [Check(c["what"], c["error"], c["tolerance"]) for c in found["checks"]]
        rest = {key: found[key] for key in ("left_out", "base", "seconds", "ratios", "memory", "figures")}
        return Row(found["name"], checks, **rest)


def measure(cases: Sequence[Case], rounds: int, device: torch.device, until: float = math.inf) -> list[Row]:
    """Check every case; then time those that are right in turn, `rounds` times after calls that are not counted.

    Once the monotonic clock is past `until` no more than `LEAST` rounds are run.
    """
    progress = Console(stderr=True)
    rows = [Row(case.name, left_out=case.left_out) for case in cases]
    pairs = list(zip(cases, rows, strict=True))
    gc.collect()
    gc.freeze()  # what is there now stays: later collections look at new objects alone
    for case, row in pairs:
        if row.left_out is None:
            attempt(row, lambda case=case, row=row: row.checks.extend(case.checks()))
        progress.print(f"{case.name}: {verdict(row)}")
    repeats: dict[str, int] = {}
    for case, row in pairs:
        if row.correct:
            attempt(row, lambda case=case, row=row: repeats.update({case.name: _warm(case, row, device)}))
    right = [(case, row) for case, row in pairs if row.correct]
    now = timer(device)
    for number in range(rounds):
        if number >= LEAST and time.monotonic() > until:
            progress.print(f"time is up after {number} rounds")
            break
        for case, row in right:
            gc.collect()
            started = now()
            for _ in range(repeats[case.name]):
                case.run()
            row.seconds.append((now() - started) / repeats[case.name])
        progress.print(f"round {number + 1} of {rounds}")
    gc.unfreeze()
    timed = {row.name: row for _, row in right}
    for case, row in right:
        row.base = case.base or cases[0].name
        if row.base in timed:
            row.ratios = [mine / base for mine, base in zip(row.seconds, timed[row.base].seconds, strict=True)]
    return rows


def attempt(row: Row, action: Callable[[], object]) -> None:
    """Do something for a row; where it fails, the row is left out and says why."""
    try:
        action()
    except Exception as error:  # noqa: BLE001  out of memory, a failed compilation: the other rows are still wanted
        row.left_out = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def verdict(row: Row) -> str:
    """What the checks of a row said."""
    if row.left_out is not None:
        return f"left out: {row.left_out}"
    found = ", ".join(f"{c.what} {c.error:.1e} (at most {c.tolerance:.1e})" for c in row.checks)
    return f"{'right' if row.correct else 'WRONG'}: {found}"


def _warm(case: Case, row: Row, device: torch.device) -> int:
    """Memory of a call; returns how many calls make one sample."""
    if case.warm or device.type != "cpu":
        case.run()
    row.memory = peak(case.run, device)
    if device.type == "cpu":
        return 1
    now = timer(device)
    started = now()
    case.run()
    return max(1, min(100, math.ceil(SAMPLE / max(now() - started, 1e-9))))
