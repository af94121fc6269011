"""Figures that were measured together: as a table, and as JSON that is checked when it is read."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.machine import machine
from bench.measure import Row

KINDS = ("step", "compose", "depthwise", "onnx", "expand", "tune")
_MACHINE = ("device", "threads", "clock", "torch", "gpd_fx", "python", "system", "load")
_ROW = ("name", "correct", "left_out", "checks", "base", "median", "ratio", "seconds", "ratios", "memory", "figures")


class SchemaError(ValueError):
    """A results file is not what `Results.save` writes."""


@dataclass
class Section:
    """Rows that were measured side by side."""

    kind: str
    title: str
    options: dict[str, Any]
    rows: list[Row]
    machine: dict[str, Any]

    @staticmethod
    def of(kind: str, title: str, options: dict[str, Any], rows: list[Row], device: torch.device) -> Section:
        """What was measured here and now."""
        return Section(kind, title, options, rows, machine(device))

    def row(self, name: str) -> Row | None:
        """The row called `name`, where there is one and it is right."""
        return next((row for row in self.rows if row.name == name and row.seconds), None)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        rows = [row.to_dict() for row in self.rows]
        return {
            "kind": self.kind,
            "title": self.title,
            "options": self.options,
            "machine": self.machine,
            "rows": rows,
        }

    def show(self) -> None:
        """Print a table; a case that failed its check shows no speed."""
        table = Table(title=self.title)
        extra = list(dict.fromkeys(key for row in self.rows for key in row.figures))
        for column in ("case", "median ms", "min-max ms", "ratio (min-max)", "peak MB", "error", *extra):
            table.add_column(column, justify="left" if column == "case" else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*_cells(row), *(f"{row.figures[key]:.4g}" if key in row.figures else "" for key in extra))
        console = Console()
        console.width = max(console.width, 120)  # what is not a terminal counts as 80 wide
        console.print(table)
        for row in self.rows:
            if row.left_out is not None:
                console.print(f"{row.name} is left out: {row.left_out}")
        console.print(", ".join(f"{key} {value}" for key, value in self.machine.items()), style="dim")


def _cells(row: Row) -> list[str]:
    errors = max((f"{check.error:.1e}" for check in row.checks), key=float, default="")
    if row.left_out is not None:
        return [row.name, "left out", "", "", "", errors]
    if not row.correct:
        return [row.name, "WRONG", "", "", "", errors]
    memory = "" if row.memory is None else f"{row.memory / 1e6:.0f}"
    ratio = f"{row.ratio:.2f} ({min(row.ratios):.2f}-{max(row.ratios):.2f})" if row.ratio is not None else ""
    least, middle, most = (
        _milliseconds(s) for s in (min(row.seconds), statistics.median(row.seconds), max(row.seconds))
    )
    return [row.name, middle, f"{least}-{most}", ratio, memory, errors]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


@dataclass
class Results:
    """The sections of one device; `left_out` says of others by title why they are not there."""

    sections: list[Section] = field(default_factory=list[Section])
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, section: Section) -> None:
        """Put a section in, in the place of one with its title."""
        self.left_out.pop(section.title, None)
        titles = [other.title for other in self.sections]
        if section.title in titles:
            self.sections[titles.index(section.title)] = section
        else:
            self.sections.append(section)

    def leave_out(self, title: str, reason: str) -> None:
        """Say why a section is not there, unless an earlier run made it."""
        if title not in [section.title for section in self.sections]:
            self.left_out[title] = reason

    @property
    def wrong(self) -> list[str]:
        """The rows whose checks failed."""
        return [
            f"{section.title}: {row.name}"
            for section in self.sections
            for row in section.rows
            if row.left_out is None and not row.correct
        ]

    def save(self, path: Path) -> None:
        """Write all of it as JSON."""
        content = {"sections": [section.to_dict() for section in self.sections], "left_out": self.left_out}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Results:
        """Read what `save` wrote.

        Raises:
            SchemaError: the file holds something else.
        """
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        _need(isinstance(content, dict) and content.keys() == {"sections", "left_out"}, path, "the two keys")
        sections: list[Section] = []
        for found in content["sections"]:
            _need(found.keys() == {"kind", "title", "options", "machine", "rows"}, path, "the keys of a section")
            title: str = found["title"]
            _need(found["kind"] in KINDS, path, f"the kind of {title!r}")
            _need(set(_MACHINE) <= found["machine"].keys(), path, f"the machine of {title!r}")
            _need(bool(found["rows"]), path, f"rows of {title!r}")
            for row in found["rows"]:
                _check_row(path, f"{title!r}, row {row.get('name')!r}", row)
            rows = [Row.of_dict(row) for row in found["rows"]]
            sections.append(Section(found["kind"], title, found["options"], rows, found["machine"]))
        return Results(sections, content["left_out"])


def _check_row(path: Path, where: str, row: dict[str, Any]) -> None:
    _need(row.keys() == set(_ROW), path, f"the keys of {where}")
    read = Row.of_dict(row)
    _need(row["correct"] == read.correct, path, f"the verdict of {where}")
    _need(row["median"] == read.median and row["ratio"] == read.ratio, path, f"the medians of {where}")
    _need(read.correct == bool(read.seconds), path, f"speeds where and only where the checks passed, {where}")
    times = [*read.seconds, *read.ratios, *read.figures.values()]
    _need(all(math.isfinite(t) and t >= 0 for t in times), path, f"the figures of {where}")


def _need(condition: bool, path: Path, what: str) -> None:
    if not condition:
        raise SchemaError(f"{path}: {what} are not as `python -m bench` writes them")


def report(sections: Sequence[Section], out: Path | None) -> None:
    """Print sections, and write them where a path is given."""
    results = Results()
    for section in sections:
        section.show()
        results.add(section)
    if out is not None:
        results.save(out)
