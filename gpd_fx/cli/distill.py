"""The options of `gpd-fx distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gpd_fx.cli.distill_command import run_command
from gpd_fx.cli.options import parse_ratios, parse_shape


def distill(
    student: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="The model to train, named as for `inspect`, options after commas."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder with train/ and val/ (or valid/, validation/, test/), each with one folder of images a class; "
            "with --dataset the place of that data set.",
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A data set that timm reads: torch/cifar10, hfds/NAME, ...")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run.")] = Path("gpd-run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, as if never stopped.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file of values, such as the config.yaml of another run; options win."),
    ] = None,
    student_weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Fine-tuning: weights to begin with (safetensors).")
    ] = None,
    static_teacher: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="A pretrained model to learn from as well: a model's name, or an ONNX file."),
    ] = None,
    static_weights: Annotated[str | None, typer.Option(metavar="FILE", help="Its weights (safetensors).")] = None,
    static_loss: Annotated[str | None, typer.Option(metavar="dkd|kd", help="How to learn from it.  [dkd]")] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NAME",
            help="Compare the outputs of a module or node of the student with those of one of the static teacher as "
            "well (ReviewKD); repeatable, from shallow to deep.",
        ),
    ] = None,
    static_compile: Annotated[bool, typer.Option("--static-compile", help="Compile it.")] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Without a dynamic teacher: the baseline to compare with.")
    ] = False,
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            "--ratio", "-r", metavar="RATIO", help="How many times wider the teacher is, as for `inspect`.  [2]"
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="cnn|transformer", help="Which defaults of the method to take.  [cnn]")
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option("--input", metavar="SHAPE", help="Shape of an image, such as 3,32,32; else the student's."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the images.  [100; fine-tuning 50; transformer 300]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in an update, over all processes together.  [512]")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(metavar="NAME", help="One of timm's.  [momentum, adamw]")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.  [0.1; fine-tuning 0.01]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of kernels and matrices.  [1e-4, 0.05]")] = None,
    schedule: Annotated[str | None, typer.Option(metavar="NAME", help="One of timm's.  [multistep, cosine]")] = None,
    warmup_epochs: Annotated[int | None, typer.Option(help="Epochs of rising learning rate.  [0, 5]")] = None,
    mixup: Annotated[float | None, typer.Option(help="Strength of mixup.  [0, 0.8]")] = None,
    cutmix: Annotated[float | None, typer.Option(help="Strength of cutmix.  [0, 1]")] = None,
    auto_augment: Annotated[
        str | None, typer.Option(metavar="POLICY", help="timm's, such as rand-m9-mstd0.5 or original.")
    ] = None,
    ema_decay: Annotated[
        float | None, typer.Option(help="Moving average of the weights; 0 is none.  [0.99996]")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LOSS=WEIGHT",
            help="Weight of task_student, task_teacher, distill, static or features; EPOCH:VALUE,EPOCH:VALUE "
            "changes it along a line. Repeatable.",
        ),
    ] = None,
    precision: Annotated[str | None, typer.Option(metavar="no|bf16|fp16", help="Mixed precision.  [no]")] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu", help="Where to train.  [auto]")] = None,
    sync_batch_norm: Annotated[
        bool, typer.Option("--sync-batch-norm", help="Batch-norm statistics over all processes.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that load images.  [4]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.  [0]")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any value of config.yaml, as JSON or text: clip_grad=5, 'transforms={\"re_prob\": 0.25}'.",
        ),
    ] = None,
) -> None:
    """Train a student together with its dynamic teacher on images.

    Three scenarios: **from scratch** as it stands; with a **static teacher** (`--static-teacher`), from which both
    networks learn as well; **fine-tuning** (`--student-weights`). Defaults are those that the method was published
    with, but for the weight of `distill`, 1 in place of 3; values in brackets are for convolutional networks and for
    `--recipe transformer`.

    The run is written to `--out`: config.yaml with every value, metrics.jsonl, curves, checkpoints that `--resume`
    goes on from, and at the end a table of student, teacher, their moving averages and the ONNX file, with
    student.safetensors, teacher.safetensors and student.onnx. Under `torchrun` or `accelerate launch` it trains on
    several devices.

    **Examples**

    - `gpd-fx distill --student timm:resnet18,num_classes=10 --data ./images --epochs 30 --out run`
    - `gpd-fx distill --out run --resume`
    - `gpd-fx distill --student torchvision:resnet18 --data ./imagenet --static-teacher torchvision:resnet34
      --static-weights resnet34.safetensors --precision bf16`
    - `gpd-fx distill --student my.models:small --data ./images --student-weights small.safetensors`
    - `gpd-fx distill --config run/config.yaml --alone --out baseline`
    - `torchrun --nproc-per-node 8 -m gpd_fx distill --config run/config.yaml --out run8`
    """
    given: dict[str, Any] = {
        "student": student,
        "data": data,
        "dataset": dataset,
        "student_weights": student_weights,
        "static_teacher": static_teacher,
        "static_weights": static_weights,
        "static_loss": static_loss,
        "features": None if feature is None else [pair.split("=") for pair in feature],
        "static_compile": static_compile or None,
        "alone": alone or None,
        "ratio": None if ratio is None else parse_ratios(ratio),
        "recipe": recipe,
        "input_size": None if inputs is None else parse_shape(inputs),
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "learning_rate": lr,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup_epochs": warmup_epochs,
        "mixup": mixup,
        "cutmix": cutmix,
        "transforms": None if auto_augment is None else {"auto_augment": auto_augment},
        "ema_decay": ema_decay,
        "precision": precision,
        "device": device,
        "sync_batch_norm": sync_batch_norm or None,
        "workers": workers,
        "seed": seed,
    }
    run_command(out, config, resume, given, settings or (), weight or ())
