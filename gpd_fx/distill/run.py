"""`distill`: from a configuration to a folder with everything that a run makes."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from gpd_fx.api.checkpoint import save
from gpd_fx.api.expansion import expand
from gpd_fx.api.export import export_onnx
from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.data.images import Images, Order, load_images, training_batches
from gpd_fx.distill.data.seeds import set_all
from gpd_fx.distill.loop.checks import check_model, example_images
from gpd_fx.distill.loop.evaluation import Score, percent, recalibrate
from gpd_fx.distill.loop.optimizers import make_accelerator
from gpd_fx.distill.loop.training_loop import Engine
from gpd_fx.distill.losses.static_teacher import OnnxTeacher, given_static
from gpd_fx.distill.show.callbacks import Bar, Reporter, Watcher
from gpd_fx.distill.show.metrics import Recorder, new_run, plot_metrics, read_metrics
from gpd_fx.distill.state.checkpoints import Store
from gpd_fx.distill.state.snapshot import checkpoints
from gpd_fx.io.files import write_text
from gpd_fx.io.models import load_weights, resolve, save_weights
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.teacher.fold import fold


@dataclass(frozen=True)
class Results:
    """How a run ended.

    Attributes:
        scores: on the test images, by what was evaluated.
        parameters: of the same.
        onnx: what the export reports, where there was one.
        student: the trained student, plain again; in eval mode, on the CPU.
        folder: of the run.
    """

    scores: dict[str, Score]
    parameters: dict[str, int]
    student: nn.Module
    folder: Path
    onnx: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        scores = {name: {**asdict(each), "parameters": self.parameters[name]} for name, each in self.scores.items()}
        return {"scores": scores, "onnx": self.onnx}

    def table(self) -> Table:
        """The scores side by side."""
        images = next(iter(self.scores.values())).images
        table = Table(title=f"Test images: {images:,}")
        for name in ("", "top-1 %", "top-5 %", "loss", "parameters"):
            table.add_column(name, justify="left" if not name else "right")
        for name, each in self.scores.items():
            size = f"{self.parameters[name]:,}" if self.parameters[name] else "-"
            table.add_row(name, percent(each.top1), percent(each.top5), f"{each.loss:.4f}", size)
        return table


def distill(
    config: DistillConfig,
    folder: Path,
    *,
    resume: bool = False,
    student: nn.Module | None = None,
    images: Images | None = None,
    static: nn.Module | None = None,
    console: Console | None = None,
) -> Results:
    """Train a student by a configuration, and write the run to `folder`.

    The folder gets config.yaml, metrics.jsonl, checkpoints/, the report of the expansion, curves.svg and .png,
    results.json, and the results themselves: student.safetensors, student_ema.safetensors, teacher.safetensors,
    student.onnx.

    Args:
        config: what to do; values that are None are those of its recipe.
        folder: a new one, or with `resume` that of the run to take up.
        resume: go on from the newest checkpoint.
        student: the model to begin with, instead of the one that the configuration names; it is not changed.
        images: what to train on, instead of what the configuration names.
        static: the static teacher, instead of the one that the configuration names; it is frozen.
        console: where progress is shown; standard error where not given.

    Raises:
        ArgumentError: a value cannot work, something is missing, or the folder holds another run.
        CheckpointError: weights or a checkpoint do not fit.
        TrainingError: a loss is not finite, or the run was stopped; the message says how to go on.
    """
    config = config.complete()
    accelerator = make_accelerator(config)
    main: bool = accelerator.is_main_process
    shown = (console or Console(stderr=True)) if main else Console(quiet=True)
    with new_run(folder, resume) if main else contextlib.nullcontext():
        set_all(config.seed)
        plain = resolve(config.student) if student is None else student
        if config.student_weights is not None and student is None:
            load_weights(plain, config.student_weights)
        data = load_images(config, plain) if images is None else images
        example = (example_images(plain, data.input_size),)
        check_model(plain, config.student, example[0], data.classes)
        taught = given_static(config, static, example[0], data.classes)
        again = resume and bool(checkpoints(folder / "checkpoints"))
        model = copy.deepcopy(plain).train() if config.alone else _widen(config, plain, example, verify=not again)
        engine = Engine(config, model, data, taught, accelerator, Store.of(folder, config, model))
        if resume:
            engine.resume()
        if main:
            if isinstance(model, DynamicTeacher):
                write_text(folder / "report.txt", f"{model.report()}\n")
            config.save(folder / "config.yaml")
    _introduce(config, engine, shown)
    if main:
        _run_shown(engine, folder, shown)
    else:
        engine.run(Watcher())
    return _finish(engine, folder, example, shown)


def _widen(config: DistillConfig, student: nn.Module, example: tuple[Tensor, ...], verify: bool) -> DynamicTeacher:
    return expand(
        student,
        config.ratio,
        example,
        branches=config.branches,
        exclude=config.exclude,
        seed=config.seed,
        verify=verify,
    )


def _run_shown(engine: Engine, folder: Path, console: Console) -> None:
    """Train on the main process: with a bar, lines on the console, and metrics."""
    done, total = engine.position.update, engine.epochs * engine.updates
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    with Recorder(folder, done) as recorder, progress:
        bar = Bar(progress, "updates", done, total)
        engine.run(Reporter(bar, recorder, console, engine.config.log_every, engine.epochs))


def _introduce(config: DistillConfig, engine: Engine, console: Console) -> None:
    model, at = engine.learner.model, engine.position
    if isinstance(model, DynamicTeacher):
        report = model.report()
        console.print(
            f"dynamic teacher: {report.student_parameters:,} -> {_size(model):,} parameters, coverage "
            f"{report.coverage:.4f}",
            highlight=False,
        )
    if engine.learner.unused:
        names = [name.removeprefix("model.") for name in engine.learner.unused]
        listed = ", ".join(names if len(names) < 6 else [*names[:5], "..."])
        console.print(
            f"note: no output depends on {len(names)} parameters, which stay as they are: {listed}", highlight=False
        )
    steps = engine.epochs * engine.updates
    console.print(
        f"{engine.epochs} epochs of {engine.updates} updates of {config.batch_size} images, {engine.world} "
        f"process{'es' if engine.world > 1 else ''} on {engine.device}"
        + (f"; going on after update {at.update}" if at.update else ""),
        highlight=False,
    )
    if config.ema_decay and not config.ema_warmup and (1 - config.ema_decay) * steps < 3:
        console.print(
            f"note: a moving average with decay {config.ema_decay:g} is longer than {steps:,} updates, so it will hold "
            "mostly the first weights; lower ema_decay, or set ema_warmup",
            highlight=False,
        )


def _finish(engine: Engine, folder: Path, example: tuple[Tensor, ...], console: Console) -> Results:
    """Evaluate everything, and write what the run made."""
    config, main = engine.config, engine.accelerator.is_main_process
    model, ema = engine.learner.model, engine.learner.ema
    engine.learner.release()
    scores = engine.evaluate()
    sizes = {name: _size(model) if name.startswith("teacher") else 0 for name in scores}
    student = _plain(model)
    if main and config.recalibrate:
        save_weights(student, folder / "student_before_recalibration.safetensors")
    if config.recalibrate:
        recalibrate(student.to(engine.device), _some_images(engine, config.recalibrate))
        scores["student, batch norm recalibrated"] = engine.score(student)["student"]
        student = student.cpu()
    if engine.static is not None:
        call = engine.static
        scores["static teacher"] = engine.score_call(lambda images: {"it": call(images)})["it"]
    onnx: dict[str, Any] = {}
    if main:
        save_weights(student, folder / "student.safetensors")
        if isinstance(model, DynamicTeacher):
            save(model, folder / "teacher.safetensors")
        if ema is not None:
            save_weights(_plain(ema.module), folder / "student_ema.safetensors")
        if config.onnx:
            onnx = export_onnx(student, folder / "student.onnx", example).to_dict()
    engine.accelerator.wait_for_everyone()
    if config.onnx:
        runtime = OnnxTeacher(folder / "student.onnx")
        scores["student in ONNX Runtime"] = engine.score_call(lambda images: {"it": runtime(images)})["it"]
    small = sum(parameter.numel() for parameter in student.parameters())
    sizes = {name: sizes.get(name, 0) or small for name in scores}
    if engine.static is not None:
        module = engine.static.module
        sizes["static teacher"] = 0 if module is None else _size(module)
    results = Results(scores, sizes, student, folder, onnx)
    if main:
        write_text(folder / "results.json", json.dumps(results.to_dict(), indent=2))
        plot_metrics(folder, read_metrics(folder), config.student)
        console.print(results.table())
        console.print(f"written: {folder}", highlight=False)
    return results


def _plain(model: nn.Module) -> nn.Module:
    """The student as a plain module on the CPU, in eval mode; the model that it comes from stays as it is."""
    student = fold(model) if isinstance(model, DynamicTeacher) else copy.deepcopy(model)
    return student.cpu().eval()


def _some_images(engine: Engine, count: int) -> Iterable[Tensor]:
    """Augmented training images, the same on every process."""
    config = engine.config
    total = len(cast("Any", engine.images.train))
    order = Order(total, config.batch_size, config.seed, 0, 1, engine.epochs)
    batches = training_batches(engine.images.train, order, config.workers, False)
    for _, (images, _) in zip(range(count), batches, strict=False):
        yield images.to(engine.device)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
