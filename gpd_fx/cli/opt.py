"""`gpd-fx opt`: passes over an exported program in a file."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gpd_fx.errors import ArgumentError
from gpd_fx.io.files import output_path
from gpd_fx.io.programs import read_program, write_program
from gpd_fx.passes.base import PassResult
from gpd_fx.passes.fold import plan_of
from gpd_fx.passes.normalize import Normalize
from gpd_fx.passes.pipeline import Pipeline
from gpd_fx.passes.pipeline_text import PASSES, options_of, parse_pipeline, text_name
from gpd_fx.passes.widen import PLAN
from gpd_fx.plan.widening_plan import WideningPlan

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_ALL = "all"


def opt(
    source: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="An exported program: a .pt2 file of torch.export.save.")
    ] = None,
    passes: Annotated[
        str, typer.Option("--passes", "-p", metavar="PASSES", help="What is run, as 'normalize,widen{ratio=2},merge'.")
    ] = "normalize",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where the result goes.")] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare values in float64 before and after each pass, on the program's inputs."),
    ] = False,
    print_after: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="Print the graph after each pass of that name, or after 'all'; repeatable."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write what widening did to FILE, by which fold{plan=FILE source=MODEL} works."
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List every pass with its options, and stop.")] = False,
) -> None:
    """Run passes over an exported program, and write what becomes of it.

    MODEL is read without running any code in it: a file with pickled objects, compiled code, or a call of anything but
    an operator is refused. What is trusted is torch's reading of JSON and of plain tensors, and the operators that are
    installed. Sizes that are free in the program are free in the result.

    **Examples**

    - `gpd-fx opt --list`
    - `gpd-fx opt model.pt2 -p 'normalize,widen{ratio=2},branch,merge' -o wide.pt2 --verify`
    - `gpd-fx opt model.pt2 -p 'normalize,propagate' --print-after propagate`
    - `gpd-fx opt model.pt2 -p "normalize,widen{ratio={'*': 2, 'head.*': 1}}" --plan plan.safetensors -o wide.pt2`
    - `gpd-fx opt wide.pt2 -p 'normalize,fold{plan=plan.safetensors source=model.pt2}' -o narrow.pt2`
    """
    if listed:
        Console().print(_table())
        return
    if source is None:
        raise ArgumentError("give the file of an exported program (gpd-fx opt MODEL), or --list")
    targets = [output_path(path) for path in (out, plan) if path is not None]
    if len({target.resolve() for target in targets}) < len(targets):
        raise ArgumentError(f"--out and --plan both name the file {str(out)!r}")
    steps = parse_pipeline(passes, {"plan": WideningPlan.load, "source": _graph})
    names = [step.name for step in steps]
    shown = _names(print_after or (), names)
    program = read_program(source)
    wide: list[fx.GraphModule] = []  # the last graph that knows how it was widened

    def after(name: str, result: PassResult) -> None:
        changed = "changed the graph" if result.modified else "changed nothing"
        typer.echo(f"{name}: {changed}, {len(result.graph_module.graph.nodes)} nodes")
        for note in result.notes:
            typer.echo(f"  {note}")
        if name in shown:
            typer.echo(result.graph_module.print_readable(print_output=False))
        if PLAN in result.graph_module.meta:
            wide[:] = [result.graph_module]

    inputs = _inputs(program) if verify or out is not None else ()
    result = Pipeline(steps, verify=inputs if verify else None, after=after)(program)  # pyright: ignore[reportArgumentType]  the first pass may take a program
    if verify:
        typer.echo("verified: no pass changed the values but those that say so")
    if plan is not None:
        plan_of(wide[0] if wide else result.graph_module).save(plan)
        typer.echo(f"written: {plan}")
    if out is not None:
        typer.echo(f"written: {write_program(_exported(result.graph_module, inputs, program), out)}")


def _graph(path: str) -> fx.GraphModule:
    """The graph of a program in a file."""
    return Normalize()(read_program(path)).graph_module  # pyright: ignore[reportArgumentType]  it takes programs


def _names(wanted: Sequence[str], there: Sequence[str]) -> set[str]:
    """The names of the passes after which the graph is printed."""
    by_text = {text_name(kind): kind.__name__ for kind in PASSES.values()}
    for name in wanted:
        if name != _ALL and by_text.get(name) not in there:
            raise ArgumentError(f"--print-after {name}: the pipeline has no such pass; write one of its, or {_ALL!r}")
    return set(there) if _ALL in wanted else {by_text[name] for name in wanted}


def _inputs(program: ExportedProgram) -> tuple[Any, ...]:
    """The inputs that the program was made with."""
    given = program.example_inputs
    if given is None:
        raise ArgumentError("the program holds no example inputs, which --verify and --out need; export it with them")
    args, kwargs = given
    if kwargs:
        raise ArgumentError(
            f"the program takes keyword inputs ({', '.join(kwargs)}); export it with positional inputs for this command"
        )
    return args


def _exported(graph: fx.GraphModule, inputs: tuple[Any, ...], program: ExportedProgram) -> ExportedProgram:
    """The graph as a program, of which the sizes are free that are free in the given one."""
    held = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]  # pyright: ignore[reportAttributeAccessIssue]  a tensor's or value's
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    leaves, structure = pytree.tree_flatten(inputs)
    shapes: list[Any] = []
    for leaf, name in zip(leaves, held, strict=True):
        recorded: Any = values.get(name)
        free = isinstance(leaf, Tensor) and isinstance(recorded, Tensor)
        extents = enumerate(recorded.shape) if free else ()
        sizes = {dim: torch.export.Dim.AUTO for dim, extent in extents if isinstance(extent, torch.SymInt)}
        shapes.append(sizes or None)
    return torch.export.export(graph, inputs, dynamic_shapes=pytree.tree_unflatten(shapes, structure), strict=False)


def _table() -> Table:
    """Every pass with its options."""
    table = Table("pass", "what it does, and its options", title="passes, in a pipeline's text", title_justify="left")
    for name, kind in PASSES.items():
        about = next(iter((inspect.getdoc(kind) or "").splitlines()), "")
        options = [
            f"  {option} = {default or '...'}   ({hint})" for option, (hint, default) in options_of(kind).items()
        ]
        table.add_row(name, "\n".join([about, *options]))
    return table
