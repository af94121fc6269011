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
from gpd_fx.fxtools.attributes import fetch, put
from gpd_fx.fxtools.torch_internals import copy_graph
from gpd_fx.kernels.compose.layout import along
from gpd_fx.passes.base import Pass, PassResult
from gpd_fx.passes.branch import find_composition
from gpd_fx.passes.fingerprint import Sharing
from gpd_fx.passes.widen import GRAPH, PLAN
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.plan.plan import Plan


@dataclass(frozen=True)
class Fold(Pass):
    """Takes a graph that `Widen` made, trained or not, with its branches merged, back to the width it had.

    All parameters of the result are new. Of a graph that was trained, the student is another function than the teacher.
    """

    parameters: ClassVar[Sharing] = "new"
    changes_function: ClassVar[bool] = True

    def requires(self, module: fx.GraphModule) -> None:
        if not isinstance(module.meta.get(PLAN), Plan):
            raise PassError("Fold: the graph was not made by the pass Widen, which leaves the plan to fold by")
        if find_composition(module) is not None:
            raise PassError("Fold: the graph has branches; run the pass Merge first")

    def run(self, module: fx.GraphModule) -> PassResult:
        plan: Plan = module.meta[PLAN]
        source = plan.analysis.graphs[GRAPH].module
        graph, _ = copy_graph(source.graph)
        root = nn.Module()
        made: dict[str, Tensor] = {}
        for node in source.graph.find_nodes(op="get_attr"):
            target, old = str(node.target), fetch(source, str(node.target))
            name = plan.analysis.tensor_name(GRAPH, node)
            if isinstance(old, Tensor) and name not in made:
                made[name] = _narrow(plan.tensors[name], fetch(module, target))
            put(root, target, made.get(name, old), like=old)
        folded = fx.GraphModule(root, graph)
        folded.meta.update(source.meta)  # the plan of an earlier widening, by which to fold again
        return PassResult(folded, bool(plan.widening.copies))


def _narrow(plan: ParamPlan, wide: Tensor) -> Tensor:
    with torch.no_grad():
        tensor = wide.detach()
        for dim, alpha in enumerate(plan.alpha):
            if alpha is not None:
                tensor = tensor / along(alpha, dim, tensor.dim()).to(tensor.dtype).to(tensor.device)
        narrow = plan.student(tensor).clone()
    return nn.Parameter(narrow, wide.requires_grad) if isinstance(wide, nn.Parameter) else narrow
