"""Passes: transformations of FX graphs, each usable alone on a captured `fx.GraphModule` or in a `Pipeline`."""

from gpd_fx.passes.apart import Apart as Apart
from gpd_fx.passes.base import Pass as Pass
from gpd_fx.passes.base import PassResult as PassResult
from gpd_fx.passes.branch import Branch as Branch
from gpd_fx.passes.fold import Fold as Fold
from gpd_fx.passes.fold import plan_of as plan_of
from gpd_fx.passes.fuse import FuseDepthwise as FuseDepthwise
from gpd_fx.passes.merge import Merge as Merge
from gpd_fx.passes.normalize import Normalize as Normalize
from gpd_fx.passes.pipeline import Pipeline as Pipeline
from gpd_fx.passes.propagate import Propagate as Propagate
from gpd_fx.passes.shapes import refresh_values as refresh_values
from gpd_fx.passes.widen import Widen as Widen
from gpd_fx.plan.widening_plan import WideningPlan as WideningPlan
