"""`expand`: a model becomes a dynamic teacher. Capture, analyse, plan, rewrite, compose, verify."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from gpd_fx.analysis import Analysis, analyse, names_of
from gpd_fx.branches import resolve_branches
from gpd_fx.capture import capture_skeleton, shallow_copy, try_call
from gpd_fx.composition import Composition, Tree, grow
from gpd_fx.costs import network_flops
from gpd_fx.errors import ArgumentError, GPDWarning, InputError
from gpd_fx.inputs import prepare
from gpd_fx.layout import ParamPlan
from gpd_fx.passes.widen import widen_graph
from gpd_fx.pictures import trace
from gpd_fx.plan import Plan, make_plan
from gpd_fx.private import drop_parameters
from gpd_fx.ratios import Ratio, check_ratio
from gpd_fx.report import ExpansionReport, channel_groups, covered, frozen_axes
from gpd_fx.teacher import DynamicTeacher
from gpd_fx.verify import check_expansion, check_teacher

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


@torch.inference_mode(mode=False)  # or the teacher's parameters could not be trained
def expand(
    model: nn.Module,
    ratio: Ratio = 2.0,
    example_inputs: Sequence[Any] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    branches: str | Sequence[str] | None = "orepa",
    exclude: Sequence[str] = (),
    verify: bool = True,
    seed: int = 0,
) -> DynamicTeacher:
    """Rewrite a model into a wider, multi-branch dynamic teacher that computes the same function.

    This is inverse reparameterization (Guo et al., Gap Preserving Distillation, ICLR 2025, section 3.2), for any model
    that `torch.export` can capture.

    Args:
        model: the student. It is not changed; the teacher works on copies.
        ratio: expansion ratio >= 1, whole or not, or `{parameter-name glob: ratio}`, where the last glob that matches
            counts and parameters that none matches keep their width.
        example_inputs: positional inputs of one call, with a batch of 2 or more. Inferred where not given.
        example_kwargs: keyword inputs of that call.
        branches: "orepa" (the default set), None for a wide teacher without branches, or a list of branch names.
        exclude: parameter-name globs; no axis of a parameter that one of them matches is widened.
        verify: compare the result with the model in float64 on random inputs, in both modes, before it is returned.
        seed: of the random branch tensors and of the shares alpha.

    Returns:
        The dynamic teacher, in the model's mode, on its device and of its dtype.

    Raises:
        ArgumentError: an argument that cannot work, or non-finite parameters.
        InputError: the example inputs do not fit, or cannot be inferred.
        CaptureError: `torch.export` cannot capture the model.
        VerificationError: the result differs from the model; nothing wrong is ever returned.
    """
    _check_arguments(ratio, exclude)
    resolve_branches(branches)
    draft = make_draft(study_model(model, example_inputs, example_kwargs), ratio, exclude, seed)
    return make_teacher(draft, branches, verify=verify)


def make_teacher(
    draft: Draft, branches: str | Sequence[str] | None = "orepa", *, verify: bool = True
) -> DynamicTeacher:
    """The dynamic teacher of a draft. It takes over the skeleton of the draft's study."""
    study, plan, parameters = draft.study, draft.plan, draft.study.parameters
    plans = [plan.tensors.get(name) or ParamPlan.identity(name, p.shape) for name, p in parameters.items()]
    trainable = {name: parameter.requires_grad for name, parameter in parameters.items()}
    report = make_report(draft)
    if not plan.widening.copies and draft.ratio != 1:
        warnings.warn(f"nothing in {type(study.model).__name__} widens; see report()", GPDWarning, stacklevel=3)
        report = replace(report, notes=(*report.notes, "nothing widens: the dynamic teacher has the student's width"))
    empty = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    if verify and empty is not None:
        raise ArgumentError(
            f"parameter {empty!r} is on the meta device and has no values to verify with; load the weights first, or "
            "see what would widen with inspect_model"
        )
    if verify:
        report = replace(report, max_error=check_expansion(plan, study.captures, draft.graphs, draft))
    composition = Composition(plans, parameters, trainable, branches, draft.seed)
    report = replace(
        report,
        branch_parameters=sum(p.numel() for p in composition.branches.parameters()),
        branches={name: composition.branch_names(name) for name in parameters if composition.branch_names(name)},
        skipped=composition.skipped,
    )
    wide_buffers = _wide_buffers(draft)
    drop_parameters(study.skeleton)  # they move, save and count nowhere but in the composition
    recipe = {
        "ratio": _plain(draft.ratio),
        "branches": branches if branches is None or isinstance(branches, str) else list(branches),
        "exclude": list(draft.exclude),
        "seed": draft.seed,
        "grown": [[_plain(ratio), seed] for ratio, seed in draft.grown],
    }
    teacher = DynamicTeacher(
        study.skeleton,
        draft.graphs,
        composition,
        wide_buffers,
        study.aliases,
        trainable,
        recipe,
        (study.args, study.kwargs),
        report,
    )
    if verify:
        check_teacher(teacher, study.model)
    return teacher.train(study.model.training)


def inspect_model(
    model: nn.Module,
    ratio: Ratio = 2.0,
    example_inputs: Sequence[Any] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
) -> ExpansionReport:
    """What `expand` would widen, what not and why, and what it would cost, without building it.

    Takes the arguments of `expand` and raises what it raises, verification apart. Branches are not counted.
    """
    _check_arguments(ratio, exclude)
    return make_report(make_draft(study_model(model, example_inputs, example_kwargs), ratio, exclude))


def _check_arguments(ratio: Ratio, exclude: Sequence[str]) -> None:
    check_ratio(ratio)
    if isinstance(exclude, str):
        raise ArgumentError(f"exclude is the string {exclude!r}; pass a list of globs, such as [{exclude!r}]")


def study_model(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Study:
    """Check a model and its inputs, capture both modes, and analyse their axes."""
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
    try_call(skeleton, args, kwargs)
    captures = {mode: capture_skeleton(skeleton, args, kwargs, mode) for mode in MODES}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    aliases = names_of(named)
    analysis = analyse(captures, aliases)
    return Study(model, skeleton, args, kwargs, captures, analysis, aliases, dict(model.named_parameters()))


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
        base: Plan | None = None
        for first, its_seed in grown:
            base = make_plan(study.analysis, first, exclude=exclude, seed=its_seed, base=base)
        plan = make_plan(study.analysis, ratio, exclude=exclude, seed=seed, equal_alpha=equal_alpha, base=base)
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
        ratio=_plain(ratio),
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


def _plain(ratio: Ratio) -> float | dict[str, float]:
    """A ratio as JSON takes it."""
    return dict(ratio) if isinstance(ratio, Mapping) else float(ratio)


def _check_values(model: nn.Module) -> None:
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise InputError("the model has lazy parameters; call it once on example inputs before expanding it")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            raise ArgumentError(f"parameter {name!r} has {count} values that are NaN or infinite; load sound weights")


def _wide_buffers(draft: Draft) -> Tree:
    """The teacher's own buffers: the model's, widened, as persistent as there."""
    tree = Tree()
    persistent = set(draft.study.model.state_dict(keep_vars=True))
    for name, buffer in draft.study.model.named_buffers():
        if name in draft.plan.tensors:
            *path, leaf = name.split(".")
            wide = draft.plan.tensors[name].widen(buffer.detach()).clone()
            grow(tree, path).register_buffer(leaf, wide, persistent=name in persistent)
    return tree
