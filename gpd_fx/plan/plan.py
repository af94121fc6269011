"""The plan: which atoms widen, by how much, and what that makes of every parameter.

Candidates are the free atoms of parameters. Then:

1. Where an axis is a product of several candidates only one widens (a size grows by r, not by r squared): the
   outermost, but rather not one that two activations contract, so heads and not the width of a head.
2. Ratios are chosen (see `gpd_fx.ratios`).

A widened atom of size n holds the N = round(r·n) channels j mod n: originals first. The shares alpha of the copies of
one channel are unequal, so that copies part in training, and multiples of 2^-8 (finer beyond 64 copies) that sum to
one, so that they are exact in every floating dtype.

A plan may stand on another one, its base: what had been widened by the base is widened further, and each copy of the
base divides its share among the copies that are made of it, again in at most 2^8 units that are a power of two. What a
graph computes is then the same for any values of the base's copies, wherever their shares enter it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from gpd_fx.axes.expressions import (
    Atom,
    Cat,
    Expr,
    Reason,
    atoms,
    parts,
    size,
)
from gpd_fx.axes.widening import Copies, Widening, parents
from gpd_fx.errors import ArgumentError
from gpd_fx.fxtools.node_arguments import bind
from gpd_fx.kernels.compose.layout import KernelLayout
from gpd_fx.plan.analysis import Analysis
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.plan.ratios import Ratio, Ratios, choose_ratios
from gpd_fx.plan.tied_dimensions import Ties
from gpd_fx.rules.effects import Contract, Extent
from gpd_fx.rules.site import Value
from gpd_fx.rules.weights import weight_layout


@dataclass(frozen=True, eq=False)
class Plan:
    """What widening will do. `absorbed` lists operands (node, argument) of each graph whose alpha a parameter takes."""

    analysis: Analysis
    widening: Widening
    tensors: dict[str, ParamPlan]
    absorbed: dict[str, set[tuple[str, str]]]
    held: dict[Atom, Reason]
    notes: tuple[str, ...]
    base: Plan | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Plan:
        """A plan never changes, so copies of a module share it."""
        return self


def make_plan(
    analysis: Analysis,
    ratio: Ratio = 2.0,
    *,
    exclude: Sequence[str] = (),
    seed: int = 0,
    equal_alpha: bool = False,
    base: Plan | None = None,
) -> Plan:
    """Choose copies for every atom that may widen.

    Args:
        analysis: the fixpoint of axis propagation.
        ratio: expansion ratio >= 1, or `{parameter-name glob: ratio}`; the last glob that matches a name counts, and
            parameters that none matches keep their width.
        exclude: parameter-name globs; no axis of a parameter that one matches widens.
        seed: for the unequal shares alpha.
        equal_alpha: give all copies of a channel equal shares (copies then stay equal in training).
        base: a plan of the same analysis whose copies are copied further; ratios are still those to the model.

    Raises:
        ArgumentError: a ratio below one, not finite or not a number; a glob that matches no parameter; channels that
            would be fewer than in the base.
    """
    candidates = _candidates(analysis)
    held: dict[Atom, Reason] = {}
    _one_per_product(analysis, candidates, held)
    before = Widening(analysis.solver, {}) if base is None else base.widening
    ratios = choose_ratios(analysis, candidates, ratio, exclude, held, before)
    _only_grow(analysis, before, ratios)
    copies: dict[Atom, Copies] = {}
    generator = torch.Generator().manual_seed(seed)
    for atom, value in ratios.of.items():
        gather = torch.arange(round(atom.size * value)) % atom.size
        if len(gather) > atom.size:
            index = parents(gather, before.gather((atom,)))
            copies[atom] = Copies(gather, _shares(index, before.alpha((atom,)), generator, equal=equal_alpha))
    widening = Widening(analysis.solver, copies, None if base is None else base.widening)
    tensors, absorbed = _tensor_plans(analysis, widening)
    return Plan(analysis, widening, tensors, absorbed, held, tuple(ratios.notes), base)


def _candidates(analysis: Analysis) -> list[Atom]:
    found: dict[Atom, None] = {}
    for name in analysis.parameters:
        for axis in analysis.tensors[name]:
            found.update(dict.fromkeys(atoms(analysis.solver.resolve(axis))))
    return list(found)


def _expressions(analysis: Analysis) -> list[Expr]:
    found: dict[Expr, None] = {}

    def collect(value: Value) -> None:
        if isinstance(value, tuple):
            for item in value:
                collect(item)
        else:
            found.update((analysis.solver.resolve(axis), None) for axis in value or ())

    for axes in analysis.tensors.values():
        collect(axes)
    for facts in analysis.graphs.values():
        for value in facts.values.values():
            collect(value)
    return list(found)


def _one_per_product(analysis: Analysis, candidates: list[Atom], held: dict[Atom, Reason]) -> None:
    free = set(candidates)
    shunned = {atom for expr in analysis.shunned for atom in atoms(analysis.solver.resolve(expr))}
    chosen: set[Atom] = set()

    def visit(expr: Expr) -> None:
        for part in parts(expr):
            groups = [[f] if isinstance(f, Atom) else list(atoms((f,))) for f in part if not isinstance(f, int)]
            for factor in part:
                if isinstance(factor, Cat):
                    visit((factor,))
            groups = [[atom for atom in group if atom in free and atom not in held] for group in groups]
            groups = [group for group in groups if group]
            if len(groups) > 1:
                order = sorted(groups, key=lambda g: (not chosen.issuperset(g), not shunned.isdisjoint(g)))
                chosen.update(order[0])
                for group in order[1:]:
                    for atom in group:
                        text = f"it forms one axis with {order[0][0].label}, which widens"
                        held[atom] = Reason("product", atom.label, text)

    for expr in _expressions(analysis):
        visit(expr)


def _only_grow(analysis: Analysis, before: Widening, ratios: Ratios) -> None:
    for atom in before.copies:
        old, new = before.size((atom,)), round(atom.size * ratios.of.get(atom, 1.0))
        if new < old:
            raise ArgumentError(
                f"the channels of {Ties(analysis).name(atom)} would become narrower, {new} instead of {old}; a "
                "teacher only grows: ask for at least the ratio that they have"
            )


def _shares(index: Tensor, of: Tensor, generator: torch.Generator, *, equal: bool) -> Tensor:
    """float64 [N]: the shares `of` divided among the copies at `index` of each, in multiples of a power of two.

    The first copies lie at the front.
    """
    counts = torch.bincount(index)
    if equal:
        return (of / counts)[index]
    mantissa, exponent = torch.frexp(of)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # the least power of two that is not below
    most = float((counts * torch.ldexp(torch.ones_like(of), exponent) / of).max())
    unit = torch.ldexp(torch.ones_like(of), exponent - max(8, math.ceil(math.log2(most)) + 2))
    draw = torch.rand(len(index), generator=generator, dtype=torch.float64) + 0.5
    share = draw / torch.zeros_like(of).index_add_(0, index, draw)[index]
    whole = (share * (of / unit)[index]).floor().clamp_(min=1)
    whole[: len(of)] += of / unit - torch.zeros_like(of).index_add_(0, index, whole)  # which rounding left
    return whole * unit[index]


def _tensor_plans(
    analysis: Analysis, widening: Widening
) -> tuple[dict[str, ParamPlan], dict[str, set[tuple[str, str]]]]:
    uses: dict[str, list[tuple[str, fx.Node, fx.Node]]] = {}  # name -> (graph, get_attr node, user)
    for key, facts in analysis.graphs.items():
        for node in facts.module.graph.find_nodes(op="get_attr"):
            if facts.shapes[node] is not None:
                users = [(key, node, user) for user in node.users]
                uses.setdefault(analysis.tensor_name(key, node), []).extend(users)
    tensors: dict[str, ParamPlan] = {}
    absorbed: dict[str, set[tuple[str, str]]] = {key: set() for key in analysis.graphs}
    for name, axes in analysis.tensors.items():
        axes = [analysis.solver.resolve(axis) for axis in axes]
        wide = [widening.widens(axis) for axis in axes]
        gather = tuple(widening.gather(axis) if w else None for axis, w in zip(axes, wide, strict=True))
        keep = tuple(widening.keep(axis) if w else None for axis, w in zip(axes, wide, strict=True))
        alpha: tuple[Tensor | None, ...] = (None,) * len(axes)
        kernel: KernelLayout | None = None
        if name in analysis.parameters and uses.get(name):
            kernel = _kernel(analysis, widening, uses[name])
            common = _common_alpha(analysis, uses[name])
            if common is not None:
                alpha = tuple(common[1].vectors(widening))
                for key, _, user in uses[name]:
                    absorbed[key].add((user.name, common[0]))
        tensors[name] = ParamPlan(name, tuple(map(size, axes)), gather, keep, alpha, kernel)
    return tensors, absorbed


def _common_alpha(analysis: Analysis, uses: list[tuple[str, fx.Node, fx.Node]]) -> tuple[str, Contract] | None:
    """The contraction that all uses of a parameter share, if each use is one and all are alike."""
    found: list[tuple[str, Contract]] = []
    for key, node, user in uses:
        effects = [e for e in analysis.graphs[key].effects.get(user, ()) if isinstance(e, Contract)]
        mine = [e for e in effects if "." not in e.arg and bind(user)[e.arg] is node]
        if len(mine) != 1 or user.all_input_nodes.count(node) != 1 or list(bind(user).values()).count(node) != 1:
            return None
        dims = tuple(tuple((analysis.solver.resolve(e), hit) for e, hit in dim) for dim in mine[0].dims)
        found.append((mine[0].arg, Contract(mine[0].arg, dims)))
    return found[0] if all(item == found[0] for item in found) else None


def _kernel(analysis: Analysis, widening: Widening, uses: list[tuple[str, fx.Node, fx.Node]]) -> KernelLayout | None:
    """The layout of a parameter that is only ever the weight of conv or linear ops of one kind."""
    layouts: set[KernelLayout] = set()
    for key, node, user in uses:
        use = weight_layout(user)
        if use is None or use[0] is not node or list(bind(user).values()).count(node) != 1:
            return None
        groups = [e for e in analysis.graphs[key].effects.get(user, ()) if isinstance(e, Extent) and e.arg == "groups"]
        wide = widening.size(groups[0].expr) if groups else use[1].groups
        layouts.add(replace(use[1], groups=wide))
    return layouts.pop() if len(layouts) == 1 else None
