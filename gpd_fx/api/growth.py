"""Growth in steps: a trained dynamic teacher becomes a wider one that computes what it computed.

Along a widened axis the old teacher holds copies i of the student's channels, whose values have parted in training,
with shares a[i]. The new one holds copies j of those, J_i of the copy i, and divides the shares among them:

    x''[j] = x'[i] for j in J_i,    sum over J_i of b[j] = a[i]

What a contraction gives is then unchanged, whatever the values, and wherever the shares enter it: in a weight, or in an
activation, where two activations meet:

    sum over j of b[j] x''[j] y''[j] = sum over i of (sum over J_i of b[j]) x'[i] y'[i] = sum over i of a[i] x'[i] y'[i]

So every tensor of the new teacher holds plain copies of the old one's slices. Statistics over an axis need equally many
copies of each old copy, which `gpd_fx.ratios` sees to; sums that no weight enters divide theirs, see `Widening.even`.
The student's channels come first, so its slice stays as it is, bit for bit. Branches are merged into the weights; the
new ones begin at zero. The recipe keeps the steps, of which `load` makes the same shares again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gpd_fx.api.checkpoint import plan_digest
from gpd_fx.api.expansion import make_teacher
from gpd_fx.axes.widening import parents
from gpd_fx.errors import ArgumentError, VerificationError
from gpd_fx.numerics.comparison import (
    CONDITIONING,
    nudged,
    random_like,
    relative_error,
)
from gpd_fx.numerics.precision import deterministic
from gpd_fx.passes.widen import EXACT
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.plan.plan import Plan
from gpd_fx.plan.ratios import Ratio, check_ratio
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.teacher.fold import fold
from gpd_fx.teacher.study import make_draft, study_model

_TOLERANCE = 1e-9


@torch.inference_mode(mode=False)  # as in `expand`: what is captured depends on it
def grow(
    teacher: DynamicTeacher, ratio: Ratio, *, branches: str | Sequence[str] | None = "orepa", seed: int | None = None
) -> DynamicTeacher:
    """A wider dynamic teacher of the same student that computes what `teacher` computes now.

    Args:
        teacher: trained or not, grown before or not. It is not changed.
        ratio: the new expansion ratio of the student; nothing may become narrower.
        branches: of the new teacher, as for `expand`; they begin without effect.
        seed: of the new branches and shares; that of the teacher where not given.

    Returns:
        The new teacher, in the mode, on the device and of the dtype of the old one. Its student's parameters are those
        of the old one. Moments that an optimizer has are not carried over.

    Raises:
        ArgumentError: the teacher is none, has parameters of several dtypes, or cannot grow by this ratio.
        VerificationError: the result differs from the teacher in float64; nothing wrong is ever returned.
    """
    if not isinstance(teacher, DynamicTeacher):  # pyright: ignore[reportUnnecessaryIsInstance]  users call this
        raise ArgumentError(f"grow takes what gpd_fx.expand returned, got {type(teacher).__name__}")
    check_ratio(ratio)
    kinds = {(p.dtype, p.device) for p in teacher.parameters() if p.is_floating_point()}
    if len(kinds) != 1:
        raise ArgumentError(f"grow needs floating parameters of one dtype on one device, the teacher has {len(kinds)}")
    ((dtype, device),) = kinds

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    recipe = teacher.recipe
    example = pytree.tree_map_only(Tensor, move, teacher.example)
    study = study_model(fold(teacher), *example, frozen=teacher.frozen)
    steps = [*((first, its_seed) for first, its_seed in recipe["grown"]), (recipe["ratio"], recipe["seed"])]
    draft = make_draft(study, ratio, recipe["exclude"], recipe["seed"] if seed is None else seed, grown=steps)
    base = draft.plan.base
    assert base is not None
    _check_plan(teacher, base)
    grown = make_teacher(draft, branches, verify=False)
    with torch.no_grad():
        before, after = _exact(teacher), _exact(grown)
        for each in (after, grown):
            _fill(each, before, draft.plan, base)
        _check(before, after, ratio)
        student = teacher.composition.student()
        for plan, weight in grown.composition.wide_parameters():
            _set_student(plan, weight, student[plan.name])
    return grown


def _check_plan(teacher: DynamicTeacher, base: Plan) -> None:
    """The shares and copies found anew are those that the teacher was made with."""
    plans = [base.tensors.get(plan.name, plan) for plan in teacher.composition.plans]
    if plan_digest(plans) != plan_digest(teacher.composition.plans):
        raise ArgumentError(
            "the teacher's channels or shares are not those that expand makes here by its recipe; grow it with the "
            "version of gpd_fx and torch that made it"
        )


def _exact(teacher: DynamicTeacher) -> DynamicTeacher:
    """A copy in float64, with constants as they were before they were rounded, and nothing random."""
    twin = copy.deepcopy(teacher).double()
    for graph in twin.graphs.values():
        assert isinstance(graph, fx.GraphModule)
        deterministic(graph)
        exact: dict[str, Tensor] = graph.meta.get(EXACT, {})
        for name, value in exact.items():
            graph.get_buffer(name).copy_(value)
    return twin


def _fill(after: DynamicTeacher, before: DynamicTeacher, new: Plan, old: Plan) -> None:
    """Give the new teacher copies of what the old one holds."""
    merged = before.composition.merged()
    plans = {plan.name: plan for plan in before.composition.plans}
    for plan, weight in after.composition.wide_parameters():
        weight.copy_(_copied(merged[plan.name], plans[plan.name], plan))
    for name, buffer in after.wide_buffers.named_buffers():
        buffer.copy_(_copied(before.wide_buffers.get_buffer(name), old.tensors[name], new.tensors[name]))


def _copied(value: Tensor, old: ParamPlan, new: ParamPlan) -> Tensor:
    for dim, gather in enumerate(new.gather):
        if gather is not None:
            first = old.gather[dim]
            index = gather if first is None else parents(gather, first)
            value = value.index_select(dim, index.to(value.device))
    return value


def _set_student(plan: ParamPlan, wide: Tensor, narrow: Tensor) -> None:
    """Write the student's slice, which merging may have rounded in another way."""
    own = [torch.arange(n) if k is None else k for k, n in zip(plan.keep, plan.shape, strict=True)]
    wide[torch.meshgrid(*(index.to(wide.device) for index in own), indexing="ij") if own else ...] = narrow


def _check(before: DynamicTeacher, after: DynamicTeacher, ratio: Ratio) -> None:
    """Both teachers on random inputs, in both modes.

    Raises:
        VerificationError: they differ.
    """
    args, kwargs = random_like(before.example, torch.Generator().manual_seed(0), torch.float64)

    def run(teacher: DynamicTeacher, training: bool, given: Any = (args, kwargs)) -> Any:
        teacher = copy.deepcopy(teacher).train(training)  # running statistics change
        return teacher(*given[0], **given[1])

    for training in (False, True):
        expected, actual = run(before, training), run(after, training)
        error = relative_error(expected, actual)
        if error > _TOLERANCE:
            again = relative_error(expected, run(before, training, nudged((args, kwargs), torch.float64)))
            if not error <= CONDITIONING * again:
                mode = "train" if training else "eval"
                raise VerificationError(
                    f"in {mode} mode the grown teacher differs from the old one by {error:.1e} of its output (one unit "
                    f"in the last place of the input: {again:.1e}). Nothing is returned; please report this model. "
                    f"Meanwhile expand the folded student by ratio={ratio!r}, which begins at the student's function"
                )
