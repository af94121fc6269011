"""What a sweep found, as a table for the terminal and as the page `docs/zoo.md`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from rich.table import Table

from bench.zoo.plot import in_words

Records = Sequence[dict[str, Any]]

_INTRODUCTION = """# Models expanded

Made by `make zoo ZOO_ARGS="core"` and then `make zoo ZOO_ARGS="all --no-step --page docs/zoo.md --plot docs/zoo.svg"`
{versions}. Every parameter and buffer is random, everything
is float64, batches differ from the example's. Errors are the largest |difference| / |output| of teacher and student
over the ratios 2, 3 and 1.5 (fewer where memory asks for it, as the last column says) with the default branches: in
eval mode, and in train mode with dropout and stochastic depth at zero. *exact* means that all are within 1e-9, or
within 100 times what one unit in the last place of the input does to the model, and that no rule failed; of models too
large for the memory at hand only the *shapes* were compared, on the meta device. *fold* is the folded student against
the teacher's after a training step, *ONNX* the folded student in ONNX Runtime in float32, where they were taken (`core`
is what the continuous integration runs). *coverage* is the share of parameters on a widened axis and *parameters* the
teacher's, branches apart, both at ratio 2. *rewrite/capture* compares the processor time of analysis, planning and
rewriting with that of the two captures.

"""
_SUITES = {
    "own": "Written for this sweep",
    "hf": "Hugging Face transformers, from small configurations",
    "torchvision": "torchvision",
    "timm": "timm: the smallest model of every file, and the smallest of all",
}
_INHERENT = 0.99  # below it the page says what holds parameters back
COLUMNS = ("model", "exact", "eval", "train", "fold", "ONNX", "coverage", "parameters", "rewrite/capture", "note")


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """What the tables show of a model."""
    if record.get("error"):
        lines = record["error"].strip().splitlines()
        return (record["name"], "FAILED", *([""] * (len(COLUMNS) - 3)), lines[-1][:120].replace("|", "/"))
    return (
        record["name"],
        "NO" if not record["exact"] else "yes" if record["eval_error"] else "shapes",
        _worst(record["eval_error"]),
        _worst(record["train_error"]),
        _number(record["fold_error"]),
        _number(record["onnx_error"]),
        f"{record['coverage']:.4f}",
        f"x{record['factor']:.2f}",
        f"{cost(record):.2f}",
        _note(record),
    )


def cost(record: dict[str, Any]) -> float:
    """Processor time of analysis and rewriting over that of the captures."""
    return (record["analysis_seconds"] + record["rewrite_seconds"]) / max(record["capture_seconds"], 1e-9)


def summary(records: Records) -> Table:
    """A row a model."""
    table = Table(title="Largest relative errors, float64, everything random")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("model", "note") else "right", overflow="fold")
    for record in records:
        table.add_row(*row(record))
    return table


def markdown(records: Records) -> str:
    """The page: numbers over all, then a table for each suite with what holds its models back."""
    text = _INTRODUCTION.format(versions=_versions())
    suites = {key: [r for r in records if r["name"].partition(":")[0] == key] for key in _SUITES}
    text += "| suite | models | exact | shapes | median coverage | least | below 0.95 | worst rewrite/capture |\n"
    text += "|---|---:|---:|---:|---:|---:|---:|---:|\n"
    for key, mine in suites.items():
        sound = [r for r in mine if not r.get("error")]
        if sound:
            shares = [r["coverage"] for r in sound]
            cells = (
                _SUITES[key],
                len(mine),
                sum(r["exact"] and bool(r["eval_error"]) for r in mine),
                sum(r["exact"] and not r["eval_error"] for r in mine),
                f"{median(shares):.4f}",
                f"{min(shares):.4f}",
                sum(share < 0.95 for share in shares),
                f"{max(map(cost, sound)):.2f}",
            )
            text += f"| {' | '.join(map(str, cells))} |\n"
    text += f"\n{in_words(records)}\n\n![seconds over nodes](zoo.svg)\n"
    for key, mine in suites.items():
        if mine:
            text += f"\n## {_SUITES[key]}\n\n{_table(mine)}{_explained(mine)}"
    return text


def _table(records: Records) -> str:
    rules = "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"
    lines = [f"| {' | '.join(COLUMNS)} |", rules, *(f"| {' | '.join(row(record))} |" for record in records)]
    return "\n".join(lines) + "\n"


def _explained(records: Records) -> str:
    held = [record for record in records if not record.get("error") and record["coverage"] < _INHERENT]
    if not held:
        return ""
    text = f"\nCoverage below {_INHERENT}, by the operations that hold parameters back:\n\n"
    for record in held:
        costs: dict[tuple[str, str], int] = {}
        for op, reason, parameters in record["frozen"]:
            costs[op, reason] = costs.get((op, reason), 0) + parameters
        worst = sorted(costs.items(), key=lambda item: -item[1])[:3]
        share = max(record["parameters"], 1)
        causes = "; ".join(f"`{op}`: {reason} ({count / share:.1%} of parameters)" for (op, reason), count in worst)
        text += f"- {record['name']} ({record['coverage']:.4f}): {causes}\n"
    return text


def _note(record: dict[str, Any]) -> str:
    notes = [record["note"]] if record["note"] else []
    if record["eval_error"] and len(record["eval_error"]) < 3:
        notes.append(f"ratios {', '.join(f'{float(r):g}' for r in record['eval_error'])}")
    if record["faults"]:
        notes.append(f"a rule failed at {len(record['faults'])} nodes, which froze what they met")
    for mode in ("eval", "train"):
        if max(record[f"{mode}_error"].values(), default=0.0) > 1e-9:
            notes.append(f"one unit in the last place does {record[f'{mode}_conditioning']:.0e} in {mode} mode")
    return "; ".join(notes)


def _versions() -> str:
    found: list[str] = []
    for package in ("torch", "torchvision", "timm", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"with Python {platform.python_version()}, {', '.join(found)}"


def _worst(errors: dict[str, float]) -> str:
    return _number(max(errors.values(), default=None))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"
