"""From a model to a planned expansion: both captures, their analysis, a plan, the wide graphs and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from gpd_fx.capture.capture import capture_skeleton, shallow_copy, try_call
from gpd_fx.capture.example_inputs import prepare
from gpd_fx.composition.composition import Tree, grow
from gpd_fx.errors import ArgumentError, InputError
from gpd_fx.fxtools.module_modes import frozen_parts
from gpd_fx.passes.widen import Widen, plan_steps, widen_graph
from gpd_fx.plan.analysis import Analysis, analyse, names_of
from gpd_fx.plan.costs import network_flops
from gpd_fx.plan.frozen_axes import covered, frozen_axes
from gpd_fx.plan.plan import Plan
from gpd_fx.plan.ratios import Ratio
from gpd_fx.report.expansion_report import ExpansionReport
from gpd_fx.report.graph_picture import trace
from gpd_fx.report.report_data import channel_groups
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher

MODES = ("eval", "train")


Step: TypeAlias = tuple[Ratio, int]
"""A ratio and a seed that a teacher had before it grew."""


@dataclass(frozen=True)
class Study:
    """A model captured in both modes and analysed. It serves any number of drafts, of any ratios."""

    model: nn.Module
    skeleton: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    captures: dict[str, fx.GraphModule]
    analysis: Analysis
    aliases: dict[str, str]
    parameters: dict[str, nn.Parameter]  # the student's, by canonical name, used by a graph or not
    frozen: tuple[str, ...] = ()  # submodules that stay in eval mode while the model trains


@dataclass(frozen=True)
class Draft:
    """A planned expansion, before any wide tensor exists."""

    study: Study
    ratio: Ratio
    exclude: tuple[str, ...]
    seed: int
    plan: Plan
    graphs: dict[str, fx.GraphModule]
    grown: tuple[Step, ...] = ()


def study_model(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    frozen: Sequence[str] | None = None,
) -> Study:
    """Check a model and its inputs, capture both modes, and analyse their axes.

    `frozen` are the submodules that stay in eval mode while the model trains: those that do now, where not given.
    """
    if isinstance(model, DynamicTeacher):
        raise ArgumentError("the model is a dynamic teacher already; fold it first, or expand the student")
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  users call this
        raise ArgumentError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ArgumentError(
            f"the model is wrapped by {type(model).__name__}; expand model.module, and wrap the teacher"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            "the model is a TorchScript module, which cannot be captured; pass the one it was made from"
        )
    _check_values(model)
    args, kwargs = prepare(model, example_inputs, example_kwargs)
    skeleton = shallow_copy(model)
    frozen = frozen_parts(model) if frozen is None else tuple(frozen)
    try_call(skeleton, args, kwargs)
    captures = {mode: capture_skeleton(skeleton, args, kwargs, mode, frozen) for mode in MODES}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    aliases = names_of(named)
    analysis = analyse(captures, aliases)
    return Study(model, skeleton, args, kwargs, captures, analysis, aliases, dict(model.named_parameters()), frozen)


def make_draft(
    study: Study,
    ratio: Ratio = 2.0,
    exclude: Sequence[str] = (),
    seed: int = 0,
    *,
    equal_alpha: bool = False,
    grown: Sequence[Step] = (),
) -> Draft:
    """Plan the widening of a studied model, and rewrite its graphs; copies with equal alpha stay equal.

    `grown` are the steps before this one, the first one first; each stands on the one before.
    """

    def constant(name: str, old: Tensor) -> Tensor | None:
        return None if name in study.analysis.canonical else plan.tensors[name].widen(old)

    with torch.device("cpu"):  # whatever the caller's default is, plans lie on the CPU
        before = [Widen(first, tuple(exclude), its_seed) for first, its_seed in grown]
        plan = plan_steps(study.analysis, [*before, Widen(ratio, tuple(exclude), seed, equal_alpha)])
        graphs = {mode: widen_graph(plan, mode, constant) for mode in MODES}
    return Draft(study, ratio, tuple(exclude), seed, plan, graphs, tuple(grown))


def draft_by(recipe: Mapping[str, Any], study: Study) -> Draft:
    """The draft of the teacher that has this recipe."""
    grown = [(ratio, seed) for ratio, seed in recipe.get("grown", ())]
    return make_draft(study, recipe["ratio"], recipe["exclude"], recipe["seed"], grown=grown)


def make_report(draft: Draft) -> ExpansionReport:
    """The report of a draft, without branches."""
    plan, study, ratio = draft.plan, draft.study, draft.ratio
    sizes = {name: parameter.numel() for name, parameter in study.parameters.items()}
    is_covered = covered(plan)
    wide = {n: prod(plan.tensors[n].wide_shape) if n in plan.tensors else size for n, size in sizes.items()}
    total = sum(sizes.values())
    student_flops, teacher_flops = network_flops(plan)
    frozen = frozen_axes(plan, {name: size for name, size in sizes.items() if name not in plan.tensors})
    return ExpansionReport(
        model=type(study.model).__name__,
        ratio=plain_ratio(ratio),
        groups=channel_groups(plan),
        frozen=frozen,
        coverage=sum(size for name, size in sizes.items() if is_covered.get(name)) / max(total, 1),
        student_parameters=total,
        teacher_parameters=sum(wide.values()),
        branch_parameters=0,
        student_flops=student_flops,
        teacher_flops=teacher_flops,
        notes=plan.notes,
        graph=trace(plan, frozen),
    )


def plain_ratio(ratio: Ratio) -> float | dict[str, float]:
    """A ratio as JSON takes it."""
    return dict(ratio) if isinstance(ratio, Mapping) else float(ratio)


def _check_values(model: nn.Module) -> None:
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise InputError("the model has lazy parameters; call it once on example inputs before expanding it")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            raise ArgumentError(f"parameter {name!r} has {count} values that are NaN or infinite; load sound weights")


def wide_buffers(draft: Draft) -> Tree:
    """The teacher's own buffers: the model's, widened, as persistent as there."""
    tree = Tree()
    persistent = set(draft.study.model.state_dict(keep_vars=True))
    for name, buffer in draft.study.model.named_buffers():
        if name in draft.plan.tensors:
            *path, leaf = name.split(".")
            wide = draft.plan.tensors[name].widen(buffer.detach()).clone()
            grow(tree, path).register_buffer(leaf, wide, persistent=name in persistent)
    return tree
