"""Train students on CIFAR-10 in several ways: `python -m bench.cifar run --data cifar10.zip`, then `... show`.

Every arm first gets its own best learning rate from one grid, by accuracy on 5,000 training images that are held out;
then it is trained on all training images with that rate, once a seed. Results are JSON lines; a run that was stopped
goes on where it was, and other rates, seeds or choosing runs only add what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.cifar.arms import ABLATION, ARMS, LOSSES, MAIN
from bench.cifar.data import load
from bench.cifar.page import BEYOND, KEPT, write
from bench.cifar.show import show
from bench.cifar.tables import best_rate
from bench.cifar.train import STATIC_BLOCKS, Setting, train, trained
from bench.progress import progress_bar
from gpd_fx.io.models import save_weights

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", help=__doc__)
HELD_OUT = 5000
TUNING_SEED = 1000
Folder = Annotated[Path, typer.Option(help="Where results, weights and decoded images lie.")]
Data = Annotated[Path, typer.Option(help="CIFAR-10 as a zip or folder: train/<class>/*, test/<class>/*.")]


@app.command()
def one(
    arm: str,
    rate: float,
    seed: int,
    data: Data,
    folder: Folder = Path("cifar"),
    width: int = 8,
    blocks: int = 1,
    epochs: int = 8,
    tuning: bool = False,
    images: int = 50000,
) -> None:
    """Train one student and print the result as JSON. The arm `static` trains the static teacher, twice as long."""
    torch.set_num_threads(1)
    setting = Setting(width, blocks, epochs, folder=folder)
    learnt, tests = load(data, folder / "images.npz")
    order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(0))[:images]
    learnt = learnt.part(order)
    if tuning:
        held = min(HELD_OUT, len(learnt) // 10)
        learnt, tests = learnt.part(slice(held, None)), learnt.part(slice(held))
    started = time.perf_counter()
    record: dict[str, Any] = {"arm": arm, "rate": rate, "seed": seed, "epochs": epochs, "tuning": tuning}
    record |= {"width": width, "blocks": blocks, "images": images}
    if arm == "static":
        large = Setting(2 * width, STATIC_BLOCKS, 2 * epochs, folder=folder)
        run, model = train(ARMS["alone"], rate, seed, large, learnt, tests)
        save_weights(model, folder / "static.safetensors")
    else:
        try:
            run, model = train(ARMS[arm], rate, seed, setting, learnt, tests)
        except FloatingPointError as error:
            print(json.dumps(record | {"student": [], "error": str(error)}))
            return
        if arm == "alone":
            save_weights(model, _tuned(setting.folder, rate, seed) if tuning else trained(setting, seed))
    record |= asdict(run) | {"parameters": sum(p.numel() for p in model.parameters())}
    print(json.dumps(record | {"wall": time.perf_counter() - started}))


@app.command()
def run(
    data: Data,
    folder: Folder = Path("cifar"),
    arms: Annotated[
        str, typer.Option(help=f"Names, separated by commas: {', '.join(ARMS)}; or main, ablation, losses.")
    ] = "main",
    rates: Annotated[str, typer.Option(help="The grid of peak learning rates.")] = "0.1,0.2,0.4,0.8",
    seeds: Annotated[int, typer.Option(help="Runs at the best rate.")] = 5,
    choosing: Annotated[int, typer.Option(help="Runs a rate to choose it by, on held-out images.")] = 1,
    static_rate: Annotated[float, typer.Option(help="Peak learning rate of the static teacher.")] = 0.2,
    jobs: Annotated[int, typer.Option(help="Processes at a time, one thread each.")] = os.cpu_count() or 1,
    width: Annotated[int, typer.Option(help="Channels of the student's first stage.")] = 8,
    blocks: Annotated[int, typer.Option(help="Blocks in each of its three stages.")] = 1,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 8,
    images: Annotated[int, typer.Option(help="Training images that are used.")] = 50000,
) -> None:
    """Run what is missing, and show the table."""
    folder.mkdir(parents=True, exist_ok=True)
    load(data, folder / "images.npz")
    log = folder / "runs.jsonl"
    grid = [float(rate) for rate in rates.split(",")]
    names = list({"main": MAIN, "ablation": ABLATION, "losses": LOSSES}.get(arms) or arms.split(","))
    options = [f"--data={data}", f"--folder={folder}", f"--width={width}", f"--blocks={blocks}"]
    options += [f"--epochs={epochs}", f"--images={images}"]

    def work(stage: str, todo: list[tuple[str, float, int, bool]]) -> None:
        done = {(r["arm"], r["rate"], r["seed"], r["tuning"]) for r in read(log)}
        missing = [job for job in todo if job not in done]
        with progress_bar() as progress, ThreadPoolExecutor(jobs) as pool:
            task = progress.add_task(stage, total=len(todo), completed=len(todo) - len(missing))
            for future in as_completed([pool.submit(_one, job, options) for job in missing]):
                with log.open("a") as file:
                    file.write(future.result() + "\n")
                progress.update(task, advance=1)

    static = any(ARMS[name].static for name in names)
    trained_before = any(ARMS[name].start == "trained" for name in names)
    if static:
        work("static teacher", [("static", static_rate, 0, False)])
    first = [name for name in names if ARMS[name].start == "scratch"]
    if trained_before and "alone" not in first:
        first.insert(0, "alone")
    held_out = range(TUNING_SEED, TUNING_SEED + choosing)
    for group in (first, [name for name in names if name not in first]):
        work("learning rates", [(name, rate, seed, True) for name in group for rate in grid for seed in held_out])
        best = {name: best_rate(read(log), name) for name in group}
        if trained_before and "alone" in best:
            for seed in held_out:  # what goes on from a trained student must not have seen what is held out
                shutil.copy(_tuned(folder, best["alone"], seed), trained(Setting(folder=folder), seed))
        work("seeds", [(name, best[name], seed, False) for seed in range(seeds) for name in group])
    show(read(log), folder)


@app.command()
def page(folder: Annotated[Path | None, typer.Option(help="Take over its runs first.")] = None) -> None:
    """Make the tables and pictures of docs/cifar.md from bench/results/cifar.jsonl and cifar-beyond.jsonl."""
    if folder is not None:
        shutil.copy(folder / "runs.jsonl", KEPT)
    write(read(KEPT), read(BEYOND))


@app.command(name="show")
def show_command(folder: Folder = Path("cifar")) -> None:
    """Print the table of the runs so far, and draw them."""
    show(read(folder / "runs.jsonl"), folder)


def _tuned(folder: Path, rate: float, seed: int) -> Path:
    """Where the student lies that was trained alone without the held-out images."""
    return folder / f"tuned-{rate:g}-{seed}.safetensors"


def read(log: Path) -> list[dict[str, Any]]:
    """All records so far; a last line that was cut off is left out."""
    if not log.exists():
        return []
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _one(job: tuple[str, float, int, bool], options: list[str]) -> str:
    arm, rate, seed, tuning = job
    command = [sys.executable, "-W", "ignore", "-m", "bench.cifar", "one", arm, str(rate), str(seed), *options]
    command += ["--tuning"] if tuning else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    app()
