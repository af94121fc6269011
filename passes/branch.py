"""Give every conv and linear weight of a graph its branches, without changing the function.

    before    w = get_attr(name)                  y = conv(x, w)
    after     both = composition()                # (teacher's tensors, student's tensors) by name
              w = both[0][name]                   y = conv(x, w)

Nothing is widened, so the two sets of tensors are the same. A weight that is used more than once, also as something
else than a weight, is replaced everywhere, and so is one with several names: it stays tied.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from gpd_fx.composition.branches import MAIN, resolve_branches
from gpd_fx.composition.composition import Composition
from gpd_fx.errors import PassError
from gpd_fx.kernels.compose.layout import KernelLayout
from gpd_fx.passes.base import Pass, PassResult
from gpd_fx.passes.fingerprint import Sharing
from gpd_fx.passes.nothing_done import seen
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.rules.weights import weight_layout

ALIASES = "gpd_fx_aliases"
"""Key in the meta of the composition's node: every name of each parameter that it replaced."""


def find_composition(module: fx.GraphModule) -> fx.Node | None:
    """The node that calls the graph's composition, or None."""
    for node in module.graph.find_nodes(op="call_module", target="composition"):
        if isinstance(module.get_submodule("composition"), Composition):
            return node
    return None


@dataclass(frozen=True)
class Branch(Pass):
    """Adds a submodule `composition` that holds each conv and linear weight with its branches.

    All parameters and buffers of the result are new.

    Attributes:
        branches: as for `gpd_fx.expand`: "orepa", None, or a list of names.
        seed: of the branches' random tensors.
    """

    parameters: ClassVar[Sharing] = "new"
    branches: str | Sequence[str] | None = "orepa"
    seed: int = 0

    def requires(self, module: fx.GraphModule) -> None:
        resolve_branches(self.branches)
        if find_composition(module) is not None:
            raise PassError("Branch: the graph has branches already; run the pass Merge first")
        if hasattr(module, "composition"):
            raise PassError(
                "Branch: the graph module has an attribute `composition`, which the pass adds; rename yours"
            )

    def run(self, module: fx.GraphModule) -> PassResult:
        names = resolve_branches(self.branches)
        layouts = _layouts(module)
        if names == (MAIN,) or not layouts:
            why = f"no conv or linear op uses a parameter as its weight; {seen(module)}"
            note = "no extra branch was asked for" if layouts else why
            return PassResult(module, False, (note,))
        module = copy.deepcopy(module)
        aliases = _aliases(module, layouts)
        parameters = {name: module.get_parameter(name) for name in layouts}
        composition = Composition(
            [ParamPlan.identity(name, p.shape, layouts[name]) for name, p in parameters.items()],
            parameters,
            {name: p.requires_grad for name, p in parameters.items()},
            names,
            self.seed,
        )
        module.add_submodule("composition", composition)
        insert_composition(module, aliases)
        for name in (alias for group in aliases.values() for alias in group):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, None)  # an empty place, so that Merge restores the order of keys
        module.recompile()
        notes = [f"{name}: {branch} left out, {why}" for name, skipped in composition.skipped.items()
                 for branch, why in skipped.items()]  # fmt: skip
        return PassResult(module, True, (str(composition.extra_repr()), *notes))


def _layouts(module: fx.GraphModule) -> dict[str, KernelLayout]:
    """The parameters used as weights, by the first name of each, with the layout of the first use."""
    first = {id(p): name for name, p in module.named_parameters()}
    found: dict[str, KernelLayout] = {}
    for node in module.graph.nodes:
        use = weight_layout(node)
        if use is not None and use[0].op == "get_attr":
            tensor = operator.attrgetter(str(use[0].target))(module)
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                found.setdefault(first[id(tensor)], use[1])
    return found


def _aliases(module: fx.GraphModule, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every name of each parameter in `names`."""
    everywhere: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        everywhere.setdefault(id(p), []).append(name)
    return {name: tuple(everywhere[id(module.get_parameter(name))]) for name in names}


def insert_composition(module: fx.GraphModule, aliases: dict[str, tuple[str, ...]]) -> None:
    """Call the submodule `composition` before everything else, and take the parameters in `aliases` from it."""
    graph = module.graph
    canonical = {alias: name for name, group in aliases.items() for alias in group}
    replaced = [node for node in graph.find_nodes(op="get_attr") if str(node.target) in canonical]
    taken: dict[str, fx.Node] = {}
    start = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(start):  # `start` may be one of those replaced, so nothing is erased yet
        both = graph.call_module("composition")
        both.meta[ALIASES] = aliases
        teacher = graph.call_function(operator.getitem, (both, 0))
        for node in replaced:
            name = canonical[str(node.target)]
            if name not in taken:
                taken[name] = graph.call_function(operator.getitem, (teacher, name))
                taken[name].meta.update(node.meta)
    for node in replaced:
        node.replace_all_uses_with(taken[canonical[str(node.target)]])
        graph.erase_node(node)
