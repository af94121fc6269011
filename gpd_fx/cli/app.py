"""The command `gpd-fx`; `python -m gpd_fx` is the same.

Every error that gpd_fx raises on purpose is printed as one message, with exit code 2 and no traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from gpd_fx.api.checkpoint import load
from gpd_fx.api.expansion import inspect_model
from gpd_fx.api.export import export_onnx
from gpd_fx.cli.distill import distill
from gpd_fx.cli.opt import opt
from gpd_fx.cli.options import (
    Input,
    Ratio,
    Spec,
    example_inputs,
    parse_ratios,
    report_files,
)
from gpd_fx.demo.command import demo as run_demo
from gpd_fx.errors import GPDError
from gpd_fx.io.files import output_path, write_text
from gpd_fx.io.models import load_weights, resolve, save_weights
from gpd_fx.report.expansion_report import ExpansionReport
from gpd_fx.teacher.fold import fold as fold_teacher
from gpd_fx.version import __version__


class _Group(TyperGroup):
    """Prints our own errors instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GPDError as error:
            message = Text("error: ", style="bold red")
            message.append(str(error), style="red")
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gpd-fx {__version__}")
        raise typer.Exit


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]  typer calls it
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Gap Preserving Distillation for any PyTorch model.

    A small student is widened into a **dynamic teacher** that computes the same function and shares its
    weights; both are trained together; then the student is folded out of it, at no further cost.

    **Try it**

    - `gpd-fx demo`: the whole path on handwritten digits, about two minutes
    - `gpd-fx inspect torchvision:resnet18`: what a teacher of twice the width would look like
    - `gpd-fx distill --student timm:resnet18,num_classes=10 --data ./images`: train it on folders of images
    - `gpd-fx fold my.models:student teacher.safetensors student.safetensors`: a trained student, plain again
    - `gpd-fx export my.models:student student.onnx --weights student.safetensors`: for ONNX Runtime
    - `gpd-fx opt model.pt2 -p 'normalize,widen{ratio=2},merge' -o wide.pt2`: passes over an exported program
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that the demo writes.")] = Path(
        "gpd-demo"
    ),
    seeds: Annotated[int, typer.Option(help="How often all is repeated, from other random numbers.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the training images, for either arm.")] = 15,
    ratio: Ratio = 2.0,
) -> None:
    """Expand, train, fold and export a small student on real handwritten digits.

    A student trained alone is compared with the same student trained together with its dynamic teacher, on the same
    budget. Ends with a table; writes student.onnx, teacher.safetensors, the expansion report, all metrics and a plot.

    The budget is short: with 40 epochs the student learns these digits alone as well, and there is nothing to gain.

    **Examples**

    - `gpd-fx demo`
    - `gpd-fx demo --seeds 3 --ratio 3 --out /tmp/demo`
    """
    run_demo(out, seeds=seeds, epochs=epochs, ratio=ratio)


@app.command()
def inspect(
    spec: Spec,
    ratios: Annotated[
        list[str] | None,
        typer.Option(
            "--ratio",
            "-r",
            metavar="RATIO",
            help="How many times wider the teacher is; 1 or more. Or GLOB=RATIO for parameters of such names, as "
            "'layer1.*=3'; repeatable, and the last that matches a name counts.  [default: 2]",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Leave parameters of such names, as 'layer4.*', as they are; repeatable."),
    ] = None,
    inputs: Input = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report to FILE as JSON as well.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it to FILE as Markdown as well.")] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the graph to FILE.svg, its widened and frozen parts in colours."),
    ] = None,
) -> None:
    """Show what a dynamic teacher of the model would look like; nothing is trained or downloaded.

    Lists the channel groups that widen, by block, those that are frozen, by which operation and why, and the parameters
    and FLOPs of both networks.

    **Examples**

    - `gpd-fx inspect torchvision:densenet121`
    - `gpd-fx inspect timm:convnext_tiny --ratio 1.5 --json report.json --markdown report.md`
    - `gpd-fx inspect torchvision:resnet18 --exclude 'layer4.*' --picture resnet18.svg`
    - `gpd-fx inspect torchvision:resnet18 --ratio 1.5 --ratio 'layer1.*=3'`
    - `gpd-fx inspect gpd_fx.demo:DigitNet --input 1,8,8`
    """
    targets = report_files({"--json": json_file, "--markdown": markdown, "--picture": picture})
    ratio = parse_ratios(ratios)
    report = inspect_model(resolve(spec), ratio, example_inputs(inputs), exclude=exclude or ())
    typer.echo(str(report))
    forms: dict[str, Callable[[ExpansionReport], str]] = {
        "--json": lambda made: json.dumps(made.to_dict(), indent=2),
        "--markdown": ExpansionReport.to_markdown,
        "--picture": ExpansionReport.to_svg,
    }
    for option, target in targets.items():
        write_text(target, forms[option](report))
        typer.echo(f"\nwritten: {target}")


app.command()(distill)
app.command()(opt)


@app.command()
def fold(
    spec: Spec,
    checkpoint: Annotated[Path, typer.Argument(help="A dynamic teacher written by gpd_fx.save.", metavar="CHECKPOINT")],
    out: Annotated[Path, typer.Argument(help="Where to write the student's weights (safetensors).", metavar="OUT")],
    onnx: Annotated[Path | None, typer.Option("--onnx", metavar="FILE", help="Export to this ONNX file too.")] = None,
    inputs: Input = None,
) -> None:
    """Take the student out of a trained dynamic teacher.

    OUT holds the state_dict of the plain model: the same keys and shapes as SPEC's, ready for load_state_dict.

    **Examples**

    - `gpd-fx fold gpd_fx.demo:DigitNet gpd-demo/teacher.safetensors student.safetensors --input 1,8,8`
    - `gpd-fx fold my.models:student teacher.safetensors student.safetensors --onnx student.onnx`
    """
    for path in (out, *([] if onnx is None else [onnx])):
        output_path(path)  # refuses before the work
    examples = example_inputs(inputs)
    student = fold_teacher(load(checkpoint, resolve(spec), examples))
    save_weights(student, out)
    typer.echo(f"written: {out} ({sum(parameter.numel() for parameter in student.parameters()):,} parameters)")
    if onnx is not None:
        typer.echo(str(export_onnx(student, onnx, examples)))


@app.command()
def export(
    spec: Spec,
    out: Annotated[Path, typer.Argument(help="The ONNX file to write.", metavar="OUT")],
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="The model's state_dict (safetensors).")
    ] = None,
    inputs: Input = None,
) -> None:
    """Write a model to ONNX with a free batch size, checked against ONNX Runtime.

    Where ONNX Runtime disagrees with PyTorch no file is written.

    **Examples**

    - `gpd-fx export my.models:student student.onnx --weights student.safetensors`
    - `gpd-fx export torchvision:resnet18 resnet18.onnx --input 3,160,160`
    """
    model = resolve(spec)
    if weights is None:
        typer.echo("no --weights given: the file will hold random weights", err=True)
    else:
        load_weights(model, weights)
    typer.echo(str(export_onnx(model, out, example_inputs(inputs))))


def main() -> None:
    """Run the command line."""
    if "" not in sys.path:  # a console script does not search the current folder, which `python -m` does
        sys.path.insert(0, "")
    app(prog_name="gpd-fx")
