"""What the tile kernels are told of a network besides addresses: the layers' sizes and maps, and the tasks.

None of it changes from step to step, so it is made once for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpd_fx.kernels.compose.columns import UNIT
from gpd_fx.kernels.compose.forms import (
    MOST_LINES,
    Form,
    form_of,
    lines_of,
    maps_of,
)
from gpd_fx.kernels.compose.recipe import INPUT_FILTER, PRODUCT, Recipe

FEW = 16
"""Up to so many inputs a group, a layer's tiles take lines of several groups."""
SUMMED_AT_ONCE = 1024
"""How many numbers a program of the last launch makes of their parts."""

Task = tuple[int, int, int, int, int, int, int]


@dataclass(frozen=True)
class Blocks:
    """The sizes of tiles, and how many warps work on one.

    Attributes:
        lines: of the forward pass's tiles, and of those of dK.
        outputs: of the tiles of what sums over taps.
        inputs: of all tiles but those of dK, which have as many inner channels.
        inner: inner channels of the tiles of dP.
        chunk: how much of the sum of a product is taken at a time.
        part: how many lines of a layer one program sums, a multiple of `chunk`; more where its product is wide.
        warps, stages: what triton is told.
    """

    lines: int
    outputs: int
    inputs: int
    inner: int
    chunk: int
    part: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        """Check that parts end where a chunk does: a chunk across two of them would be summed twice.

        Raises:
            ValueError: they do not.
        """
        if self.chunk < 1 or self.part < 1 or self.part % self.chunk:
            raise ValueError(f"Blocks(part={self.part}) must be a multiple of chunk={self.chunk}")

    def options(self) -> dict[str, Any]:
        """How triton compiles a kernel; fusion is said aloud, since it warns that its default will change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Tables:
    """What the kernels read of a network's layers, and which variants they need.

    Attributes:
        geometry, maps, tasks: the tables; `sums` are the tasks of the launch that adds parts.
        scratch: how many numbers the parts take.
        few: inputs a group of a small layer, at most.
        taps: of a large layer with a filter an input channel, at most; the two are powers of 2.
        small, large, lines: whether there are such layers.
    """

    geometry: Tensor
    maps: Tensor
    tasks: Tensor
    sums: Tensor
    scratch: int
    few: int
    taps: int
    small: bool
    large: bool
    lines: bool


def tables_of(recipes: Sequence[Recipe], needed: Sequence[str] | None, blocks: Blocks, device: torch.device) -> Tables:
    """Sizes, maps and tasks of the layers: for the tensors, or for the gradients that are needed."""
    geometry: list[int] = []
    maps: list[Tensor] = []
    tasks: list[Task] = []
    sums: list[Task] = []
    length, scratch, few, most_taps, has_lines = 0, 0, 1, 1, False
    for layer, recipe in enumerate(recipes):
        form = form_of(recipe)
        assert form is not None
        width = next((part.number for part in recipe.terms if part.kind == PRODUCT), 0)
        rows, columns, taps = maps_of(form, recipe)
        lines = lines_of(recipe)
        has_lines |= bool(lines)
        geometry += [form.groups, form.outputs, form.taps, form.inputs, width, length, length + len(rows), taps]
        geometry += [form.outputs if form.row_groups else 0, form.inputs if form.column_groups else 0]
        geometry += [n for line in lines for n in line] + [0] * (3 * (MOST_LINES - len(lines)))
        maps += [rows, columns]
        length += len(rows) + len(columns)
        wanted = None if needed is None else _wanted(recipe, [flag == "1" for flag in needed[layer]])
        small = form.inputs <= FEW
        tasks += _few_tasks(layer, form, wanted, blocks) if small else _tasks(layer, form, width, wanted, blocks)
        part = _part(width, blocks)
        parts = 1 if small else -(-form.outputs * form.taps // part)
        geometry += [parts, part, scratch // UNIT]
        if small:
            few = max(few, form.inputs)
        elif wanted is not None and wanted.columns:
            filters = form.taps if any(part.kind == INPUT_FILTER for part in recipe.terms) else 0
            most_taps = max(most_taps, filters)
            if parts > 1:
                sizes = [form.groups * form.inputs * n for n in (width, filters)]
                sums += [(layer, n, 0, 0, at, 0, 0) for n in range(2) for at in range(0, sizes[n], SUMMED_AT_ONCE)]
                scratch += -(-parts * sum(sizes) // UNIT) * UNIT
    small = any(task[2] for task in tasks)
    return Tables(
        torch.tensor(geometry, dtype=torch.int32).to(device),
        torch.cat(maps).to(torch.int32).to(device),
        torch.tensor(tasks, dtype=torch.int32).to(device),
        torch.tensor(sums, dtype=torch.int32).to(device),
        scratch,
        _power(few),
        max(_power(most_taps), 16),  # the least that a matrix unit takes
        small,
        any(not task[2] for task in tasks),
        has_lines,
    )


class Wanted(NamedTuple):
    """Which kinds of task a layer has for its gradients: 0, 1, and 2."""

    rows: bool
    kernel: bool
    columns: bool


def _few_tasks(layer: int, form: Form, wanted: Wanted | None, blocks: Blocks) -> list[Task]:
    """The tasks of a layer of few inputs a group, which take lines, outputs or inputs through all groups."""
    rows = form.groups * form.outputs
    if wanted is None:
        return [(layer, 0, 1, 0, line, 0, 0) for line in range(0, rows * form.taps, blocks.lines)]
    found: list[Task] = []
    if wanted.columns:
        found += [(layer, 2, 1, 0, i, 0, 0) for i in range(0, form.groups * form.inputs, blocks.outputs)]
    for kind in (1, 0):
        if wanted[kind]:
            found += [(layer, kind, 1, 0, o, 0, 0) for o in range(0, rows, blocks.lines)]
    return found


def _tasks(layer: int, form: Form, width: int, wanted: Wanted | None, blocks: Blocks) -> list[Task]:
    """The tasks of any other."""
    groups, columns = range(form.groups), range(0, form.inputs, blocks.inputs)
    if wanted is None:
        lines = range(0, form.outputs * form.taps, blocks.lines)
        return [(layer, 0, 0, g, line, i, 0) for g in groups for line in lines for i in columns]
    found: list[Task] = []
    starts = range(0, max(width, 1), blocks.inner)
    several, length, end = max(blocks.lines // form.taps, 1), _part(width, blocks), form.outputs * form.taps
    for g in groups:
        for part, first in enumerate(range(0, end, length)):  # all that reads the same gradient comes close together
            lines = range(first, min(first + length, end))
            if wanted.columns:
                found += [(layer, 2, 0, g, i, c, part) for i in columns for c in starts]
            if wanted.kernel:
                found += [(layer, 1, 0, g, o, 0, 0) for o in _first_of(lines, form.taps, several)]
            if wanted.rows:
                found += [(layer, 0, 0, g, o, 0, 0) for o in _first_of(lines, form.taps, blocks.outputs)]
    return found


def _first_of(lines: range, taps: int, step: int) -> range:
    """The first outputs of those blocks of `step` outputs whose first line is one of `lines`."""
    size = step * taps
    return range(-(-lines.start // size) * step, -(-lines.stop // size) * step, step)


def _part(width: int, blocks: Blocks) -> int:
    """How many lines of a layer are summed at once: enough for their gradient to be four times as large as the sum."""
    return blocks.part * max(1, -(-4 * width // blocks.part))


def _power(number: int) -> int:
    """The next power of 2."""
    return 2 ** (number - 1).bit_length()


def _wanted(recipe: Recipe, needed: Sequence[bool]) -> Wanted:
    """What a layer's needed gradients take."""
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
    return Wanted(of_rows, of_kernel, of_columns)
