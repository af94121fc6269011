"""Running the tile kernels: tables of addresses and tasks, and the tensors that come out.

What a layer is does not change from step to step, so its tables are made once. Addresses are looked up in a small
cache too: an allocator that gives the same memory every step, as CUDA's does, spares even their copy to the device.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpd_fx.kernels.forms import (
    MOST_FILTERS,
    MOST_LINES,
    Form,
    blank,
    form_of,
    lines_of,
    maps_of,
    memory_format,
    strides_of,
    tap_stride,
    twin,
)
from gpd_fx.kernels.recipe import INPUT_FILTER, OUTPUT_FILTER, PRODUCT, Operands, Recipe
from gpd_fx.kernels.terms import InputFilter, Line, OutputFilter, Product, Term

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = 16
"""Up to so many inputs a group, a layer's tiles take rows of several groups."""
Pair = tuple[Tensor | None, Tensor | None]


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


FORWARD = Blocks(outputs=16, inputs=64, inner=32, rows=64, warps=8, stages=1)
BACKWARD = Blocks(outputs=16, inputs=64, inner=32, rows=64, warps=8, stages=1)


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


@functools.cache
def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def usable(weights: Sequence[Tensor]) -> bool:
    """Whether tensors of this kind are the kernels' business."""
    first = weights[0]
    return (
        first.device.type == "cuda"
        and first.dtype in DTYPES
        and all(w.dtype == first.dtype and w.device == first.device for w in weights)
        and available()
    )


def supported(recipe: Recipe) -> bool:
    """Whether the kernels can compose a layer."""
    return _form(recipe) is not None


def differentiable(recipe: Recipe, needed: Sequence[bool]) -> bool:
    """Whether the kernels can also give the gradients that are needed: those of an output filter they cannot."""
    place = 1
    for (code, _), count in zip(recipe.terms, recipe.tensors, strict=True):
        if code == OUTPUT_FILTER and needed[place + 2]:
            return False
        place += count
    return supported(recipe)


@functools.lru_cache(maxsize=4096)
def _form(recipe: Recipe) -> Form | None:
    return form_of(recipe)


def forward(recipes: Sequence[Recipe], weights: Sequence[Tensor], operands: Sequence[Operands]) -> list[Pair]:
    """For each layer the teacher's and the student's tensor, where they are asked for; one launch.

    Args:
        recipes: layers for which `supported` holds.
        weights: theirs, all of one dtype of `DTYPES` and on one device.
        operands: their other tensors.
    """
    pairs: list[Pair] = []
    rows: list[int] = []
    kept: list[Tensor] = []  # copies must live until the kernel was started
    for recipe, given, layer in zip(recipes, weights, operands, strict=True):
        weight = given.contiguous(memory_format=memory_format(recipe.last, given.dim()))
        kept.append(weight)
        wide = blank(recipe, recipe.wide, weight) if recipe.teacher else None
        narrow = blank(recipe, recipe.shape, weight) if recipe.student else None
        pairs.append((wide, narrow))
        rows += _addresses(recipe, weight, wide, narrow, None, layer, None, kept)
    tables = _tables(tuple(recipes), _widths(operands), None, FORWARD, weights[0].device)
    _launch("compose_tiles", tables, rows, FORWARD, weights[0])
    del kept
    return pairs


def backward(
    recipes: Sequence[Recipe],
    operands: Sequence[Operands],
    gradients: Sequence[Pair],
    needed: Sequence[Sequence[bool]],
) -> list[list[Tensor | None]]:
    """For each layer the gradients of its weight and of its terms' tensors, where they are asked for; one launch."""
    found: list[list[Tensor | None]] = []
    rows: list[int] = []
    kept: list[Tensor] = []
    example: Tensor | None = None
    for recipe, layer, (wide, narrow), flags in zip(recipes, operands, gradients, needed, strict=True):
        like = wide if wide is not None else narrow
        assert like is not None
        example = like
        wide = None if wide is None else wide.contiguous(memory_format=memory_format(recipe.last, wide.dim()))
        narrow = None if narrow is None else narrow.contiguous(memory_format=memory_format(recipe.last, narrow.dim()))
        layout = blank(recipe, recipe.wide, like.new_empty(0, device="meta"))
        of_weight = blank(recipe, recipe.wide, like) if flags[0] else None
        tensors = [t for term in layer.terms for t in term.tensors]
        others = [twin(t) if flag else None for t, flag in zip(tensors, flags[1:], strict=True)]
        found.append([of_weight, *others])
        kept += [t for t in (wide, narrow) if t is not None]
        rows += _addresses(recipe, layout, wide, narrow, of_weight, layer, others, kept)
    assert example is not None
    flags = tuple(tuple(layer) for layer in needed)
    tables = _tables(tuple(recipes), _widths(operands), flags, BACKWARD, example.device)
    _launch("differentiate_tiles", tables, rows, BACKWARD, example)
    return found


def _addresses(
    recipe: Recipe,
    weight: Tensor,
    wide: Tensor | None,
    narrow: Tensor | None,
    of_weight: Tensor | None,
    operands: Operands,
    gradients: Sequence[Tensor | None] | None,
    kept: list[Tensor],
) -> list[int]:
    """A layer's row of the table of addresses and strides, in the order that `tile_parts` states."""
    form = _form(recipe)
    assert form is not None

    def at(tensor: Tensor | None) -> int:
        return 0 if tensor is None or tensor.device.type == "meta" else tensor.data_ptr()

    def regular(tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            return tensor
        kept.append(tensor.contiguous())
        return kept[-1]

    alpha = operands.alpha

    def factor(dim: int | None) -> Tensor | None:
        return alpha[dim] if dim is not None and dim < len(alpha) else None

    row = [at(weight), at(wide), at(narrow), at(of_weight), at(factor(form.row)), at(factor(form.column))]
    row += strides_of(form, recipe, weight)
    left = iter(gradients if gradients is not None else [None] * sum(recipe.tensors))
    parts: list[tuple[Term, list[Tensor | None]]] = [(t, [next(left) for _ in t.tensors]) for t in operands.terms]
    filtered = [[*t.tensors, *d[:2]] for t, d in parts if isinstance(t, OutputFilter)]
    for tensors in filtered:
        row += [at(regular(t)) if t is not None else 0 for t in tensors]
    row += [0] * 5 * (MOST_FILTERS - len(filtered))
    summed = [[*t.tensors, *d] for t, d in parts if isinstance(t, InputFilter)]
    row += [at(regular(t)) if t is not None else 0 for t in summed[0]] if summed else [0] * 6
    product = next(((t, d) for t, d in parts if isinstance(t, Product)), None)
    if product is None:
        row += [0] * 10
    else:
        term, of_term = product
        kernel, of_kernel = term.kernel, of_term[2]
        if tap_stride(kernel.stride()[3:], kernel.shape[3:]) is None:
            kernel = regular(kernel)
        row += [at(regular(term.scale)), at(regular(term.point)), at(kernel), at(of_term[0]), at(of_term[1])]
        row += [at(of_kernel), *kernel.stride()[:3], tap_stride(kernel.stride()[3:], kernel.shape[3:]) or 0]
    lines = [[*t.tensors, *d] for t, d in parts if isinstance(t, Line)]
    for tensors in lines:
        row += [at(regular(t)) if t is not None else 0 for t in tensors]
    return row + [0] * (4 * (MOST_LINES - len(lines)) + 1)


def _widths(operands: Sequence[Operands]) -> tuple[int, ...]:
    """The inner width of each layer's product, or 0."""
    return tuple(next((t.point.shape[1] for t in o.terms if isinstance(t, Product)), 0) for o in operands)


@functools.lru_cache(maxsize=64)
def _tables(
    recipes: tuple[Recipe, ...],
    widths: tuple[int, ...],
    needed: tuple[tuple[bool, ...], ...] | None,
    blocks: Blocks,
    device: torch.device,
) -> Tables:
    """Sizes, maps and tasks of the layers: for the tensors, or for the gradients that are needed."""
    geometry: list[int] = []
    maps: list[Tensor] = []
    tasks: list[tuple[int, ...]] = []
    length, few, has_lines = 0, 1, False
    for layer, (recipe, width) in enumerate(zip(recipes, widths, strict=True)):
        form = _form(recipe)
        assert form is not None
        rows, columns, taps = maps_of(form, recipe)
        lines = lines_of(recipe)
        has_lines |= bool(lines)
        geometry += [form.groups, form.outputs, form.taps, form.inputs, width, length, length + len(rows), taps]
        geometry += [form.outputs if form.row_groups else 0, form.inputs if form.column_groups else 0]
        geometry += [n for line in lines for n in line] + [0] * (3 * (MOST_LINES - len(lines)) + 1)
        maps += [rows, columns]
        length += len(rows) + len(columns)
        flags = None if needed is None else needed[layer]
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
    for (code, _), count in zip(recipe.terms, recipe.tensors, strict=True):
        mine = [next(flags) for _ in range(count)]
        if code == PRODUCT:
            of_kernel |= mine[0] or mine[2]
            of_columns |= mine[1]
        elif code == INPUT_FILTER:
            of_rows |= mine[0] or mine[1]
            of_columns |= mine[2]
        else:
            of_rows |= any(mine)
    return of_kernel, of_columns, of_rows


_sent: OrderedDict[tuple[torch.device, int, tuple[int, ...]], tuple[Tensor, Tensor]] = OrderedDict()
_MOST_SENT = 64


def _send(rows: Sequence[int], device: torch.device) -> Tensor:
    """The addresses on the device."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, tuple(rows))  # another stream would have to wait for the copy
    if key in _sent:
        _sent.move_to_end(key)
        return _sent[key][1]
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory()
    sent = table.to(device, non_blocking=True)
    _sent[key] = (table, sent)  # the pinned copy lives as long: a captured CUDA graph reads it at every replay
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    while len(_sent) > _MOST_SENT and not capturing:
        _sent.popitem(last=False)
    return sent


def _launch(name: str, tables: Tables, rows: Sequence[int], blocks: Blocks, like: Tensor) -> None:
    """Start a kernel, one program a task."""
    import triton.language as tl  # triton is an extra, and there is none for every system

    from gpd_fx.kernels import tile_kernels

    dtype = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[like.dtype]
    hip = torch.version.hip is not None
    few, small, large, lines = tables.few, tables.small, tables.large, tables.lines
    with torch.cuda.device_of(like):
        getattr(tile_kernels, name)[(len(tables.tasks),)](
            tables.tasks,
            _send(rows, like.device),
            tables.geometry,
            tables.maps,
            **constants(blocks, few=few, small=small, large=large, lines=lines, hip=hip, dtype=dtype),
            **blocks.options(),
        )


def constants(
    blocks: Blocks, *, few: int, small: bool, large: bool, lines: bool, hip: bool, dtype: object
) -> dict[str, Any]:
    """What a kernel is compiled for: the sizes of tiles, the variant, AMD's devices or NVIDIA's, and triton's dtype."""
    return {
        "outputs_block": blocks.outputs,
        "inputs_block": blocks.inputs,
        "inner": blocks.inner,
        "rows_block": blocks.rows,
        "few": few,
        "has_small": small,
        "has_large": large,
        "has_lines": lines,
        "precision": "ieee" if hip else "tf32x3",
        "dtype": dtype,
    }
