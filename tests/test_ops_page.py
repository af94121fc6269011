"""The page of ops is what the code and the counts make of it."""

from __future__ import annotations

import pytest

from bench.ops import PAGE, count, describe, find_rule, kind, page, read
from gpd_fx.rules.index import pointwise
from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.table import RULES

COUNTS = read()


def test_the_page_is_in_step_with_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(COUNTS), "run python -m bench.ops"


def test_every_op_says_what_becomes_of_it() -> None:
    rows = dict(line.split(" | ", 1) for line in page(COUNTS).splitlines() if line.startswith("| `"))
    for op in (*(f"aten.{name}" for name in RULES), *(op for op in COUNTS if op.count(".") == 2)):
        text = rows[f"| `{op}`"]
        rule = find_rule(op)
        if rule is None:
            assert text.startswith("frozen |"), op
        elif rule is pointwise:
            assert text.startswith("elementwise |"), op
        elif isinstance(rule, Einsum):
            assert text.replace(r"\|", "|").startswith(f"`{rule.text}`"), op
        else:
            assert rule.__doc__, op
            assert text.replace(r"\|", "|").startswith(rule.__doc__.strip().splitlines()[0].rstrip(".")), op


def test_every_rule_occurs_in_a_model_of_the_sweep() -> None:
    """In itself or in place; a rule that nothing has a use for is to be removed."""
    idle = [
        name for name in RULES if f"aten.{name}" not in COUNTS and f"aten.{name.replace('.', '_.', 1)}" not in COUNTS
    ]
    assert not idle, f"{len(idle)} rules that no model of the sweep calls: {', '.join(sorted(idle))}"


def test_counts() -> None:
    records = [
        {"name": "b", "ops": {"aten.y.default": 3}},
        {"name": "a", "ops": {"aten.x.default": 1, "aten.y.default": 2}},
    ]
    assert count([*records, {"name": "failed"}]) == {"aten.x.default": (1, "a"), "aten.y.default": (2, "b")}


@pytest.mark.parametrize(
    ("op", "found"),
    [
        ("aten.linear.default", "rule"),
        ("aten.relu_.default", "elementwise"),
        ("aten.copy_.default", "elementwise"),
        ("aten.linalg_qr.default", "frozen"),
        ("torchvision.nms.default", "frozen"),
    ],
)
def test_kinds(op: str, found: str) -> None:
    assert kind(op) == found


def test_descriptions() -> None:
    assert describe("aten.linear.default") == "`* i, o i, o -> * o`"
    assert describe("aten.group_norm.default").endswith(", num_groups = g")
    assert describe("aten.cumsum.default") == "Along dimensions that stay as they are: it is scanned in order"
    assert describe("aten.linalg_qr.default") == "frozen"
