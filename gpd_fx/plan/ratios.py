"""Expansion ratios: what the caller asked for, made to fit what is tied together.

Channels that are added or concatenated into one axis are one atom and have one ratio: the largest that a glob asks of a
parameter that produces them. Axes that an op takes statistics over need equally many copies of every element: their
ratios become the same whole number (rounded up); one that holds frozen elements too cannot widen at all. What stands on
a base needs equally many copies of each of the base's copies: a multiple of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeAlias

from gpd_fx.axes.expressions import (
    Atom,
    Expr,
    Reason,
    atoms,
    parts,
    reasons,
    size,
)
from gpd_fx.axes.widening import Widening
from gpd_fx.errors import ArgumentError
from gpd_fx.plan.analysis import Analysis
from gpd_fx.plan.tied_dimensions import Dim, Ties

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
    analysis: Analysis,
    free: Sequence[Atom],
    ratio: Ratio,
    exclude: Sequence[str],
    held: dict[Atom, Reason],
    base: Widening,
) -> Ratios:
    """Give every free atom that is not held its ratio.

    Args:
        analysis: the fixpoint of axis propagation.
        free: the atoms that could widen.
        ratio: as `expand` takes it.
        exclude: parameter-name globs; no axis of a parameter that one matches widens.
        held: atoms that stay as they are, and why; it grows.
        base: copies that there are already.

    Raises:
        ArgumentError: a glob that matches no parameter.
    """
    check_ratio(ratio)
    result = Ratios(held=held)
    names, ties = _Names(analysis), Ties(analysis)
    _exclude(analysis, exclude, names, ties, free, result)
    asked = _asked(ratio, names, ties)
    for atom in free:
        if atom in held:
            continue
        value = max((ask.ratio for ask in asked.get(atom, ())), default=1.0)
        value = value if isinstance(ratio, Mapping) else float(ratio)
        if value == 1.0:
            held[atom] = Reason("ratio", ties.name(atom), "its expansion ratio is 1")
        else:
            result.of[atom] = value
            result.notes += _differences(ties, atom, asked.get(atom, ()))
    _equalise(analysis, ties, base, result)
    for atom, value in list(result.of.items()):
        if round(atom.size * value) == atom.size:
            del result.of[atom]
            text = f"its expansion ratio is {value:g}: {atom.size} channels stay {atom.size}"
            held[atom] = Reason("ratio", ties.name(atom), text)
    if isinstance(ratio, Mapping):
        result.notes += _idle(analysis, ratio, names, ties, asked, result)
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


def _exclude(
    analysis: Analysis, exclude: Sequence[str], names: _Names, ties: Ties, free: Sequence[Atom], result: Ratios
) -> None:
    """Hold the channels of excluded parameters; says which other parameters that holds too."""
    by: dict[str, str] = {}  # parameter -> the first glob that excludes it
    for glob in exclude:
        for name in names.matching(glob, "exclude"):
            by.setdefault(name, glob)
            for axis in analysis.tensors.get(name, ()):
                for atom in atoms(analysis.solver.resolve(axis)):
                    result.held.setdefault(atom, Reason("exclude", name, f"the glob {glob!r} excludes these channels"))
    for atom in free if by else ():
        dims = ties.dims.get(atom, ())
        cause = [dim for dim in dims if dim.parameter in by]
        others = [dim for dim in dims if dim.parameter not in by and dim.makes]
        if cause and others:
            dim, where = ties.nearest(cause, others[0], atom)
            what = f"{ties.channels(others[0], atom)} of {others[0]}"
            result.notes.append(
                f"{what} stay as they are, because {where} makes them the same as those of {dim}, which "
                f"{by[dim.parameter]!r} excludes{_with_them(others[1:])}"
            )


@dataclass(frozen=True)
class _Ask:
    """What is asked of a dimension that makes channels; no glob matches where `glob` is None."""

    dim: Dim
    ratio: float
    glob: str | None


def _asked(ratio: Ratio, names: _Names, ties: Ties) -> dict[Atom, list[_Ask]]:
    """Every ratio that a mapping asks of each atom."""
    if not isinstance(ratio, Mapping):
        return {}
    for glob in ratio:
        names.matching(glob, "ratio")
    asked: dict[Atom, list[_Ask]] = {}
    last: dict[str, str | None] = {}
    for atom in ties.dims:
        for dim in ties.makers(atom):
            if dim.parameter not in last:
                matches = [glob for glob in ratio if names.matches(dim.parameter, glob)]
                last[dim.parameter] = matches[-1] if matches else None
            glob = last[dim.parameter]
            asked.setdefault(atom, []).append(_Ask(dim, 1.0 if glob is None else float(ratio[glob]), glob))
    return asked


def _differences(ties: Ties, atom: Atom, asks: Sequence[_Ask]) -> list[str]:
    """One line for each asking that gives way to a larger one for the same channels."""
    most = max((ask.ratio for ask in asks), default=1.0)
    winners = {ask.dim: ask for ask in asks if ask.ratio == most}
    losers: dict[tuple[float, str | None], list[Dim]] = {}
    for ask in asks:
        if ask.ratio != most:
            losers.setdefault((ask.ratio, ask.glob), []).append(ask.dim)
    lines: list[str] = []
    for (value, glob), dims in losers.items():
        dim, where = ties.nearest(list(winners), dims[0], atom)
        asked = f"{glob!r} asks {value:g} of" if glob is not None else "no glob matches"
        what = f"{ties.channels(dims[0], atom)} of {dims[0]}"
        lines.append(
            f"{what} get ratio {most:g}, because {where} makes them the same as those of {dim}, of which "
            f"{winners[dim].glob!r} asks {most:g}; {asked} {dims[0]}{_with_them(dims[1:])}"
        )
    return lines


def _with_them(dims: Sequence[Dim], limit: int = 3) -> str:
    if not dims:
        return ""
    more = f" and {len(dims) - limit} more" if len(dims) > limit else ""
    return f" (likewise {', '.join(map(str, dims[:limit]))}{more})"


def _idle(
    analysis: Analysis,
    ratio: Mapping[str, float],
    names: _Names,
    ties: Ties,
    asked: Mapping[Atom, list[_Ask]],
    result: Ratios,
) -> list[str]:
    """One line for each glob that asks for more width and changes nothing."""
    lines: list[str] = []
    order = list(ratio)
    for place, glob in enumerate(order):
        matched = [name for name in names.matching(glob, "ratio") if name in analysis.parameters]
        over = {name: [g for g in order[place + 1 :] if names.matches(name, g)] for name in matched}
        if matched and all(over.values()):
            by = ", ".join(map(repr, dict.fromkeys(globs[-1] for globs in over.values())))
            lines.append(
                f"the ratio {ratio[glob]:g} of {glob!r} is never used: of the globs that match a name the last "
                f"counts, and {by} behind it match all that it matches"
            )
            continue
        if ratio[glob] == 1 or any(
            atom in result.of and ask.glob == glob for atom, asks in asked.items() for ask in asks
        ):
            continue
        why = next((line for name in matched for line in _stays(analysis, ties, name, result)), "")
        lines.append(f"the ratio {ratio[glob]:g} of {glob!r} widens nothing{why}")
    return lines


def _stays(analysis: Analysis, ties: Ties, name: str, result: Ratios) -> list[str]:
    """Why dimensions of a parameter that make channels stay as they are."""
    lines: list[str] = []
    for d, axis in enumerate(analysis.tensors[name]):
        if (name, d) not in ties.contracted:
            held = [result.held[atom] for atom in atoms(analysis.solver.resolve(axis)) if atom in result.held]
            known = [*held, *(reason for atom in atoms(axis) for reason in reasons(atom) if not reason.natural)]
            lines += [f": {name}[{d}] stays as it is, because {r.text} ({r.op} at {r.node})" for r in known[:1]]
    return lines


def _equalise(analysis: Analysis, ties: Ties, base: Widening, result: Ratios) -> None:
    """Meet the equal-multiplicity constraints."""
    ratios = result.of
    constraints = [(parts(analysis.solver.resolve(axis)), reason) for axis, reason in analysis.equal]
    raised: dict[Atom, tuple[float, str]] = {}
    changed = True
    while changed:
        changed = False
        for group, reason in constraints:
            members = [[atom for atom in atoms(part) if atom in ratios] for part in group]
            flat = dict.fromkeys(atom for member in members for atom in member)
            if not flat:
                continue
            widest = max(flat, key=lambda atom: ratios[atom])
            step = base.multiplicity((widest,)) or 1  # all have the same, as they met this constraint
            whole = float(step * math.ceil(ratios[widest] / step))
            if all(members) and all(ratios[atom] == whole for atom in flat):
                continue
            changed = True
            width = ratios[widest]
            for atom in flat:
                if not all(members):
                    del ratios[atom]
                    rest = next(part for part, member in zip(group, members, strict=True) if not member)
                    text = f"{reason.text}, and part of that axis cannot widen{_rest(ties, rest, result)}"
                    result.held[atom] = Reason(reason.op, reason.node, text)
                elif ratios[atom] != whole:
                    beside = f" and those of {ties.name(widest)}, which have ratio {width:g}"
                    over = "them" + beside * (math.ceil(ratios[atom] / step) * step != whole)
                    one = "whole ratio" if step == 1 else f"ratio, a multiple of the {step} that they have"
                    why = f"{reason.op} at node {reason.node} takes statistics over {over}: it needs one {one}"
                    raised[atom] = raised[atom][0] if atom in raised else ratios[atom], why
                    ratios[atom] = whole
    for atom, (before, why) in raised.items():
        if atom in ratios:
            channels, value = f"{atom.size} channels of {ties.name(atom)}", ratios[atom]
            result.notes.append(f"the {channels} get ratio {value:g} instead of {before:g}, because {why}")


def _rest(ties: Ties, part: Expr, result: Ratios) -> str:
    """What holds a part of an axis that does not widen, where that is known."""
    held = [atom for atom in atoms(part) if atom in result.held]
    return f" ({ties.name(held[0])}: {result.held[held[0]].text})" if held else f" ({size(part)} of its elements)"
