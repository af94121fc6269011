"""Which axes of parameters a plan leaves as they are, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from gpd_fx.axes.expressions import Reason, atoms, reasons
from gpd_fx.fxtools.name_patterns import some
from gpd_fx.plan.plan import Plan


@dataclass(frozen=True)
class FrozenAxis:
    """Channels that stay as they are, with the op and graph node that they stopped at.

    Attributes:
        op: the ATen op.
        node: the node of the captured graph.
        reason: what could not be followed.
        channels: `parameter[dimension]` of each axis that stays.
        cost: parameters that have no widened axis because of it.
    """

    op: str
    node: str
    reason: str
    channels: tuple[str, ...]
    cost: int


def covered(plan: Plan) -> dict[str, bool]:
    """Whether each parameter has a widened axis."""
    return {name: any(g is not None for g in plan.tensors[name].gather) for name in plan.analysis.parameters}


def frozen_axes(plan: Plan, unused: Mapping[str, int] | None = None) -> tuple[FrozenAxis, ...]:
    """Why parameter axes are not widened, grouped by reason, the costliest first. `unused`: name -> size."""
    channels: dict[Reason, dict[str, None]] = {}
    cost: dict[Reason, int] = {}
    is_covered = covered(plan)
    for name in plan.analysis.parameters:
        size = prod(plan.tensors[name].shape)
        why: dict[Reason, None] = {}
        for dim, (axis, gather) in enumerate(zip(plan.analysis.tensors[name], plan.tensors[name].gather, strict=True)):
            if gather is not None:
                continue
            held = [plan.held[atom] for atom in atoms(plan.analysis.solver.resolve(axis)) if atom in plan.held]
            found = [reason for atom in atoms(axis) for reason in reasons(atom)] + held
            for reason in found:
                if not reason.natural:
                    channels.setdefault(reason, {})[f"{name}[{dim}]"] = None
                    why[reason] = None
        if not is_covered[name]:
            first = next(iter(why), Reason("-", "-", "it has no axis of channels"))
            channels.setdefault(first, {})[name] = None
            cost[first] = cost.get(first, 0) + size
    entries = [FrozenAxis(r.op, r.node, r.text, tuple(names), cost.get(r, 0)) for r, names in channels.items()]
    if unused:
        text = "no captured graph uses these parameters"
        entries.append(FrozenAxis("-", "-", text, tuple(unused), sum(unused.values())))
    return tuple(sorted(entries, key=lambda entry: -entry.cost))


def frozen_notes(plan: Plan) -> tuple[str, ...]:
    """One line for each reason why channels stay."""
    return tuple(f"{e.op} at {e.node}: {e.reason} ({some(e.channels)})" for e in frozen_axes(plan))
