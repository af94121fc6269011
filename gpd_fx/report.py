"""The expansion report: what widened, what did not and why, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from gpd_fx.axes import Atom, Expr, Reason, atoms, reasons
from gpd_fx.costs import group_costs
from gpd_fx.plan import Plan


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are the same channels wherever they occur, and hence widen together.

    Attributes:
        name: the parameter that they were first met in, and the dimension.
        channels: how many the student has.
        wide: how many the dynamic teacher has.
        parameters: the student's parameters that have them.
        added_parameters: what widening this group alone adds, branches apart.
        added_flops: likewise, for one sample.
    """

    name: str
    channels: int
    wide: int
    parameters: tuple[str, ...]
    added_parameters: int = 0
    added_flops: int = 0


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


@dataclass(frozen=True)
class ExpansionReport:
    """What an expansion did.

    `str()` is a table. Parameters are counts; FLOPs are those of one sample's forward pass (a multiply-add is two).

    Attributes:
        model: class of the student.
        ratio: as it was asked for.
        groups: the widened channel groups.
        frozen: what stays unwidened, the costliest first.
        coverage: share of the student's parameters that lie on at least one widened axis, 0 to 1.
        max_error: largest |difference| / |output| found by verification; None where it was not run.
        branches: parameter -> branches that it has.
        skipped: parameter -> branch -> why it does not fit.
        notes: what else there is to say.
    """

    model: str
    ratio: float | dict[str, float]
    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenAxis, ...]
    coverage: float
    student_parameters: int
    teacher_parameters: int
    branch_parameters: int
    student_flops: int
    teacher_flops: int
    max_error: float | None = None
    branches: dict[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
    skipped: dict[str, dict[str, str]] = field(default_factory=dict[str, "dict[str, str]"])
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything in it, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        teacher = self.teacher_parameters + self.branch_parameters
        lines = [
            f"Expansion of {self.model}, ratio {self.ratio}",
            "",
            f"{'':14}{'student':>16}{'dynamic teacher':>18}{'factor':>9}",
            f"{'parameters':14}{self.student_parameters:>16,}{teacher:>18,}"
            f"{_factor(teacher, self.student_parameters):>9}",
            f"{'  of branches':14}{'':>16}{self.branch_parameters:>18,}",
            f"{'FLOPs a sample':14}{self.student_flops:>16,}{self.teacher_flops:>18,}"
            f"{_factor(self.teacher_flops, self.student_flops):>9}",
            "",
            f"coverage {self.coverage:.4f} of the student's parameters lie on a widened axis",
            "verification " + (f"max relative error {self.max_error:.1e}" if self.max_error is not None else "not run"),
        ]
        if self.groups:
            lines += ["", f"{len(self.groups)} widened channel groups; alike ones of several blocks share a line"]
            lines += [f"  {'channels':>16}{'groups':>8}{'parameters':>14}{'FLOPs':>18}  first met in"]
            for alike in _alike(self.groups):
                channels = f"{alike[0].channels} -> {alike[0].wide}"
                added, work = sum(g.added_parameters for g in alike), sum(g.added_flops for g in alike)
                name = alike[0].name if len(alike) == 1 else _pattern(alike[0].name)
                lines.append(f"  {channels:>16}{len(alike):>8}{f'+{added:,}':>14}{f'+{work:,}':>18}  {name}")
        if self.frozen:
            lines += ["", "not widened"]
            lines += [f"  {'unwidened parameters':>20}  op, node and reason"]
            for alike in _alike_frozen(self.frozen):
                first, more = alike[0], f" and {len(alike) - 1} nodes like it" if len(alike) > 1 else ""
                lines.append(f"  {sum(e.cost for e in alike):>20,}  {first.op} at {first.node}{more}: {first.reason}")
                lines.append(f"  {'':>20}    {_some([name for entry in alike for name in entry.channels])}")
        left_out: dict[tuple[str, str], list[str]] = {}
        for name, kinds in self.skipped.items():
            for kind, reason in kinds.items():
                left_out.setdefault((kind, reason), []).append(name)
        if left_out:
            lines += ["", "branches left out"]
            lines += [f"  {kind}: {reason} ({_some(names)})" for (kind, reason), names in left_out.items()]
        return "\n".join([*lines, *(f"\nnote: {note}" for note in self.notes)])


def _pattern(name: str) -> str:
    """A parameter's name with every number but the dimension behind it left open."""
    path, bracket, dimension = name.partition("[")
    return re.sub(r"\d+", "*", path) + bracket + dimension


def _alike(groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups of one width in blocks that differ by number only."""
    found: dict[tuple[str, int, int], list[ChannelGroup]] = {}
    for group in groups:
        found.setdefault((_pattern(group.name), group.channels, group.wide), []).append(group)
    return list(found.values())


def _alike_frozen(entries: Sequence[FrozenAxis]) -> list[list[FrozenAxis]]:
    """Entries of one op and reason, numbers in it apart."""
    found: dict[tuple[str, str], list[FrozenAxis]] = {}
    for entry in entries:
        found.setdefault((entry.op, re.sub(r"\d+", "*", entry.reason)), []).append(entry)
    return list(found.values())


def _factor(big: int, small: int) -> str:
    return f"x{big / small:.2f}" if small else "-"


def _some(names: tuple[str, ...] | list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def channel_groups(plan: Plan) -> tuple[ChannelGroup, ...]:
    """The widened atoms, each with the parameters that have it."""
    members: dict[Atom, list[str]] = {atom: [] for atom in plan.widening.copies}
    names: dict[Atom, str] = {}
    for name in plan.analysis.parameters:
        for dim, axis in enumerate(_axes(plan, name)):
            for atom in dict.fromkeys(a for a in atoms(axis) if a in members):
                if not members[atom] or members[atom][-1] != name:
                    members[atom].append(name)
                if dim == 0:  # output channels, rather than a later layer's input channels
                    names.setdefault(atom, f"{name}[0]")
    costs = group_costs(plan)
    return tuple(
        ChannelGroup(names.get(atom, atom.label), atom.size, len(copies.gather), tuple(members[atom]), *costs[atom])
        for atom, copies in plan.widening.copies.items()
    )


def _axes(plan: Plan, name: str) -> list[Expr]:
    return [plan.analysis.solver.resolve(axis) for axis in plan.analysis.tensors[name]]


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
    return tuple(f"{e.op} at {e.node}: {e.reason} ({_some(e.channels)})" for e in frozen_axes(plan))
