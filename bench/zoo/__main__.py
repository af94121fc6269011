"""Sweep over whole models: `python -m bench.zoo [GROUP ...]`.

Models are checked in worker processes (see `bench.zoo.check`). One JSON line a model is appended to the results file;
models that stand there are not run again, so an interrupted sweep goes on where it stopped. Ends with a table, and with
exit code 1 if any model is wrong or failed.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.progress import progress_bar
from bench.zoo.models import GROUPS
from bench.zoo.page import markdown, summary
from bench.zoo.plot import draw
from bench.zoo.worker import Worker

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", help=__doc__)


@app.command()
def sweep(
    groups: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(GROUPS)}, or single models.")] = None,
    out: Annotated[Path, typer.Option(help="Results, one JSON line a model.")] = Path("zoo.jsonl"),
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = os.cpu_count() or 1,
    ratio: Annotated[list[float] | None, typer.Option(help="Expansion ratios; repeat for several.")] = None,
    step: Annotated[bool, typer.Option(help="Take a training step, fold, and export to ONNX.")] = True,
    memory: Annotated[float, typer.Option(help="GiB for all processes together; 0: what the machine has.")] = 0.0,
    timeout: Annotated[float, typer.Option(help="Seconds a model may take.")] = 1800.0,
    page: Annotated[Path | None, typer.Option(help="Also write the table as Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw seconds over nodes (.svg or .png).")] = None,
    fresh: Annotated[bool, typer.Option(help="Run models again that have a result.")] = False,
) -> None:
    """Check models and print what was found."""
    wanted = groups or ["core"]
    names = list(dict.fromkeys(n for group in wanted for n in (GROUPS[group]() if group in GROUPS else [group])))
    if fresh:
        out.unlink(missing_ok=True)
    known = {record["name"] for record in read(out)}
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        if name not in known:
            todo.put(name)
    each = (memory or 0.85 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30) / jobs
    options = [
        f"--memory={each}",
        *(["--step", "--onnx"] if step else ["--no-step", "--no-onnx"]),
        *(f"--ratio={r}" for r in ratio or ()),
    ]
    lock = threading.Lock()
    with progress_bar() as progress:
        task = progress.add_task("models", total=len(names), completed=len(names) - todo.qsize())

        def work() -> None:
            with Worker(options, timeout, threads=max((os.cpu_count() or 1) // jobs, 1)) as worker:
                while True:
                    try:
                        name = todo.get_nowait()
                    except queue.Empty:
                        return
                    record = worker.check(name)
                    with lock, out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    progress.update(task, advance=1, description=name)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    records = [record for record in read(out) if record["name"] in names]
    records.sort(key=lambda record: names.index(record["name"]))
    Console().print(summary(records))
    if page is not None:
        page.write_text(markdown(records), encoding="utf-8")
    if plot is not None:
        draw(records, plot)
    bad = [record["name"] for record in records if not record["exact"]]
    typer.echo(f"{len(records) - len(bad)} passed, {len(bad)} failed{': ' if bad else ''}{', '.join(bad)}")
    raise typer.Exit(1 if bad else 0)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a results file, the last one of each model."""
    if not path.exists():
        return []
    return list({record["name"]: record for record in map(json.loads, path.read_text().splitlines())}.values())


if __name__ == "__main__":
    app()
