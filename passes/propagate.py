"""Propagate: write down, at each node of a captured graph, the axis expressions of its result.

The function does not change. `node.meta["gpd_axes"]` holds one string a dimension: a number for a frozen axis,
`name:size` for channels that may widen, `a·b` for a product, `[a + b]` for a concatenation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from gpd_fx.axes.expressions import show
from gpd_fx.passes.base import Pass, PassResult
from gpd_fx.passes.fingerprint import Sharing
from gpd_fx.passes.widen import GRAPH
from gpd_fx.plan.analysis import analyse, check_captured
from gpd_fx.plan.frozen_axes import frozen_notes
from gpd_fx.plan.plan import make_plan

AXES = "gpd_axes"


@dataclass(frozen=True)
class Propagate(Pass):
    """Annotates nodes with their axes; the notes say what cannot widen and why. The result is a deep copy."""

    parameters: ClassVar[Sharing] = "new"

    def requires(self, module: fx.GraphModule) -> None:
        check_captured(module, self.name)

    def run(self, module: fx.GraphModule) -> PassResult:
        analysis = analyse({GRAPH: module})
        annotated = copy.deepcopy(module)
        values = analysis.graphs[GRAPH].values
        for node, twin in zip(module.graph.nodes, annotated.graph.nodes, strict=True):
            axes = values.get(node)
            if isinstance(axes, list):
                twin.meta[AXES] = [show(analysis.solver.resolve(axis)) for axis in axes]
        return PassResult(annotated, False, frozen_notes(make_plan(analysis)))
