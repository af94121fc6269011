"""Check one model and print its record: `python -m bench.zoo.one NAME`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from bench.zoo.check import check
from bench.zoo.models import builder, inputs_for


def main(
    name: str,
    ratio: Annotated[list[float] | None, typer.Option()] = None,
    onnx: Annotated[bool, typer.Option()] = True,
) -> None:
    """Print `RECORD` and a line of JSON."""
    build = builder(name)
    record = check(name, build, inputs_for(build().double()), ratios=ratio or (2.0, 3.0, 1.5), onnx=onnx)
    typer.echo("RECORD " + json.dumps(record.to_dict() | {"exact": record.exact}))


if __name__ == "__main__":
    typer.run(main)
