"""The command `gpd-fx`; `python -m gpd_fx` is the same.

Every error that gpd_fx raises on purpose is printed as one message, with exit code 2 and no traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from gpd_fx import __version__
from gpd_fx.errors import ArgumentError, GPDError

if TYPE_CHECKING:
    from torch import Tensor


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

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="The model: torchvision:NAME, timm:NAME, or package.module:factory, where the factory is a module class, "
        "a function that returns a module, or a module. Options follow after commas, as in "
        "timm:resnet18,num_classes=10. The current folder is searched too.",
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of one input without the batch, such as 3,224,224; once for each input. Inferred where left out.",
    ),
]
Ratio = Annotated[float, typer.Option("--ratio", "-r", help="How many times wider the teacher is; 1 or more.")]


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
    - `gpd-fx fold my.models:student teacher.safetensors student.safetensors`: a trained student, plain again
    - `gpd-fx export my.models:student student.onnx --weights student.safetensors`: for ONNX Runtime
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that the demo writes.")] = Path(
        "gpd-demo"
    ),
    seeds: Annotated[int, typer.Option(help="How often all is repeated, from other random numbers.")] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training images, for either arm.")] = 40,
    ratio: Ratio = 2.0,
) -> None:
    """Expand, train, fold and export a small student on real handwritten digits.

    A student trained alone is compared with the same student trained together with its dynamic teacher, on the same
    budget. Ends with a table; writes student.onnx, teacher.safetensors, the expansion report, all metrics and a plot.

    **Examples**

    - `gpd-fx demo`
    - `gpd-fx demo --seeds 5 --ratio 3 --out /tmp/demo`
    """
    from gpd_fx.demo import demo as run

    run(out, seeds=seeds, epochs=epochs, ratio=ratio)


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
    from gpd_fx import ExpansionReport, inspect_model
    from gpd_fx.files import write_text
    from gpd_fx.models import resolve

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


def report_files(given: Mapping[str, Path | None]) -> dict[str, Path]:
    """The files that options ask for.

    Raises:
        ArgumentError: one cannot be written, two are the same, or a picture is not to be an SVG file.
    """
    from gpd_fx.files import output_path

    targets = {option: output_path(path) for option, path in given.items() if path is not None}
    first: dict[Path, str] = {}
    for option, target in targets.items():
        other = first.setdefault(target.resolve(), option)
        if other != option:
            raise ArgumentError(f"{other} and {option} both name the file {str(target)!r}")
    picture = targets.get("--picture")
    if picture is not None and picture.suffix.lower() != ".svg":
        raise ArgumentError(f"--picture {str(picture)!r}: pictures are SVG files; call it {picture.stem + '.svg'!r}")
    return targets


def parse_ratios(given: list[str] | None) -> float | dict[str, float]:
    """What `--ratio` gave: a number, or numbers by glob, where a plain number is for all names.

    Raises:
        ArgumentError: a ratio is not a number.
    """
    pairs = [item.rpartition("=")[::2] for item in given or ["2"]]
    ratios: dict[str, float] = {}
    for glob, number in pairs:
        try:
            value = float(number)
        except ValueError:
            what = f"{glob}={number}" if glob else number
            raise ArgumentError(f"--ratio {what!r} must be a number, or GLOB=NUMBER such as 'layer1.*=2'") from None
        ratios.pop(glob or "*", None)  # the last counts, also of the same glob
        ratios[glob or "*"] = value
    return ratios["*"] if list(ratios) == ["*"] else ratios


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
    from gpd_fx import export_onnx, load
    from gpd_fx import fold as fold_teacher
    from gpd_fx.files import output_path
    from gpd_fx.models import resolve, save_weights

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
    from gpd_fx import export_onnx
    from gpd_fx.models import load_weights, resolve

    model = resolve(spec)
    if weights is None:
        typer.echo("no --weights given: the file will hold random weights", err=True)
    else:
        load_weights(model, weights)
    typer.echo(str(export_onnx(model, out, example_inputs(inputs))))


def example_inputs(shapes: list[str] | None) -> tuple[Tensor, ...] | None:
    """Random inputs, two to a batch, of the shapes that `--input` gave; None where it gave none.

    Raises:
        ArgumentError: a shape is not a list of positive whole numbers.
    """
    if not shapes:
        return None
    import torch

    parsed: list[list[int]] = []
    for shape in shapes:
        sizes = [part.strip() for part in shape.split(",")]
        if not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ArgumentError(
                f"--input {shape!r} must be positive whole numbers with commas between them and without the batch, "
                "such as 3,224,224"
            )
        parsed.append([int(size) for size in sizes])
    return tuple(torch.randn(2, *sizes) for sizes in parsed)


def main() -> None:
    """Run the command line."""
    if "" not in sys.path:  # a console script does not search the current folder, which `python -m` does
        sys.path.insert(0, "")
    app(prog_name="gpd-fx")
