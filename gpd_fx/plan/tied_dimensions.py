"""Which parameters have the same channels, and which op of the graph made them the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gpd_fx.axes.expressions import (
    Atom,
    Expr,
    atoms,
    joint,
)
from gpd_fx.fxtools.node_arguments import bind
from gpd_fx.plan.analysis import Analysis
from gpd_fx.rules.effects import Contract


@dataclass(frozen=True)
class Dim:
    """A dimension of a parameter. `makes`: its channels are made by the parameter, not taken in (contracted)."""

    parameter: str
    dim: int
    makes: bool = True

    def __str__(self) -> str:
        return f"{self.parameter}[{self.dim}]"


class Ties:
    """The dimensions of parameters that have each atom."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis

    @cached_property
    def contracted(self) -> set[tuple[str, int]]:
        """Parameter dimensions that some op contracts."""
        found: set[tuple[str, int]] = set()
        for key, facts in self._analysis.graphs.items():
            for node, effects in facts.effects.items():
                for effect in effects:
                    if isinstance(effect, Contract) and "." not in effect.arg:
                        operand = bind(node)[effect.arg]
                        if operand.op == "get_attr":
                            name = self._analysis.tensor_name(key, operand)
                            found.update((name, d) for d, dim in enumerate(effect.dims) if any(hit for _, hit in dim))
        return found

    @cached_property
    def dims(self) -> dict[Atom, list[Dim]]:
        """Every atom of a parameter, with all dimensions that have it."""
        found: dict[Atom, dict[Dim, None]] = {}
        for name in self._analysis.parameters:
            for d, axis in enumerate(self._axes(name)):
                dim = Dim(name, d, (name, d) not in self.contracted)
                for atom in atoms(axis):
                    found.setdefault(atom, {})[dim] = None
        return {atom: list(dims) for atom, dims in found.items()}

    def makers(self, atom: Atom) -> list[Dim]:
        """The dimensions that make the channels of `atom`."""
        return [dim for dim in self.dims.get(atom, ()) if dim.makes]

    def name(self, atom: Atom) -> str:
        """The first dimension that makes an atom's channels, as its name."""
        return str(next(iter([*self.makers(atom), *self.dims.get(atom, ())]), atom.label))

    def channels(self, dim: Dim, atom: Atom) -> str:
        """How an atom appears in a dimension: all of its channels, some of them, or a factor of their number."""
        axis = self._axes(dim.parameter)[dim.dim]
        if axis == (atom,):
            return f"the {atom.size} channels"
        return f"{atom.size} groups of the channels" if atom in axis else f"{atom.size} of the channels"

    def nearest(self, some: Sequence[Dim], other: Dim, atom: Atom) -> tuple[Dim, str]:
        """Of `some` dimensions the one that met `other` first, and by what, in words."""
        tensors = self._analysis.tensors
        axis = tensors[other.parameter][other.dim]
        links = [(joint(tensors[dim.parameter][dim.dim], axis, atom), dim) for dim in some]
        link, dim = min(links, key=lambda pair: pair[0].step if pair[0] else 0)
        reason = link.joined if link else None
        return dim, f"{reason.op} at node {reason.node}" if reason else "the parameters themselves"

    def _axes(self, name: str) -> list[Expr]:
        return [self._analysis.solver.resolve(axis) for axis in self._analysis.tensors[name]]
