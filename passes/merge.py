"""Turn a graph whose weights come from a composition into a plain one.

    before    both = composition()   w = both[0][name]   y = conv(x, w)
    after     w = get_attr(name)                         y = conv(x, w)

The composition is evaluated once: a layer's branches become one kernel of the layer's own shape. So the result is the
same at the borders too, and a teacher's factors alpha are inside its plain weights.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from gpd_fx.composition.composition import Composition
from gpd_fx.errors import PassError
from gpd_fx.fxtools.attributes import put
from gpd_fx.passes.base import Pass, PassResult
from gpd_fx.passes.branch import ALIASES, find_composition
from gpd_fx.passes.fingerprint import Sharing
from gpd_fx.passes.nothing_done import seen


@dataclass(frozen=True)
class Merge(Pass):
    """Replaces the submodule `composition` by plain parameters under the names of those it holds.

    All parameters of the result are new.
    """

    parameters: ClassVar[Sharing] = "new"

    def requires(self, module: fx.GraphModule) -> None:
        node = find_composition(module)
        for user in node.users if node is not None else ():
            if user.target is not operator.getitem or user.args[1] != 0:
                raise PassError(
                    f"Merge: node {user.name!r} takes more than the teacher's tensors from the composition; a graph of "
                    "both networks has no single set of merged weights"
                )

    def run(self, module: fx.GraphModule) -> PassResult:
        if find_composition(module) is None:
            return PassResult(module, False, (f"the graph has no branches; {seen(module)}",))
        module = copy.deepcopy(module)
        graph = module.graph
        both = find_composition(module)
        assert both is not None
        composition = module.get_submodule("composition")
        assert isinstance(composition, Composition)
        with torch.no_grad():
            merged = composition.teacher()
        aliases: dict[str, tuple[str, ...]] = both.meta.get(ALIASES, {})
        for plan in composition.plans:
            weight = composition.weights.get_parameter(plan.name)
            plain = nn.Parameter(merged[plan.name].clone(), requires_grad=weight.requires_grad)
            for name in aliases.get(plan.name, (plan.name,)):
                put(module, name, plain, like=plain)
        for teacher in list(both.users):
            for node in list(teacher.users):
                with graph.inserting_before(node):
                    plain = graph.get_attr(str(node.args[1]))
                plain.meta.update(node.meta)
                node.replace_all_uses_with(plain)
                graph.erase_node(node)
            graph.erase_node(teacher)
        graph.erase_node(both)
        module.delete_submodule("composition")
        module.recompile()
        return PassResult(module, True, (f"{len(composition.plans)} weights merged",))
