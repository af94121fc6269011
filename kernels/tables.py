"""What the tile kernels are told of a network besides addresses: the layers' sizes and maps, and the tasks.

None of it changes from step to step, so it is made once for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpd_fx.kernels.forms import MOST_LINES, Form, form_of, lines_of, maps_of
from gpd_fx.kernels.recipe import INPUT_FILTER, PRODUCT, Recipe

FEW = 16
"""Up to so many inputs a group, a layer's tiles take rows of several groups."""


@dataclass(frozen=True)
class Blocks:
    """The sizes of tiles, and how many warps work on one."""

    outputs: int
    inputs: int
    inner: int
    rows: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """How triton compiles a kernel; fusion is said aloud, since it warns that its default will change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Tables:
    """What the kernels read of a network's layers, and which variants they need."""

    geometry: Tensor
    maps: Tensor
    tasks: Tensor
    few: int
    small: bool
    large: bool
    lines: bool


def tables_of(recipes: Sequence[Recipe], needed: Sequence[str] | None, blocks: Blocks, device: torch.device) -> Tables:
    """Sizes, maps and tasks of the layers: for the tensors, or for the gradients that are needed."""
    geometry: list[int] = []
    maps: list[Tensor] = []
    tasks: list[tuple[int, ...]] = []
    length, few, has_lines = 0, 1, False
    for layer, recipe in enumerate(recipes):
        form = form_of(recipe)
        assert form is not None
        width = next((part.number for part in recipe.terms if part.kind == PRODUCT), 0)
        rows, columns, taps = maps_of(form, recipe)
        lines = lines_of(recipe)
        has_lines |= bool(lines)
        geometry += [form.groups, form.outputs, form.taps, form.inputs, width, length, length + len(rows), taps]
        geometry += [form.outputs if form.row_groups else 0, form.inputs if form.column_groups else 0]
        geometry += [n for line in lines for n in line] + [0] * (3 * (MOST_LINES - len(lines)) + 1)
        maps += [rows, columns]
        length += len(rows) + len(columns)
        flags = None if needed is None else [flag == "1" for flag in needed[layer]]
        tasks += _tasks(layer, form, recipe, width, flags, blocks)
        if form.inputs <= FEW:
            few = max(few, form.inputs)
    small = any(task[2] for task in tasks)
    return Tables(
        torch.tensor(geometry, dtype=torch.int32).to(device),
        torch.cat(maps).to(torch.int32).to(device),
        torch.tensor(tasks, dtype=torch.int32).to(device),
        2 ** (few - 1).bit_length(),
        small,
        any(not task[2] for task in tasks),
        has_lines,
    )


def _tasks(
    layer: int, form: Form, recipe: Recipe, width: int, needed: Sequence[bool] | None, blocks: Blocks
) -> list[tuple[int, ...]]:
    """The tasks of a layer: (layer, kind, small, group, first, second)."""
    small = int(form.inputs <= FEW)
    if small:
        groups, rows, columns = [0], form.groups * form.outputs, 1
        row_step, column_step = blocks.rows, 1
    else:
        groups, rows, columns = list(range(form.groups)), form.outputs, form.inputs
        row_step, column_step = blocks.outputs, blocks.inputs
    row_starts = range(0, rows, row_step)
    if needed is None:
        return [(layer, 0, small, g, o, i) for g in groups for o in row_starts for i in range(0, columns, column_step)]
    of_kernel, of_columns, of_rows = _wanted(recipe, needed)
    found: list[tuple[int, ...]] = []
    if of_columns and small:
        found += [(layer, 2, 1, 0, i, 0) for i in range(0, form.groups * form.inputs, blocks.outputs)]
    elif of_columns:
        starts = range(0, max(width, 1), blocks.inner)
        found += [(layer, 2, 0, g, i, c) for g in groups for i in range(0, columns, column_step) for c in starts]
    if of_kernel:
        found += [(layer, 1, small, g, o, 0) for g in groups for o in row_starts]
    if of_rows:
        found += [(layer, 0, small, g, o, 0) for g in groups for o in row_starts]
    return found


def _wanted(recipe: Recipe, needed: Sequence[bool]) -> tuple[bool, bool, bool]:
    """Whether a layer has tasks of kind 1, 2 and 0."""
    flags = iter(needed)
    of_rows, of_kernel, of_columns = next(flags), False, False
    for part in recipe.terms:
        mine = [next(flags) for _ in range(part.tensors)]
        if part.kind == PRODUCT:
            of_kernel |= mine[0] or mine[2]
            of_columns |= mine[1]
        elif part.kind == INPUT_FILTER:
            of_rows |= mine[0] or mine[1]
            of_columns |= mine[2]
        else:
            of_rows |= any(mine)
    return of_kernel, of_columns, of_rows
