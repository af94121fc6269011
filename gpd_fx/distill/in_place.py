"""`fit`: the trainer for a model and data that are there already, without a folder."""

from __future__ import annotations

from rich.progress import Progress
from torch import nn

from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.data.images import Images
from gpd_fx.distill.data.seeds import restored
from gpd_fx.distill.loop.checks import check_model, example_images
from gpd_fx.distill.loop.optimizers import make_accelerator
from gpd_fx.distill.loop.training_loop import Engine
from gpd_fx.distill.losses.static_teacher import given_static
from gpd_fx.distill.show.callbacks import Bar, Epoch, Watcher


def fit(
    model: nn.Module,
    images: Images,
    config: DistillConfig,
    *,
    static: nn.Module | None = None,
    progress: Progress | None = None,
    title: str = "training",
) -> list[Epoch]:
    """Train a model in place, and leave it in eval mode; nothing is written.

    The updates are those of `distill` with the same configuration, bit for bit.

    Args:
        model: a dynamic teacher, which is trained with its student, or a student to train alone. It moves to the device
            that the configuration says.
        images: what to train on, and what to evaluate on after each epoch.
        config: how to train. What it says of the student, of widening it, of data and of files does not count here.
        static: a static teacher, instead of the one that the configuration names, if any; it is frozen.
        progress: a `rich` display to show the updates in.
        title: what the display calls this run.

    Returns:
        What each epoch showed.

    Raises:
        ArgumentError: a value cannot work, a package is missing, or the model does not fit the data.
        TrainingError: a loss is not finite; the message names the update and the layer.
    """
    config = config.complete()
    accelerator = make_accelerator(config)
    bar: Bar | None = None
    with restored():
        example = example_images(model, images.input_size)
        check_model(model, type(model).__name__, example, images.classes)
        engine = Engine(config, model, images, given_static(config, static, example, images.classes), accelerator)
        if progress is not None and accelerator.is_main_process:
            bar = Bar(progress, title, 0, engine.epochs * engine.updates)
        try:
            return engine.run(bar or Watcher())
        finally:
            if bar is not None:
                bar.remove()
            engine.learner.release()
            model.eval()
