"""Sweep over whole models: `python -m bench.zoo [GROUP ...]`.

Every model is checked in a process of its own (see `bench.zoo.check`). One JSON line a model is appended to the results
file; models that stand there are not run again, so an interrupted sweep goes on where it stopped. Ends with a table,
and with exit code 1 if any model is wrong or failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bench.zoo.models import GROUPS

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", help=__doc__)
_MARK = "RECORD "
_INTRODUCTION = """# Models expanded

Made by `python -m bench.zoo`. Every parameter and buffer is random, everything is float64, batches differ from the
example's. Errors are the largest |difference| / |output| of teacher and student over the ratios 2, 3 and 1.5 with the
default branches: in eval mode, and in train mode with dropout and stochastic depth at zero. *exact* means that all are
within 1e-9, or within 100 times what one unit in the last place of the input does to the model. *fold* is the folded
student against the teacher's after a training step, *ONNX* the folded student in ONNX Runtime in float32. *coverage* is
the share of parameters on a widened axis and *parameters* the teacher's, branches apart, both at ratio 2.
*expand/capture* compares processor time, without verification, with the two captures alone.

"""


@app.command()
def sweep(
    groups: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(GROUPS)}, or single models.")] = None,
    out: Annotated[Path, typer.Option(help="Results, one JSON line a model.")] = Path("zoo.jsonl"),
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = os.cpu_count() or 1,
    ratio: Annotated[list[float] | None, typer.Option(help="Expansion ratios; repeat for several.")] = None,
    onnx: Annotated[bool, typer.Option(help="Export the folded student and run it in ONNX Runtime.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds a model may take.")] = 1800.0,
    page: Annotated[Path | None, typer.Option(help="Also write the table as Markdown.")] = None,
    fresh: Annotated[bool, typer.Option(help="Run models again that have a result.")] = False,
) -> None:
    """Check models and print what was found."""
    names = list(
        dict.fromkeys(n for group in groups or ["core"] for n in (GROUPS[group]() if group in GROUPS else [group]))
    )
    if fresh:
        out.unlink(missing_ok=True)
    known = {record["name"] for record in read(out)}
    todo = [name for name in names if name not in known]
    options = ["--onnx" if onnx else "--no-onnx", *(f"--ratio={r}" for r in ratio or (2.0, 3.0, 1.5))]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("models", total=len(names), completed=len(names) - len(todo))
        threads = max((os.cpu_count() or 1) // jobs, 1)
        futures = {pool.submit(_run, name, options, timeout, threads): name for name in todo}
        for future in as_completed(futures):
            with out.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
            progress.update(task, advance=1, description=futures[future])
    records = [record for record in read(out) if record["name"] in names]
    records.sort(key=lambda record: names.index(record["name"]))
    Console().print(summary(records))
    if page is not None:
        page.write_text(markdown(records), encoding="utf-8")
    bad = [record["name"] for record in records if not record["exact"]]
    typer.echo(f"{len(records) - len(bad)} passed, {len(bad)} failed{': ' if bad else ''}{', '.join(bad)}")
    raise typer.Exit(1 if bad else 0)


def _run(name: str, options: Sequence[str], timeout: float, threads: int) -> dict[str, Any]:
    """One model in a process of its own."""
    command = [sys.executable, "-m", "bench.zoo.one", name, *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "exact": False, "error": f"more than {timeout:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        return {"name": name, "exact": False, "error": done.stderr.strip()[-2000:] or f"exit code {done.returncode}"}
    return json.loads(lines[-1].removeprefix(_MARK))


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a results file, the last one of each model."""
    if not path.exists():
        return []
    return list({record["name"]: record for record in map(json.loads, path.read_text().splitlines())}.values())


COLUMNS = ("model", "exact", "eval", "train", "fold", "ONNX", "coverage", "parameters", "expand/capture")


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """What the tables show of a model."""
    if "error" in record:
        return (record["name"], f"failed: {record['error'].splitlines()[-1][:60]}", *([""] * (len(COLUMNS) - 2)))
    return (
        record["name"],
        "yes" if record["exact"] else "NO",
        _worst(record["eval_error"]),
        _worst(record["train_error"]),
        _number(record["fold_error"]),
        _number(record["onnx_error"]),
        f"{record['coverage']:.4f}",
        f"x{record['factor']:.2f}",
        f"{record['expand_seconds'] / max(record['capture_seconds'], 1e-9):.2f}",
    )


def summary(records: Sequence[dict[str, Any]]) -> Table:
    """A row a model."""
    table = Table(title="Largest relative errors, float64, everything random")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for record in records:
        table.add_row(*row(record))
    return table


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The page `docs/zoo.md`."""
    rules = "|---|" + "---:|" * (len(COLUMNS) - 1)
    lines = [f"| {' | '.join(COLUMNS)} |", rules, *(f"| {' | '.join(row(record))} |" for record in records)]
    explained = [record for record in records if "error" not in record and record["coverage"] < 0.99]
    text = _INTRODUCTION + "\n".join(lines) + "\n"
    if explained:
        text += "\nCoverage below 0.99, by the operations that hold parameters back:\n\n"
    for record in explained:
        causes = "; ".join(f"{op}: {reason} ({cost:,} parameters)" for op, reason, cost in record["frozen"][:3])
        text += f"- {record['name']}: {causes}\n"
    return text


def _worst(errors: dict[str, float]) -> str:
    return _number(max(errors.values(), default=None))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


if __name__ == "__main__":
    app()
