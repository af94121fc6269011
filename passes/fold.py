"""Fold: back from the dynamic teacher to the plain student (channel-branch reparameterization).

    M = W + sum of branches        merged kernel, wide
    Ws = M[student's slice]        the student's kernel

A wide graph made by `Widen` holds alpha·M, so there the slice is divided by alpha, which is never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from gpd_fx.errors import PassError
from gpd_fx.fxtools.attributes import fetch, has, put
from gpd_fx.fxtools.torch_internals import copy_graph
from gpd_fx.kernels.compose.layout import along
from gpd_fx.passes.base import Pass, PassResult
from gpd_fx.passes.branch import find_composition
from gpd_fx.passes.fingerprint import Sharing
from gpd_fx.passes.widen import GRAPH, PLAN
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.plan.plan import Plan
from gpd_fx.plan.widening_plan import WideningPlan


@dataclass(frozen=True)
class Fold(Pass):
    """Takes a graph that `Widen` made, trained or not, with its branches merged, back to the width it had.

    All parameters of the result are new. Of a graph that was trained, the student is another function than the teacher.

    Attributes:
        plan: what widening did, for a graph that comes from a file and so has forgotten it.
        source: with `plan`, the graph before it was widened; only its structure counts.

    Example:
        >>> Fold()(Widen(2.0)(graph).graph_module).graph_module
    """

    parameters: ClassVar[Sharing] = "new"
    changes_function: ClassVar[bool] = True
    plan: WideningPlan | None = None
    source: fx.GraphModule | None = None

    def requires(self, module: fx.GraphModule) -> None:
        if (self.plan is None) != (self.source is None):
            raise PassError("Fold: give both plan and source, or neither")
        if find_composition(module) is not None:
            raise PassError("Fold: the graph has branches; run the pass Merge first")
        if self.plan is None or self.source is None:
            plan_of(module)
            return
        for node in self.source.graph.find_nodes(op="get_attr"):
            target = str(node.target)
            if isinstance(fetch(self.source, target), Tensor) and target not in self.plan.names:
                raise PassError(
                    f"Fold: the plan knows no tensor {target!r} of the source; give the graph it was made of"
                )
        for target, name in self.plan.names.items():
            wide = fetch(module, target) if has(module, target) else None
            shape = self.plan.tensors[name].wide_shape
            if not isinstance(wide, Tensor) or wide.shape != shape:
                found = f"of shape {list(wide.shape)}" if isinstance(wide, Tensor) else "missing"
                raise PassError(f"Fold: {target!r} is {found} in the graph and of shape {list(shape)} in the plan")

    def run(self, module: fx.GraphModule) -> PassResult:
        plan, source = (self.plan, self.source) if self.plan and self.source else (plan_of(module), _source(module))
        assert source is not None
        graph, _ = copy_graph(source.graph)
        root = nn.Module()
        made: dict[str, Tensor] = {}
        for node in source.graph.find_nodes(op="get_attr"):
            target, old = str(node.target), fetch(source, str(node.target))
            name = plan.names.get(target, target)
            if isinstance(old, Tensor) and name not in made:
                made[name] = _narrow(plan.tensors[name], fetch(module, target))
            put(root, target, made.get(name, old), like=old)
        folded = fx.GraphModule(root, graph)
        folded.meta.update(source.meta)  # the plan of an earlier widening, by which to fold again
        return PassResult(folded, plan.widens)


def _made_by(module: fx.GraphModule) -> Plan:
    plan = module.meta.get(PLAN)
    if not isinstance(plan, Plan):
        raise PassError(
            "Fold: the graph was not made by the pass Widen, or it comes from a file and has forgotten its plan; give "
            "Fold(plan, source), with the plan from plan_of(wide).save(path)"
        )
    return plan


def _source(module: fx.GraphModule) -> fx.GraphModule:
    return _made_by(module).analysis.graphs[GRAPH].module


def plan_of(module: fx.GraphModule) -> WideningPlan:
    """What `Widen` did to a graph, as data.

    Args:
        module: a graph that `Widen` made, also after `Branch` and `Merge`.

    Raises:
        PassError: the graph does not know its plan.
    """
    plan = _made_by(module)
    source = _source(module)
    names = {
        str(node.target): plan.analysis.tensor_name(GRAPH, node)
        for node in source.graph.find_nodes(op="get_attr")
        if isinstance(fetch(source, str(node.target)), Tensor)
    }
    return WideningPlan({name: plan.tensors[name] for name in dict.fromkeys(names.values())}, names)


def _narrow(plan: ParamPlan, wide: Tensor) -> Tensor:
    with torch.no_grad():
        tensor = wide.detach()
        for dim, alpha in enumerate(plan.alpha):
            if alpha is not None:
                tensor = tensor / along(alpha, dim, tensor.dim()).to(tensor.dtype).to(tensor.device)
        narrow = plan.student(tensor).clone()
    return nn.Parameter(narrow, wide.requires_grad) if isinstance(wide, nn.Parameter) else narrow
