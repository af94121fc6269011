"""`expand`: a model becomes a dynamic teacher. Capture, analyse, plan, rewrite, compose, verify."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gpd_fx.composition.branches import resolve_branches
from gpd_fx.composition.composition import Composition
from gpd_fx.errors import ArgumentError, GPDWarning
from gpd_fx.fxtools.torch_internals import drop_parameters
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.plan.ratios import Ratio, check_ratio
from gpd_fx.report.expansion_report import ExpansionReport
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.teacher.study import Draft, make_draft, make_report, plain_ratio, study_model, wide_buffers
from gpd_fx.verify.verification import check_expansion, check_teacher


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
        left_by_kernels=composition.left_by_kernels(),
    )
    buffers = wide_buffers(draft)
    drop_parameters(study.skeleton)  # they move, save and count nowhere but in the composition
    recipe = {
        "ratio": plain_ratio(draft.ratio),
        "branches": branches if branches is None or isinstance(branches, str) else list(branches),
        "exclude": list(draft.exclude),
        "seed": draft.seed,
        "frozen": list(study.frozen),
        "grown": [[plain_ratio(ratio), seed] for ratio, seed in draft.grown],
    }
    teacher = DynamicTeacher(
        study.skeleton,
        draft.graphs,
        composition,
        buffers,
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
