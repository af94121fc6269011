"""Expansion ratios: what the caller asked for, made to fit what is tied together.

Channels that are added or concatenated into one axis are one atom and have one ratio: the largest that a glob asks of a
parameter that produces them. Axes that an op takes statistics over need equally many copies of every element: their
ratios become the same whole number (rounded up); one that holds frozen elements too cannot widen at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeAlias

from gpd_fx.analysis import Analysis
from gpd_fx.axes import Atom, Reason, atoms, parts
from gpd_fx.errors import ArgumentError
from gpd_fx.rules.effects import Contract
from gpd_fx.rules.site import bind

Ratio: TypeAlias = float | Mapping[str, float]


@dataclass
class Ratios:
    """The ratio of each atom that widens, why others do not, and what had to give way to what (one line each)."""

    of: dict[Atom, float] = field(default_factory=dict[Atom, float])
    held: dict[Atom, Reason] = field(default_factory=dict[Atom, Reason])
    notes: list[str] = field(default_factory=list[str])


def check_ratio(ratio: object) -> None:
    """Raise `ArgumentError` unless `ratio` is a finite number >= 1, or a mapping of globs to such."""
    if isinstance(ratio, Mapping):
        if not ratio:
            raise ArgumentError("ratio is an empty mapping; give a number >= 1 or {parameter-name glob: number}")
        for glob, value in ratio.items():  # pyright: ignore[reportUnknownVariableType]  checked right here
            if not isinstance(glob, str):
                raise ArgumentError(f"ratio has the key {glob!r}; keys are parameter-name globs such as 'layer1.*'")
            _check_number(value, f"ratio[{glob!r}]")
    else:
        _check_number(ratio, "ratio")


def _check_number(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentError(f"{what} is {value!r}, a {type(value).__name__}; it must be a number >= 1, such as 2.0")
    if not math.isfinite(value) or value < 1:
        raise ArgumentError(f"{what} is {value}; an expansion ratio must be a finite number >= 1, such as 2.0")


def choose_ratios(
    analysis: Analysis, free: Sequence[Atom], ratio: Ratio, exclude: Sequence[str], held: dict[Atom, Reason]
) -> Ratios:
    """Give every free atom that is not held its ratio.

    Args:
        analysis: the fixpoint of axis propagation.
        free: the atoms that could widen.
        ratio: as `expand` takes it.
        exclude: parameter-name globs; no axis of a parameter that one matches widens.
        held: atoms that stay as they are, and why; it grows.

    Raises:
        ArgumentError: a glob that matches no parameter.
    """
    check_ratio(ratio)
    result = Ratios(held=held)
    names = _Names(analysis)
    for glob in exclude:
        for name in names.matching(glob, "exclude"):
            for axis in analysis.tensors.get(name, ()):
                for atom in atoms(analysis.solver.resolve(axis)):
                    held.setdefault(atom, Reason("exclude", name, f"the glob {glob!r} excludes it"))
    wanted = _wanted(analysis, ratio, names, result.notes)
    for atom in free:
        value = float(ratio) if not isinstance(ratio, Mapping) else wanted.get(atom, 1.0)
        if atom in held:
            continue
        if value == 1.0:
            held[atom] = Reason("ratio", atom.label, "its expansion ratio is 1")
        else:
            result.of[atom] = value
    _equalise(analysis, result)
    return result


class _Names:
    """All names of the parameters, and which of them globs match."""

    def __init__(self, analysis: Analysis) -> None:
        self._known = list(analysis.parameters)
        self._aliases: dict[str, list[str]] = {}
        for name, first in analysis.canonical.items():
            self._aliases.setdefault(first, []).append(name)

    def matches(self, name: str, glob: str) -> bool:
        """Whether any name of a parameter matches."""
        return any(fnmatchcase(alias, glob) for alias in self._aliases.get(name, [name]))

    def matching(self, glob: str, what: str) -> list[str]:
        """Canonical names of the parameters that a glob matches, at least one."""
        found = [name for name in self._aliases if self.matches(name, glob)]
        if not found:
            some = ", ".join(self._known[:4])
            raise ArgumentError(f"the {what} glob {glob!r} matches no parameter; names look like {some}, ...")
        return found


def _wanted(analysis: Analysis, ratio: Ratio, names: _Names, notes: list[str]) -> dict[Atom, float]:
    """The largest ratio that is asked of each atom; says where two askings differ."""
    if not isinstance(ratio, Mapping):
        return {}
    for glob in ratio:
        names.matching(glob, "ratio")
    contracted = _contracted(analysis)
    asked: dict[Atom, dict[float, str]] = {}
    for name in analysis.parameters:
        matches = [value for glob, value in ratio.items() if names.matches(name, glob)]
        for dim, axis in enumerate(analysis.tensors[name]):
            if (name, dim) not in contracted:
                for atom in atoms(analysis.solver.resolve(axis)):
                    asked.setdefault(atom, {}).setdefault(float(matches[-1]) if matches else 1.0, name)
    for atom, values in asked.items():
        if len(values) > 1:
            by = ", ".join(f"{name} asks for {value:g}" for value, name in sorted(values.items()))
            notes.append(f"{by}, but these are the same {atom.size} channels; they get {max(values):g}")
    return {atom: max(values) for atom, values in asked.items()}


def _contracted(analysis: Analysis) -> set[tuple[str, int]]:
    """Parameter dimensions that some op contracts."""
    found: set[tuple[str, int]] = set()
    for key, facts in analysis.graphs.items():
        for node, effects in facts.effects.items():
            for effect in effects:
                if isinstance(effect, Contract) and "." not in effect.arg:
                    operand = bind(node)[effect.arg]
                    if operand.op == "get_attr":
                        name = analysis.tensor_name(key, operand)
                        found.update((name, d) for d, dim in enumerate(effect.dims) if any(hit for _, hit in dim))
    return found


def _equalise(analysis: Analysis, result: Ratios) -> None:
    """Meet the equal-multiplicity constraints."""
    ratios = result.of
    constraints = [(parts(analysis.solver.resolve(axis)), reason) for axis, reason in analysis.equal]
    raised: dict[Atom, tuple[float, Reason]] = {}
    changed = True
    while changed:
        changed = False
        for group, reason in constraints:
            members = [[atom for atom in atoms(part) if atom in ratios] for part in group]
            flat = dict.fromkeys(atom for member in members for atom in member)
            if not flat:
                continue
            whole = float(max(math.ceil(ratios[atom]) for atom in flat))
            if all(members) and all(ratios[atom] == whole for atom in flat):
                continue
            changed = True
            for atom in flat:
                if all(members):
                    raised.setdefault(atom, (ratios[atom], reason))
                    ratios[atom] = whole
                else:
                    del ratios[atom]
                    text = f"{reason.text}, and part of that axis cannot widen"
                    result.held[atom] = Reason(reason.op, reason.node, text)
    for atom, (before, reason) in raised.items():
        if atom in ratios:
            result.notes.append(
                f"the {atom.size} channels of {atom.label} get ratio {ratios[atom]:g} instead of {before:g}, because "
                f"{reason.text} (node {reason.node})"
            )
