"""Growth in steps: a trained dynamic teacher becomes a wider one that computes what it computed.

Both teachers hold copies of the student's channels along every widened axis. The r-th copy of a channel in the new one
is made of copy r mod m in the old one, which had m. Where an axis is contracted, the old copy i had the share a[i], and
the new copies J of it have b[j]; they are multiplied by f[j] so that what flows in is the same:

    sum over J of b[j] f[j] = a[i],    f = 1 for the student's own,    f equal for the others

So the student's slice stays as it is, bit for bit. Branches are merged into the weights; the new ones begin at zero.
Shares that a wide graph multiplies into activations cannot be made up for so; such a growth is found and refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gpd_fx.compare import random_like, relative_error
from gpd_fx.errors import ArgumentError, VerificationError
from gpd_fx.expansion import make_draft, make_teacher, study_model
from gpd_fx.layout import ParamPlan, along
from gpd_fx.passes.fold import fold
from gpd_fx.plan import Plan
from gpd_fx.ratios import Ratio
from gpd_fx.teacher import DynamicTeacher

_TOLERANCE = 1e-9


@torch.inference_mode(mode=False)
@torch.no_grad()
def grow(
    teacher: DynamicTeacher, ratio: Ratio, *, branches: str | Sequence[str] | None = "orepa", seed: int | None = None
) -> DynamicTeacher:
    """A wider dynamic teacher of the same student that computes what `teacher` computes now.

    Args:
        teacher: trained or not. It is not changed.
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
    kinds = {(p.dtype, p.device) for p in teacher.parameters() if p.is_floating_point()}
    if len(kinds) != 1:
        raise ArgumentError(f"grow needs floating parameters of one dtype on one device, the teacher has {len(kinds)}")
    ((dtype, device),) = kinds
    before = copy.deepcopy(teacher).double().eval()
    student = fold(before)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, before.example)
    recipe = before.recipe
    old = make_draft(study_model(student, args, kwargs), recipe["ratio"], recipe["exclude"], recipe["seed"]).plan
    draft = make_draft(
        study_model(student, args, kwargs), ratio, recipe["exclude"], recipe["seed"] if seed is None else seed
    )
    grown = make_teacher(draft, branches, verify=False)
    _fill(grown, before, old, draft.plan)
    inputs = random_like((args, kwargs), torch.Generator().manual_seed(0), torch.float64)
    error = relative_error(before(*inputs[0], **inputs[1]), grown.eval()(*inputs[0], **inputs[1]))
    if not error <= _TOLERANCE:
        raise VerificationError(
            f"the grown teacher differs from the old one by {error:.1e} of the output: shares that a graph multiplies "
            "into activations, as in attention over widths that widen, cannot be made up for in weights; expand the "
            f"folded student by ratio={ratio!r} instead, which begins at the student's function"
        )
    return grown.to(device=device, dtype=dtype).train(teacher.training)


def _fill(grown: DynamicTeacher, before: DynamicTeacher, old: Plan, new: Plan) -> None:
    """Give the new teacher the old one's values."""
    scaled, student = before.composition()
    for name, weight in before.composition.weights.named_parameters():
        first, second = _plans(name, weight, student[name], old, new)
        value = scaled[name]
        for dim, alpha in enumerate(first.alpha):
            if alpha is not None:
                value = value / along(alpha, dim, value.dim()).to(value.device)
        for dim in range(value.dim()):
            index, factor = _growth(first, second, dim)
            value = value.index_select(dim, index.to(value.device))
            if factor is not None:
                value = value * along(factor, dim, value.dim()).to(value.device)
        own = [torch.arange(size) if k is None else k for k, size in zip(second.keep, value.shape, strict=True)]
        if own:
            value[torch.meshgrid(*own, indexing="ij")] = student[name]  # exact to the bit
        grown.composition.weights.get_parameter(name).copy_(value)
    for name, buffer in grown.wide_buffers.named_buffers():
        value = before.wide_buffers.get_buffer(name)
        first, second = old.tensors[name], new.tensors[name]
        for dim in range(value.dim()):
            value = value.index_select(dim, _copies(first, second, dim).to(value.device))
        buffer.copy_(value)


def _plans(name: str, wide: nn.Parameter, narrow: Tensor, old: Plan, new: Plan) -> tuple[ParamPlan, ParamPlan]:
    same = ParamPlan.identity(name, tuple(narrow.shape))
    first, second = old.tensors.get(name, same), new.tensors.get(name, same)
    if first.wide_shape != tuple(wide.shape):
        raise ArgumentError(f"the plan of {name!r} is another one here than when the teacher was made; use one version")
    return first, second


def _copies(old: ParamPlan, new: ParamPlan, dim: int) -> Tensor:
    """For each index of a dimension of the new tensor the index of the old one that it is made of."""
    size = old.shape[dim]
    gathers = [torch.arange(size) if plan.gather[dim] is None else plan.gather[dim] for plan in (old, new)]
    first, second = (gather.tolist() for gather in gathers if gather is not None)
    places: list[list[int]] = [[] for _ in range(size)]
    for place, channel in enumerate(first):
        places[channel].append(place)
    seen = [0] * size
    index: list[int] = []
    for channel in second:
        index.append(places[channel][seen[channel] % len(places[channel])])
        seen[channel] += 1
    if any(count < len(place) for count, place in zip(seen, places, strict=True)):
        raise ArgumentError(f"{old.name!r} would become narrower along dimension {dim}; a teacher only grows")
    return torch.tensor(index, dtype=torch.int64)


def _growth(old: ParamPlan, new: ParamPlan, dim: int) -> tuple[Tensor, Tensor | None]:
    """The copies, and what each is multiplied by where the dimension is contracted."""
    index = _copies(old, new, dim)
    before, after = old.alpha[dim], new.alpha[dim]
    if before is None and after is None:
        return index, None
    a = torch.ones(old.wide_shape[dim], dtype=torch.float64) if before is None else before
    b = torch.ones(new.wide_shape[dim], dtype=torch.float64) if after is None else after
    kept = torch.arange(new.shape[dim]) if new.keep[dim] is None else new.keep[dim]
    assert kept is not None
    own = torch.zeros(len(index), dtype=torch.bool).index_fill(0, kept, True)
    share = torch.zeros_like(a).index_add(0, index, torch.where(own, b, 0.0))  # of what stays as it is
    rest = torch.zeros_like(a).index_add(0, index, torch.where(own, 0.0, b))
    missing = a - share
    if bool(((rest == 0) & (missing.abs() > 1e-12)).any()):
        raise ArgumentError(
            f"{old.name!r} gets no copy of some of the student's channels along dimension {dim}; grow by a whole factor"
        )
    factor = torch.where(rest == 0, 1.0, missing / torch.where(rest == 0, 1.0, rest))
    return index, torch.where(own, 1.0, factor[index])
