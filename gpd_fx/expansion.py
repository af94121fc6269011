"""`expand`: a model becomes a dynamic teacher. Capture, analyse, plan, rewrite, compose, verify."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from gpd_fx.analysis import analyse, names_of
from gpd_fx.branches import resolve_branches
from gpd_fx.capture import capture_skeleton, shallow_copy, try_call
from gpd_fx.composition import Composition, Tree, grow
from gpd_fx.costs import network_flops
from gpd_fx.errors import ArgumentError, GPDWarning, InputError
from gpd_fx.inputs import prepare
from gpd_fx.layout import ParamPlan
from gpd_fx.passes.widen import widen_graph
from gpd_fx.plan import Plan, make_plan
from gpd_fx.private import drop_parameters
from gpd_fx.ratios import Ratio, check_ratio
from gpd_fx.report import ExpansionReport, channel_groups, covered, frozen_axes
from gpd_fx.teacher import DynamicTeacher
from gpd_fx.verify import check_expansion, check_teacher

MODES = ("eval", "train")


@dataclass(frozen=True)
class Draft:
    """A planned expansion, before any wide tensor exists."""

    model: nn.Module
    skeleton: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    captures: dict[str, fx.GraphModule]
    plan: Plan
    graphs: dict[str, fx.GraphModule]
    aliases: dict[str, str]
    parameters: dict[str, nn.Parameter]  # the student's, by canonical name, used by a graph or not


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
    resolve_branches(branches)
    draft = make_draft(model, ratio, example_inputs, example_kwargs, exclude, seed)
    plan, parameters = draft.plan, draft.parameters
    plans = [plan.tensors.get(name) or ParamPlan.identity(name, p.shape) for name, p in parameters.items()]
    trainable = {name: parameter.requires_grad for name, parameter in parameters.items()}
    composition = Composition(plans, parameters, trainable, branches, seed)
    report = replace(
        make_report(draft, ratio),
        branch_parameters=sum(p.numel() for p in composition.branches.parameters()),
        branches={name: composition.branch_names(name) for name in parameters if composition.branch_names(name)},
        skipped=composition.skipped,
    )
    if not plan.widening.copies and ratio != 1:
        warnings.warn(f"nothing in {type(model).__name__} widens; see report()", GPDWarning, stacklevel=2)
        report = replace(report, notes=(*report.notes, "nothing widens: the dynamic teacher has the student's width"))
    if verify:
        report = replace(report, max_error=check_expansion(plan, draft.captures, draft.graphs, draft))
    wide_buffers = _wide_buffers(draft)
    drop_parameters(draft.skeleton)  # they move, save and count nowhere but in the composition
    recipe = {
        "ratio": dict(ratio) if isinstance(ratio, Mapping) else float(ratio),
        "branches": branches if branches is None or isinstance(branches, str) else list(branches),
        "exclude": list(exclude),
        "seed": seed,
    }
    teacher = DynamicTeacher(
        draft.skeleton,
        draft.graphs,
        composition,
        wide_buffers,
        draft.aliases,
        trainable,
        recipe,
        (draft.args, draft.kwargs),
        report,
    )
    if verify:
        check_teacher(teacher, model)
    return teacher.train(model.training)


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
    return make_report(make_draft(model, ratio, example_inputs, example_kwargs, exclude, 0), ratio)


def make_draft(
    model: nn.Module,
    ratio: Ratio,
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
    exclude: Sequence[str],
    seed: int,
) -> Draft:
    """Check the arguments, capture both modes, plan, and rewrite the graphs."""
    check_ratio(ratio)
    if isinstance(exclude, str):
        raise ArgumentError(f"exclude is the string {exclude!r}; pass a list of globs, such as [{exclude!r}]")
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
    plan = make_plan(analyse(captures, aliases), ratio, exclude=exclude, seed=seed)

    def constant(name: str, old: Tensor) -> Tensor | None:
        return None if name in plan.analysis.canonical else plan.tensors[name].widen(old)

    graphs = {mode: widen_graph(plan, mode, constant) for mode in MODES}
    return Draft(model, skeleton, args, kwargs, captures, plan, graphs, aliases, dict(model.named_parameters()))


def make_report(draft: Draft, ratio: Ratio) -> ExpansionReport:
    """The report of a draft, without branches."""
    plan = draft.plan
    sizes = {name: parameter.numel() for name, parameter in draft.parameters.items()}
    is_covered = covered(plan)
    wide = {n: prod(plan.tensors[n].wide_shape) if n in plan.tensors else size for n, size in sizes.items()}
    total = sum(sizes.values())
    student_flops, teacher_flops = network_flops(plan)
    return ExpansionReport(
        model=type(draft.model).__name__,
        ratio=dict(ratio) if isinstance(ratio, Mapping) else float(ratio),
        groups=channel_groups(plan),
        frozen=frozen_axes(plan, {name: size for name, size in sizes.items() if name not in plan.tensors}),
        coverage=sum(size for name, size in sizes.items() if is_covered.get(name)) / max(total, 1),
        student_parameters=total,
        teacher_parameters=sum(wide.values()),
        branch_parameters=0,
        student_flops=student_flops,
        teacher_flops=teacher_flops,
        notes=plan.notes,
    )


def _check_values(model: nn.Module) -> None:
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise InputError("the model has lazy parameters; call it once on example inputs before expanding it")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            raise ArgumentError(f"parameter {name!r} has {count} values that are NaN or infinite; load sound weights")


def _wide_buffers(draft: Draft) -> Tree:
    """The teacher's own buffers: the model's, widened, as persistent as there."""
    tree = Tree()
    persistent = set(draft.model.state_dict(keep_vars=True))
    for name, buffer in draft.model.named_buffers():
        if name in draft.plan.tensors:
            *path, leaf = name.split(".")
            wide = draft.plan.tensors[name].widen(buffer.detach()).clone()
            grow(tree, path).register_buffer(leaf, wide, persistent=name in persistent)
    return tree
