"""What each channel group costs: parameters and FLOPs that widening it alone adds to the dynamic teacher.

A contraction's FLOPs are twice the product of the sizes of its result and of its contracted axes, which the op's entry
in the table of rules names. They are axis expressions, so the cost under any choice of widened atoms is arithmetic on
sizes. A group's cost is the whole minus what it would be if that group stayed as it is, so costs of groups that meet in
a layer add up to more than the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import fx

from gpd_fx.axes.expressions import (
    Atom,
    Expr,
    atoms,
    size,
)
from gpd_fx.axes.widening import Widening
from gpd_fx.plan.analysis import PRIMES, Facts
from gpd_fx.plan.plan import Plan
from gpd_fx.rules.entry import Operands
from gpd_fx.rules.table import entry_of


def contractions(plan: Plan, facts: Facts) -> list[tuple[Expr, ...]]:
    """For each product that a graph computes, the axes whose sizes multiply to its multiply-adds."""

    def axes(operand: object) -> list[Expr]:
        value = facts.values.get(operand) if isinstance(operand, fx.Node) else None
        return [plan.analysis.solver.resolve(axis) for axis in value] if isinstance(value, list) else []

    found: list[tuple[Expr, ...]] = []
    for node in facts.module.graph.nodes:
        entry = entry_of(node.target)
        if entry is not None and entry.work is not None:
            found += map(tuple, entry.work(Operands(node, axes(node), axes)))
    return found


def network_flops(plan: Plan) -> tuple[int, int]:
    """FLOPs of one sample in eval mode: the student's and the dynamic teacher's."""
    work = contractions(plan, _eval_facts(plan))
    return flops(Widening(plan.analysis.solver, {}), work), flops(plan.widening, work)


def _eval_facts(plan: Plan) -> Facts:
    graphs = plan.analysis.graphs
    return graphs["eval"] if "eval" in graphs else next(iter(graphs.values()))


def flops(widening: Widening, contracted: Sequence[Sequence[Expr]]) -> int:
    """FLOPs of one sample: the symbolic batch stands as a prime, which divides out."""
    total = 0
    for axes in contracted:
        count = 2 * prod(map(widening.size, axes))
        total += count // PRIMES[0] if count % PRIMES[0] == 0 else count
    return total


def group_costs(plan: Plan) -> dict[Atom, tuple[int, int]]:
    """For each widened atom, the parameters and the FLOPs in eval mode that it adds."""
    solver = plan.analysis.solver
    work = contractions(plan, _eval_facts(plan))
    tensors = [tuple(solver.resolve(axis) for axis in plan.analysis.tensors[name]) for name in plan.analysis.parameters]
    costs: dict[Atom, tuple[int, int]] = {}
    for atom in plan.widening.copies:
        without = Widening(solver, {other: c for other, c in plan.widening.copies.items() if other is not atom})

        def added(items: Sequence[Sequence[Expr]], one: Atom = atom) -> list[Sequence[Expr]]:
            return [axes for axes in items if any(one in atoms(axis) for axis in axes)]

        mine, layers = added(tensors), added(work)
        parameters = sum(_count(plan.widening, axes) - _count(without, axes) for axes in mine)
        costs[atom] = (parameters, flops(plan.widening, layers) - flops(without, layers))
    return costs


def _count(widening: Widening, axes: Sequence[Expr]) -> int:
    return prod(widening.size(axis) if widening.widens(axis) else size(axis) for axis in axes)
