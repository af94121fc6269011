"""How a layer lies before the tile kernels: a matrix of outputs and inputs for each group and tap."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpd_fx.kernels.compose.layout import Cut
from gpd_fx.kernels.compose.recipe import (
    INPUT_FILTER,
    LINE,
    OUTPUT_FILTER,
    PRODUCT,
    Recipe,
)
from gpd_fx.kernels.compose.terms import tap

MOST_FILTERS, MOST_LINES = 3, 3
_ROOM = {
    OUTPUT_FILTER: (MOST_FILTERS, "OutputFilter"),
    INPUT_FILTER: (1, "InputFilter"),
    PRODUCT: (1, "Product"),
    LINE: (MOST_LINES, "Line"),
}
_LARGEST = 2**31 - 1  # offsets within a tensor are 32-bit


@dataclass(frozen=True)
class Form:
    """The sizes of a layer, and the storage dimensions that its rows (outputs) and columns (inputs) come from.

    Attributes:
        groups, outputs, taps, inputs: the sizes; they multiply to the number of elements.
        row, column: the storage dimension that alpha and slice belong to; None where neither is there.
        row_groups, column_groups: whether that dimension counts through all groups.
    """

    groups: int
    outputs: int
    taps: int
    inputs: int
    row: int | None
    column: int | None
    row_groups: bool = False
    column_groups: bool = False


@functools.lru_cache(maxsize=4096)
def form_of(recipe: Recipe) -> Form | None:
    """The form of a layer, or None where the tile kernels cannot take it."""
    return None if obstacle(recipe) is not None else _form(recipe)


@functools.lru_cache(maxsize=4096)
def obstacle(recipe: Recipe) -> str | None:
    """Why the tile kernels cannot take a layer, or None where they can."""
    if math.prod(recipe.wide) > _LARGEST:
        return f"its weight has more than {_LARGEST:,} elements"
    if any(part is True for part in recipe.slices):
        return "the student's part of its weight is no run of channels at even distances"
    if recipe.is_kernel:
        if any(d >= 2 for d in range(len(recipe.wide)) if _active(recipe, d)):
            return "more than its outputs and inputs is widened"
        return _too_many(recipe)
    active = sum(_active(recipe, d) for d in range(len(recipe.wide)))
    if recipe.terms:
        return "it has branches, and is no kernel of a conv or linear op"
    if not 1 <= active <= 2:
        return f"{active} of its dimensions are widened; the kernels take one or two"
    return None if _form(recipe) is not None else "a dimension between the two that are widened, and one behind them"


def _form(recipe: Recipe) -> Form | None:
    """The form of a layer without any other obstacle than where its widened dimensions lie."""
    if recipe.is_kernel:
        assert recipe.layout is not None
        g, o, i, taps = recipe.canonical
        if recipe.layout.transposed:
            return Form(g, o, taps, i, 1, 0, column_groups=True)
        return Form(g, o, taps, i, 0, 1, row_groups=True)
    active = [d for d in range(len(recipe.wide)) if _active(recipe, d)]
    first, last = active[0], active[-1]
    outer, inner = math.prod(recipe.wide[:first]), math.prod(recipe.wide[last + 1 :])
    if first == last:
        return Form(outer, recipe.wide[first], 1, inner, first, None)
    between = math.prod(recipe.wide[first + 1 : last])
    if between > 1 and inner > 1:
        return None
    return Form(outer, recipe.wide[first], between * inner, recipe.wide[last], first, last)


def _active(recipe: Recipe, dim: int) -> bool:
    """Whether a dimension has a factor or is cut."""
    scaled = dim < len(recipe.alpha) and recipe.alpha[dim]
    return scaled or (dim < len(recipe.slices) and recipe.slices[dim] is not None)


def _too_many(recipe: Recipe) -> str | None:
    """Which terms are more than the kernels have room for, or of a kind that they do not know."""
    if any(part.kind not in _ROOM for part in recipe.terms):
        return "its branches have terms of a kind that the kernels do not know"
    for code, (most, name) in _ROOM.items():
        number = sum(part.kind == code for part in recipe.terms)
        if number > most:
            return f"its branches have {number} terms of the kind {name}; the kernels have room for {most}"
    return None


def strides_of(form: Form, recipe: Recipe) -> tuple[int, int, int, int]:
    """The strides of group, output, tap and input in a tensor that lies as the weight does."""
    sizes, strides = recipe.wide, lying(recipe.wide, recipe.last)
    if recipe.is_kernel:
        assert recipe.layout is not None
        taps = tap_stride(strides[2:], sizes[2:])
        if recipe.layout.transposed:
            return form.inputs * strides[0], strides[1], taps, strides[0]
        return form.outputs * strides[0], strides[0], taps, strides[1]
    assert form.row is not None
    row = math.prod(sizes[form.row + 1 :])
    group = form.outputs * row
    if form.column is None:
        return group, row, 0, 1
    column = math.prod(sizes[form.column + 1 :])
    return group, row, 1 if column > 1 else form.inputs, column


def tap_stride(strides: Sequence[int], sizes: Sequence[int]) -> int:
    """The stride of the kernel axes taken as one; 0 where there is one tap."""
    return next((stride for stride, size in zip(reversed(strides), reversed(sizes), strict=True) if size > 1), 0)


def lying(shape: Sequence[int], last: bool) -> tuple[int, ...]:
    """The strides of a contiguous tensor, or of one of four or five dimensions whose channels come last."""
    order = [0, *range(2, len(shape)), 1] if last else list(range(len(shape)))
    found, step = [1] * len(shape), 1
    for dim in reversed(order):
        found[dim] = step
        step *= max(shape[dim], 1)
    return tuple(found)


def memory_format(last: bool, dims: int) -> torch.memory_format:
    """How a tensor of a layer lies."""
    if last:
        return torch.channels_last if dims == 4 else torch.channels_last_3d
    return torch.contiguous_format


def maps_of(form: Form, recipe: Recipe) -> tuple[Tensor, Tensor, int]:
    """Where the student has each row and column, in elements, or -1; and how far apart its taps are."""
    strides = lying(recipe.shape, recipe.last)
    assert form.row is not None
    rows = _offsets(recipe, form.row, strides[form.row])
    if recipe.is_kernel:
        assert form.column is not None
        columns = _offsets(recipe, form.column, strides[form.column])
        rows = rows if form.row_groups else rows.repeat(form.groups)
        columns = columns if form.column_groups else columns.repeat(form.groups)
        return rows, columns, tap_stride(strides[2:], recipe.shape[2:])
    step = recipe.shape[form.row] * strides[form.row]
    rows = torch.where(rows >= 0, rows + step * torch.arange(form.groups)[:, None], -1).flatten()
    if form.column is None:
        return rows, torch.arange(form.inputs).repeat(form.groups), 0
    columns = _offsets(recipe, form.column, strides[form.column])
    taps = 1 if strides[form.column] > 1 else recipe.shape[form.column]
    return rows, columns.repeat(form.groups), taps


def _offsets(recipe: Recipe, dim: int, stride: int) -> Tensor:
    """Where the student has each index of a dimension, or -1."""
    size = recipe.wide[dim]
    part = recipe.slices[dim] if dim < len(recipe.slices) else None
    kept = torch.arange(size)
    if part is not None:
        assert isinstance(part, Cut)
        kept = kept.view(part.of, -1)[: part.blocks, : part.length].flatten()
    offsets = torch.full((size,), -1)
    offsets[kept] = torch.arange(len(kept)) * stride
    return offsets


def lines_of(recipe: Recipe) -> list[tuple[int, int, int]]:
    """For each line its length, its first tap, and the step between its taps."""
    found: list[tuple[int, int, int]] = []
    kernel = recipe.layout.canonical_shape(recipe.wide)[3:] if recipe.layout is not None else ()
    for code, axis, _ in recipe.terms:
        if code == LINE:
            steps = [math.prod(kernel[a + 1 :]) for a in range(len(kernel))]
            first = sum(tap(n) * steps[a] for a, n in enumerate(kernel) if a != axis)
            found.append((kernel[axis], first, steps[axis]))
    return found
