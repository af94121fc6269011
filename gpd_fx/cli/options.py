"""Options that several commands take, and what becomes of their texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpd_fx.errors import ArgumentError
from gpd_fx.io.files import output_path

if TYPE_CHECKING:
    from torch import Tensor

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


def report_files(given: Mapping[str, Path | None]) -> dict[str, Path]:
    """The files that options ask for.

    Raises:
        ArgumentError: one cannot be written, two are the same, or a picture is not to be an SVG file.
    """
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


def example_inputs(shapes: list[str] | None) -> tuple[Tensor, ...] | None:
    """Random inputs, two to a batch, of the shapes that `--input` gave; None where it gave none.

    Raises:
        ArgumentError: a shape is not a list of positive whole numbers.
    """
    if not shapes:
        return None
    import torch

    return tuple(torch.randn(2, *parse_shape(shape)) for shape in shapes)


def parse_shape(shape: str) -> list[int]:
    """The sizes that `--input` gave.

    Raises:
        ArgumentError: they are no positive whole numbers.
    """
    sizes = [part.strip() for part in shape.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ArgumentError(
            f"--input {shape!r} must be positive whole numbers with commas between them and without the batch, "
            "such as 3,224,224"
        )
    return [int(size) for size in sizes]
