"""The data of an expansion report: counts, channel groups by block, what is frozen, branches, notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gpd_fx.axes.expressions import (
    Atom,
    Expr,
    atoms,
)
from gpd_fx.plan.costs import group_costs
from gpd_fx.plan.frozen_axes import FrozenAxis
from gpd_fx.plan.plan import Plan
from gpd_fx.report.graph_picture import Op


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

    @property
    def block(self) -> str:
        """Path of the innermost module that has all of its parameters; empty for the model as a whole."""
        paths = [name.split(".")[:-1] for name in self.parameters]
        shared: list[str] = []
        for level in zip(*paths, strict=False):
            if len(set(level)) > 1:
                break
            shared.append(level[0])
        return ".".join(shared)


@dataclass(frozen=True)
class Block:
    """The channel groups within one module and within none of its parts: those that cross the borders of its parts.

    Attributes:
        path: of the module; empty for the model as a whole.
        groups: as in the report.
    """

    path: str
    groups: tuple[ChannelGroup, ...]

    @property
    def added_parameters(self) -> int:
        """The sum over its groups, in which a layer counts once for each of them that it has."""
        return sum(group.added_parameters for group in self.groups)

    @property
    def added_flops(self) -> int:
        """Likewise, for one sample."""
        return sum(group.added_flops for group in self.groups)


@dataclass(frozen=True)
class ReportData:
    """What an expansion did, as data. Parameters are counts, FLOPs those of one sample (a multiply-add is two).

    Attributes:
        model: class of the student.
        ratio: as it was asked for.
        groups: the widened channel groups.
        frozen: what stays unwidened, the costliest first.
        coverage: share of the student's parameters that lie on at least one widened axis, 0 to 1.
        max_error: largest |difference| / |output| found by verification; None where it was not run.
        branches: parameter -> branches that it has.
        skipped: parameter -> branch -> why it does not fit.
        left_by_kernels: parameter -> why the Triton kernels leave it to torch's ops, on a GPU.
        notes: what else there is to say.
        graph: the ops of the model in eval mode, for `to_svg`.
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
    left_by_kernels: dict[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()
    graph: tuple[Op, ...] = field(default=(), repr=False)

    def blocks(self) -> tuple[Block, ...]:
        """The channel groups by the block that they lie in, in order of the blocks' first groups."""
        found: dict[str, list[ChannelGroup]] = {}
        for group in self.groups:
            found.setdefault(group.block, []).append(group)
        return tuple(Block(path, tuple(groups)) for path, groups in found.items())

    def to_dict(self) -> dict[str, Any]:
        """Everything in it but the graph, ready for JSON."""
        data: dict[str, Any] = _lists(asdict(replace(self, graph=())))
        del data["graph"]
        for group, entry in zip(self.groups, data["groups"], strict=True):
            entry["block"] = group.block
        data["blocks"] = [
            {
                "path": block.path,
                "groups": [group.name for group in block.groups],
                "added_parameters": block.added_parameters,
                "added_flops": block.added_flops,
            }
            for block in self.blocks()
        ]
        return data


def _lists(value: Any) -> Any:
    """The same value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


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
