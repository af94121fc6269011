"""Whether widening a model changes what it computes, at as little cost as an honest answer allows.

Capture is nearly all of what a small model costs, so one capture of each mode serves several ratios. Nothing is
compared but what the model computes by itself: the wide graph, given the model's tensors widened, must return what the
module returns, on another batch than the captured one, and leave the copies of the same running statistics behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, fx, nn

from gpd_fx.capture.capture import Mode, capture_skeleton, shallow_copy
from gpd_fx.fxtools.attributes import fetch
from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.fxtools.torch_internals import free_size
from gpd_fx.passes.widen import widen_graph
from gpd_fx.plan.analysis import Analysis, analyse, names_of
from gpd_fx.plan.plan import Plan, make_plan
from gpd_fx.plan.ratios import Ratio
from gpd_fx.verify.verification import relative_error

TOLERANCE = 1e-9
RATIOS = (2.0, 3.0, 1.5, 1.3)
Inputs = tuple[Tensor, ...]


class WrongError(AssertionError):
    """Widening changed what a model computes, or broke; `kind` says how, without numbers or names."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True)
class Setting:
    """What `expand` is asked for. `pick` chooses the modules that have the `other` ratio, or none where that is 0."""

    ratio: float = 2.0
    other: float | None = None
    pick: int = 0

    def ask(self, names: Sequence[str]) -> tuple[Ratio, tuple[str, ...]]:
        """`ratio` and `exclude` for a model whose parameters have these names."""
        owners = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
        if self.other is None or not owners:
            return self.ratio, ()
        glob = owners[self.pick % len(owners)] + "*"
        return (self.ratio, (glob,)) if self.other == 0 else ({"*": self.ratio, glob: self.other}, ())


@dataclass(frozen=True)
class Asked:
    """What `expand` is asked for, in its own words."""

    ratio: Ratio
    exclude: tuple[str, ...] = ()

    def ask(self, names: Sequence[str]) -> tuple[Ratio, tuple[str, ...]]:
        """`ratio` and `exclude`."""
        return self.ratio, self.exclude


def draw_settings(random: Random) -> list[Setting]:
    """One ratio for all, another one, and different ones or an exclusion."""
    first, second, third, fourth = random.sample(RATIOS, 4)
    return [Setting(first), Setting(second), Setting(third, random.choice((0, fourth)), random.randrange(24))]


@dataclass(frozen=True)
class Found:
    """What a model that was widened rightly consists of."""

    nodes: int
    ops: frozenset[str]
    widened: int  # in how many of the settings anything widened


def nudge(inputs: Inputs) -> Inputs:
    """The inputs, each changed by one unit in the last place."""
    return tuple(x * (1 + 2.0**-52) if x.is_floating_point() else x for x in inputs)


def check(
    model: nn.Module,
    inputs: Callable[[int], Inputs],
    settings: Sequence[Setting | Asked] = (Setting(),),
    modes: Sequence[Mode] = ("eval",),
) -> Found:
    """Widen a model in every setting and compare the wide graphs with it.

    Args:
        model: a model in float64; it is not changed.
        inputs: random inputs of a given batch.
        settings: what to widen, and by how much.
        modes: those that are captured, and analysed together.

    Raises:
        CaptureError: torch.export cannot capture the model.
        WrongError: anything else than that goes wrong.
    """
    skeleton = shallow_copy(model)
    captures = {mode: capture_skeleton(skeleton, inputs(2), {}, mode) for mode in modes}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    analysis = _attempt("the analysis fails", lambda: analyse(captures, names_of(named)))
    if analysis.faults:
        raise WrongError("a rule fails", "; ".join(f"{fault.op}: {fault.text}" for fault in analysis.faults))
    batch = inputs(3 if all(map(open_batch, captures.values())) else 2)
    expected = {mode: _run(model, batch, mode) for mode in modes}
    widened = 0
    for setting in settings:
        ratio, exclude = setting.ask(list(analysis.parameters))
        plan = _attempt(
            "the plan fails", lambda ratio=ratio, exclude=exclude: make_plan(analysis, ratio, exclude=exclude)
        )
        widened += bool(plan.widening.copies)
        for mode in modes:
            _compare(plan, mode, model, batch, *expected[mode])
    nodes = [node for module in captures.values() for node in module.graph.nodes]
    ops = frozenset(op_name(node.target) for node in nodes if node.op == "call_function")
    return Found(len(nodes), ops, widened)


def open_batch(captured: fx.GraphModule) -> bool:
    """Whether torch.export left the batch of every input open; some ops make it a constant."""
    return all(free_size(node.meta["val"].shape[0]) for node in captured.graph.find_nodes(op="placeholder"))


def _attempt(kind: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise WrongError(kind, f"{type(error).__name__}: {error}") from error


def _run(model: nn.Module, batch: Inputs, mode: Mode) -> tuple[Any, dict[str, Tensor]]:
    """The output of a module, and its buffers afterwards."""
    model = copy.deepcopy(model).train(mode == "train")
    with torch.no_grad():
        return model(*(x.clone() for x in batch)), dict(model.named_buffers())


def _compare(
    plan: Plan, mode: Mode, model: nn.Module, batch: Inputs, expected: Any, buffers: dict[str, Tensor]
) -> None:
    def widen(name: str, old: Tensor) -> Tensor:
        made = plan.tensors[name].scale(plan.tensors[name].widen(old.detach())).clone()
        return nn.Parameter(made) if isinstance(old, nn.Parameter) else made

    wide = _attempt("rewriting fails", lambda: widen_graph(plan, mode, widen))
    with torch.no_grad():
        actual = _attempt("the wide graph does not run", lambda: wide(*(x.clone() for x in batch)))
    error = max(relative_error(expected, actual), _buffer_error(plan.analysis, plan, mode, wide, buffers))
    if error <= TOLERANCE:
        return
    nudged, after = _run(model, nudge(batch), mode)
    conditioning = max(relative_error(expected, nudged), relative_error(buffers, after))
    if error <= 100 * conditioning:
        return
    captured = plan.analysis.graphs[mode].module
    with torch.no_grad():
        if relative_error(expected, captured(*(x.clone() for x in batch))) > TOLERANCE:
            raise WrongError("the capture is not the model", "torch.export is at fault")
    raise WrongError(
        f"the wide graph is wrong in {mode} mode",
        f"by {error:.1e} of its output; one unit in the last place makes {conditioning:.1e}",
    )


def _buffer_error(analysis: Analysis, plan: Plan, mode: Mode, wide: nn.Module, buffers: dict[str, Tensor]) -> float:
    """How far the running statistics are from copies of the model's."""
    worst = 0.0
    for node in analysis.graphs[mode].module.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target in buffers:
            copies = plan.tensors[analysis.tensor_name(mode, node)].widen(buffers[target])
            worst = max(worst, relative_error(copies, fetch(wide, target)))
    return worst
