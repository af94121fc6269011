"""What becomes of every ATen op: `python -m bench.ops` writes `docs/ops.md`.

How often an op occurs is counted in a sweep over whole models (`python -m bench.zoo`) and kept in `bench/zoo/ops.json`,
which `--from zoo.jsonl` makes anew. What the library does with it is looked up in the code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gpd_fx.io.files import write_text
from gpd_fx.rules.entry import Entry
from gpd_fx.rules.index import pointwise
from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.site import Rule
from gpd_fx.rules.table import RULES, rule_of

ROOT = Path(__file__).parents[1]
COUNTS = ROOT / "bench" / "zoo" / "ops.json"
PAGE = ROOT / "docs" / "ops.md"
Counts = Mapping[str, tuple[int, str]]  # by op: in how many models it occurs, and one of them

_INTRODUCTION = """# Ops

Made by `python -m bench.ops`. The ATen ops that have a rule, and all that occur in the sweep over whole models
([models expanded](zoo.md)): {rules} with a rule, {pointwise} elementwise, {frozen} frozen.

- *rule*: axes go through the op. A line of einsum-like notation says how (`gpd_fx/rules/notation.py` explains it),
  or words do.
- *elementwise*: operands are broadcast against each other; axes that meet are the same axis.
- *frozen*: no rule. Channels that the op touches stay as they are; the result is right, and the report says so.

*models* counts those that call the op in train or eval mode; the example is the first of them.

| op | what becomes of its axes | models | example |
|---|---|---:|---|
"""


def count(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """In how many models each op occurs, and the first of them, from the records of a sweep."""
    found: dict[str, tuple[int, str]] = {}
    for record in records:
        for op in record.get("ops", {}):
            times, first = found.get(op, (0, record["name"]))
            found[op] = times + 1, first
    return dict(sorted(found.items()))


def read(path: Path = COUNTS) -> dict[str, tuple[int, str]]:
    """The counts that are kept."""
    return {op: (times, example) for op, (times, example) in json.loads(path.read_text(encoding="utf-8")).items()}


def find_rule(op: str) -> Rule | None:
    """The rule of an op by its full name, such as `aten.conv2d.default`."""
    namespace, packet, overload = op.split(".")
    target = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    rule = RULES.get(f"{packet}.{overload}") if target is None else rule_of(target)  # of another version of torch
    return rule.rule if isinstance(rule, Entry) else rule


def kind(op: str) -> str:
    """*rule*, *elementwise* or *frozen*."""
    rule = find_rule(op)
    return "frozen" if rule is None else "elementwise" if rule is pointwise else "rule"


def describe(op: str) -> str:
    """What the library does with an op."""
    rule = find_rule(op)
    if rule is None or rule is pointwise:
        return kind(op)
    if isinstance(rule, Einsum):
        tied = "".join(f", {argument} = {letter}" for argument, letter in rule.extents.items())
        return f"`{rule.text}`{tied}".replace("|", r"\|")
    text = (rule.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return text.replace("|", r"\|")


def page(counts: Counts) -> str:
    """`docs/ops.md`."""
    ops = sorted({f"aten.{name}" for name in RULES} | {op for op in counts if op.count(".") == 2})
    kinds = [kind(op) for op in ops]
    number: Callable[[str], int] = kinds.count
    text = _INTRODUCTION.format(
        rules=number("rule"),
        pointwise=number("elementwise"),
        frozen=number("frozen"),
    )
    for op in ops:
        times, example = counts.get(op, (0, ""))
        text += f"| `{op}` | {describe(op)} | {times or ''} | {example} |\n"
    others = [op for op in counts if op.count(".") < 2]
    if others:
        names = ", ".join(f"`{op}`" for op in others)
        text += f"\nGraphs also hold arithmetic on sizes, items of tuples and graphs of their own: {names}.\n"
    return text


def main(
    source: Annotated[Path | None, typer.Option("--from", help="Count anew, in the results of a sweep.")] = None,
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = PAGE,
) -> None:
    """Write the page of ops."""
    if source is not None:
        records = list(
            {r["name"]: r for r in map(json.loads, source.read_text(encoding="utf-8").splitlines())}.values()
        )
        lines = [f" {json.dumps(op)}: {json.dumps(found)}" for op, found in count(records).items()]
        write_text(COUNTS, "{\n" + ",\n".join(lines) + "\n}\n")
    write_text(out, page(read()))


if __name__ == "__main__":
    typer.run(main)
