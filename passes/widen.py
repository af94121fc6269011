"""Widen: rewrite a captured graph so that every widened axis holds unscaled copies of the model's channels.

Nodes stay, with their order and names. What changes is what rules state as effects: alpha at contracted operands,
sizes, groups, slice bounds, and constants behind reductions. A parameter of the wide graph is the model's parameter
gathered along its widened axes, times alpha where all its uses agree on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from gpd_fx.fxtools.attributes import fetch, put
from gpd_fx.fxtools.torch_internals import copy_graph
from gpd_fx.passes.base import Pass, PassResult
from gpd_fx.passes.fingerprint import Sharing
from gpd_fx.passes.nothing_done import seen
from gpd_fx.plan.analysis import Analysis, analyse, check_captured
from gpd_fx.plan.frozen_axes import frozen_notes
from gpd_fx.plan.plan import Plan, make_plan
from gpd_fx.plan.ratios import Ratio
from gpd_fx.rules.rewriter import Rewriter

GRAPH = "graph"  # the name of a graph that is analysed alone
PLAN = "gpd_fx_plan"  # key in the meta of a wide GraphModule: the plan that it was made by
EXACT = "gpd_fx_exact"  # key in the meta of a wide GraphModule: its constants before rounding, in float64
_ALPHA = "_gpd_alpha_"


@dataclass(frozen=True)
class Widen(Pass):
    """Widen one captured graph by itself. All parameters and buffers of the result are new.

    Attributes:
        ratio: expansion ratio >= 1, or `{parameter-name glob: ratio}`.
        exclude: parameter-name globs; no axis of a parameter that one matches widens.
        seed: for the unequal shares alpha.
        equal_alpha: give all copies of a channel equal shares.
    """

    parameters: ClassVar[Sharing] = "new"
    ratio: Ratio = 2.0
    exclude: tuple[str, ...] = ()
    seed: int = 0
    equal_alpha: bool = False

    def requires(self, module: fx.GraphModule) -> None:
        check_captured(module, self.name)

    def plan(self, analysis: Analysis, base: Plan | None = None) -> Plan:
        """What this pass does to the graphs of an analysis, one or several that share their parameters.

        Args:
            analysis: the axes of all graphs.
            base: a plan of the same analysis whose copies are copied further.

        Raises:
            ArgumentError: the options do not fit the model's parameters.
        """
        return make_plan(
            analysis, self.ratio, exclude=self.exclude, seed=self.seed, equal_alpha=self.equal_alpha, base=base
        )

    def run(self, module: fx.GraphModule) -> PassResult:
        plan = self.plan(analyse({GRAPH: module}))

        def tensor(name: str, old: Tensor) -> Tensor:
            shaped = plan.tensors[name]
            with torch.no_grad():
                wide = shaped.scale(shaped.widen(old.detach())).clone()
            return nn.Parameter(wide, old.requires_grad) if isinstance(old, nn.Parameter) else wide

        wide = widen_graph(plan, GRAPH, tensor)
        wide.meta[PLAN] = plan
        if not plan.widening.copies:
            return PassResult(wide, False, (f"nothing was widened: {seen(module)}", *frozen_notes(plan)))
        return PassResult(wide, True, frozen_notes(plan))


def plan_steps(analysis: Analysis, steps: Sequence[Widen]) -> Plan:
    """The plan of several widenings of the same graphs, each of which stands on the one before."""
    plan: Plan | None = None
    for step in steps:
        plan = step.plan(analysis, plan)
    assert plan is not None, "there is no step"
    return plan


def widen_graph(plan: Plan, key: str, tensor: Callable[[str, Tensor], Tensor | None]) -> fx.GraphModule:
    """The wide form of one graph of a plan.

    `tensor(canonical name, model's tensor)` gives the parameters and buffers that the wide graph holds; where it gives
    None the attribute exists and is None, for a caller that supplies tensors at each call.
    """
    facts = plan.analysis.graphs[key]
    graph, mapping = copy_graph(facts.module.graph)
    root = nn.Module()
    before = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for node in facts.module.graph.find_nodes(op="get_attr"):
        old = fetch(facts.module, str(node.target))
        if isinstance(old, Tensor):
            put(root, str(node.target), tensor(plan.analysis.tensor_name(key, node), old), like=old)
        else:
            put(root, str(node.target), old, like=old)
    exact = _widened_constants(plan, key)
    names = (name for number in itertools.count() if (name := f"{_ALPHA}{number}") not in before)

    def constant(value: Tensor, like: Tensor) -> str:
        name = next(names)
        exact[name] = value
        root.register_buffer(name, value.to(like.dtype).to(like.device), persistent=False)
        return name

    rewriter = Rewriter(graph, plan.widening, constant, plan.absorbed[key])
    for node, effects in facts.effects.items():
        for effect in effects:
            effect.apply(rewriter, mapping[node])
    wide = fx.GraphModule(root, graph)
    wide.meta[EXACT] = exact
    for node in facts.module.graph.find_nodes(op="get_attr"):  # a GraphModule turns empty places into attributes
        old = fetch(facts.module, str(node.target))
        if isinstance(old, Tensor) and fetch(wide, str(node.target)) is None:
            put(wide, str(node.target), None, like=old)
    return wide


def _widened_constants(plan: Plan, key: str) -> dict[str, Tensor]:
    """The exact constants of a graph that was widened before, as this plan widens them."""
    module = plan.analysis.graphs[key].module
    before: dict[str, Tensor] = module.meta.get(EXACT, {})
    nodes = {str(node.target): node for node in module.graph.find_nodes(op="get_attr")}
    names = {name: plan.analysis.tensor_name(key, nodes[name]) for name in before if name in nodes}
    return {name: plan.tensors[held].widen(before[name]) for name, held in names.items()}
