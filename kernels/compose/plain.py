"""The composition of one layer in plain torch, forward and backward, made for the CPU's caches.

A chunk of the kernel's rows (g, o) at a time is summed up in a scratch of a few hundred kilobytes, whose order is
(g, o, taps, i): there the inner width of a product and the taps are rows of one matrix, and all else is arithmetic on
long rows. Only its sum meets the kernel, whose order is (g, o, i, taps). So each element of the weight is read once and
each of the outputs written once, and there are no temporaries as large as a layer.

With G the gradient of M, which is alpha times the teacher's plus the student's, and S a chunk of it in that order:

    OutputFilter    dP[o,i] = v[o] sum_k S F[o,k]     dF[o,k] = v[o] sum_i S P[o,i]     dv[o] = sum S P F
    InputFilter     dP[o,i] = v[o] sum_k S F[i,k]     dF[i,k] = sum_o v[o] S P[o,i]     dv[o] = sum S P F
    Product         dK[o,c,k] = v[o] sum_i S P[c,i]   dP[c,i] = sum_ok v[o] S K[o,c,k]  dv[o] = sum_ck K dK / v
    Line            dL[o,i,k_a] = v[o] S              dv[o] = sum S L
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gpd_fx.kernels.compose.layout import (
    Cut,
    KernelLayout,
    Slice,
    along,
    take,
)
from gpd_fx.kernels.compose.recipe import Operands, Recipe
from gpd_fx.kernels.compose.terms import (
    InputFilter,
    Line,
    OutputFilter,
    Product,
    Term,
    tap,
)

CHUNK = 1 << 21
"""Bytes of scratch a thread: what fits into a core's second-level cache beside the operands."""
_LARGE = 4 << 20
_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)

Chunk = tuple[slice, slice]
Gradients = Sequence[Tensor | None]
"""What to write a term's gradients to, in the order of its tensors; None where none is asked for."""


def forward(recipe: Recipe, weight: Tensor, operands: Operands) -> tuple[Tensor | None, Tensor | None]:
    """The layer's tensor for the teacher and for the student; None where it is not asked for."""
    wide: Tensor | None = None
    if recipe.terms:
        wide = fresh(recipe.wide, weight)
        _merge(recipe, weight, operands.terms, wide)
    source = weight if wide is None else wide
    narrow: Tensor | None = None
    if recipe.student:
        narrow = fresh(recipe.shape, weight).copy_(take(source, operands.slices, recipe.shape))
    if not recipe.teacher:
        return None, narrow
    if wide is None:
        wide = fresh(recipe.wide, weight)
    return _scale(source, operands.alpha, wide), narrow


def backward(
    recipe: Recipe, operands: Operands, teacher: Tensor | None, student: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the weight and of the terms' tensors, from those of the two outputs."""
    like = teacher if teacher is not None else student
    assert like is not None
    merged = fresh(recipe.wide, like)
    if teacher is None:
        merged.zero_()
    else:
        _scale(teacher, operands.alpha, merged)
    if student is not None:
        _add_slice(merged, operands.slices, student)
    found: list[Tensor | None] = [merged if needed[0] else None]
    flags = iter(needed[1:])
    parts: list[list[Tensor | None]] = []
    for term in operands.terms:
        parts.append([fresh(t.shape, t) if next(flags) else None for t in term.tensors])
        found += parts[-1]
    if any(needed[1:]):
        _differentiate(recipe, merged, operands.terms, parts)
    return found


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor.

    A large one is new memory each time, and its first touch costs more than the arithmetic: ask for huge pages.
    """
    tensor = like.new_empty(tuple(shape))
    size = tensor.numel() * tensor.element_size()
    if size >= _LARGE and tensor.device.type == "cpu":
        advise = _advise()
        if advise is not None:
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            advise(start, tensor.data_ptr() + size - start, _HUGE_PAGES)  # a hint: whether it is taken does not matter
    return tensor


@functools.cache
def _advise() -> Callable[[int, int, int | None], int] | None:
    if _HUGE_PAGES is None:
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _scale(source: Tensor, factors: Sequence[Tensor | None], out: Tensor) -> Tensor:
    """`source` times each factor along its dimension; both may be the same tensor."""
    source = source.contiguous()
    for dim, factor in enumerate(factors):
        if factor is not None:
            inner = math.prod(source.shape[dim + 1 :])
            if 1 < inner < 64:  # short rows: repeat the factor, so that the rows become long
                rows = (-1, factor.numel() * inner)
                torch.mul(source.view(rows), factor.repeat_interleave(inner), out=out.view(rows))
            else:
                torch.mul(source, along(factor, dim, source.dim()), out=out)
            source = out
    return out if source is out else out.copy_(source)


def _add_slice(wide: Tensor, slices: Sequence[Slice], narrow: Tensor) -> None:
    """wide[student's slice] += narrow."""
    if any(isinstance(part, Tensor) for part in slices):
        index = [
            along(_index(part, size, wide.device), dim, wide.dim())
            for dim, (part, size) in enumerate(zip(slices, wide.shape, strict=True))
        ]
        wide[tuple(index)] += narrow  # no index comes twice
        return
    view, sizes = wide, list[int]()
    for dim in reversed(range(wide.dim())):  # from the last, since a cut adds a dimension
        part = slices[dim] if dim < len(slices) else None
        if isinstance(part, Cut):
            view = view.unflatten(dim, (part.of, -1)).narrow(dim, 0, part.blocks).narrow(dim + 1, 0, part.length)
            sizes += [part.length, part.blocks]
        else:
            sizes.append(wide.shape[dim])
    view += narrow.reshape(sizes[::-1])


def _index(part: Slice, size: int, device: torch.device) -> Tensor:
    if isinstance(part, Tensor):
        return part
    index = torch.arange(size, device=device)
    return index if part is None else index.view(part.of, -1)[: part.blocks, : part.length].reshape(-1)


def _chunks(recipe: Recipe, like: Tensor) -> Iterator[Chunk]:
    """Ranges of groups and of outputs: whole groups, or rows of one."""
    g, o, i, taps = recipe.canonical
    if like.device.type != "cpu":
        yield slice(0, g), slice(0, o)
        return
    rows = max(1, CHUNK * torch.get_num_threads() // (i * taps * like.element_size()))
    groups, rows = max(1, rows // o), min(rows, o)
    for first in range(0, g, groups):
        for row in range(0, o, rows):
            yield slice(first, min(first + groups, g)), slice(row, min(row + rows, o))


def _scratch(recipe: Recipe, like: Tensor) -> Tensor:
    """Room for the largest chunk, the first."""
    groups, rows = next(_chunks(recipe, like))
    _, _, i, taps = recipe.canonical
    return like.new_empty(groups.stop * rows.stop * taps * i)


def _shaped(scratch: Tensor, chunk: Chunk, *sizes: int) -> Tensor:
    """The beginning of the scratch as (g, o, *sizes)."""
    g, o = (part.stop - part.start for part in chunk)
    return scratch[: g * o * math.prod(sizes)].view(g, o, *sizes)


def _canonical(layout: KernelLayout, tensor: Tensor, recipe: Recipe) -> Tensor:
    """A stored tensor as (g, o, i, taps); a view where it is contiguous."""
    return layout.canonical(tensor).reshape(recipe.canonical)


def _merge(recipe: Recipe, weight: Tensor, terms: Sequence[Term], out: Tensor) -> None:
    """out = weight + sum of terms."""
    assert recipe.layout is not None
    _, _, i, taps = recipe.canonical
    scratch = _scratch(recipe, weight)
    source, target = (_canonical(recipe.layout, t, recipe) for t in (weight, out))
    adders = [_adder(recipe, term) for term in terms]
    for chunk in _chunks(recipe, weight):
        straight = taps == 1  # both orders are the same
        total = target[chunk].copy_(source[chunk]).mT if straight else _shaped(scratch, chunk, taps, i).zero_()
        for add in adders:
            add(total, chunk)
        if not straight:
            torch.add(source[chunk], total.mT, out=target[chunk])


def _adder(recipe: Recipe, term: Term) -> Callable[[Tensor, Chunk], object]:
    """A function that adds a chunk of the term to (g, o, taps, i)."""
    _, _, i, taps = recipe.canonical
    scale = term.scale
    if isinstance(term, OutputFilter):
        filters = term.filters.reshape(*scale.shape, taps) * scale[..., None]
        return lambda total, at: total.addcmul_(term.point[at][:, :, None], filters[at][..., None])
    if isinstance(term, InputFilter):
        rows = term.filters.reshape(-1, 1, i, taps).mT.contiguous()
        return lambda total, at: total.addcmul_((term.point[at] * scale[at][..., None])[:, :, None], rows[at[0]])
    if isinstance(term, Line):
        return lambda total, at: _line(recipe, total, term.axis).addcmul_(
            term.values[at].mT, scale[at][..., None, None]
        )

    def add(total: Tensor, at: Chunk) -> None:
        left = _rows(term, at).mul_(scale[at][..., None, None])
        point = term.point[at[0]]
        if _by_conv(left, point):
            total += _convolve(left, point[0].mT)
        else:
            total.flatten(1, 2).baddbmm_(left.flatten(1, 2), point)

    return add


def _by_conv(rows: Tensor, matrix: Tensor) -> bool:
    """Whether a conv multiplies them faster than `matmul`: its library is at home on more processors.

    On an AMD EPYC one thread did 85 thousand million multiply-adds a second by convs, 44 by `matmul`.
    """
    g, o, taps, _ = rows.shape
    return rows.device.type == "cpu" and g == 1 and taps > 1 and o * taps >= 192 and matrix.numel() >= 1 << 16


def _images(rows: Tensor) -> Tensor:
    """(1, o, taps, c) as o images of a pixel a tap, channels last."""
    return rows.squeeze(0)[..., None, :].permute(0, 3, 1, 2)


def _convolve(rows: Tensor, weight: Tensor) -> Tensor:
    """(1, o, taps, c) times (i, c), as (1, o, taps, i)."""
    made = torch.conv2d(_images(rows), weight.contiguous()[..., None, None])
    return made.permute(0, 2, 3, 1).reshape(*rows.shape[:3], -1)


def _convolve_back(left: Tensor, right: Tensor) -> Tensor:
    """(1, o, taps, c) and (1, o, taps, i), multiplied and summed over o and taps: (c, i)."""
    weight = left.new_empty(left.shape[3], right.shape[3], 1, 1)
    one, none = [1, 1], [0, 0]
    options = (None, one, none, one, False, none, 1, [False, True, False])
    return torch.ops.aten.convolution_backward(_images(left), _images(right), weight, *options)[1][..., 0, 0]


def _rows(term: Product, at: Chunk) -> Tensor:
    """A copy of a chunk of a product's kernel, as (g, o, taps, c)."""
    kernel = term.kernel[at].reshape(*term.scale[at].shape, term.point.shape[1], -1)
    return kernel.mT.clone(memory_format=torch.contiguous_format)


def _line(recipe: Recipe, rows: Tensor, axis: int) -> Tensor:
    """The elements of (g, o, taps, i) that a line lies on: (g, o, k_axis, i), a view."""
    assert recipe.layout is not None
    sizes = recipe.layout.canonical_shape(recipe.wide)[3:]
    place = tuple(slice(None) if a == axis else tap(n) for a, n in enumerate(sizes))
    return rows.unflatten(2, sizes)[:, :, *place]


def _differentiate(recipe: Recipe, merged: Tensor, terms: Sequence[Term], parts: Sequence[Gradients]) -> None:
    """Write the gradients of all terms, from that of M in storage order."""
    assert recipe.layout is not None
    _, _, i, taps = recipe.canonical
    scratch, second = _scratch(recipe, merged), _scratch(recipe, merged)
    source = _canonical(recipe.layout, merged, recipe)
    writers = [_writer(recipe, term, part) for term, part in zip(terms, parts, strict=True) if any_of(part)]
    for chunk in _chunks(recipe, merged):
        rows = source[chunk].mT
        rows = rows if taps == 1 else _shaped(scratch, chunk, taps, i).copy_(rows)
        room = _shaped(second, chunk, taps, i)
        for write in writers:
            write(rows, chunk, room)


def any_of(part: Gradients) -> bool:
    """Whether any gradient is asked for."""
    return any(tensor is not None for tensor in part)


Writer = Callable[[Tensor, Chunk, Tensor], None]
"""Takes a chunk of G as (g, o, taps, i), where it lies, and room of the same shape that it may write to."""


def _writer(recipe: Recipe, term: Term, part: Gradients) -> Writer:
    if isinstance(term, OutputFilter):
        return _output_filter(recipe, term, part)
    if isinstance(term, InputFilter):
        return _input_filter(recipe, term, part)
    if isinstance(term, Product):
        return _product(recipe, term, part)
    return _line_writer(recipe, term, part)


def _pointwise(term: OutputFilter | InputFilter, summed: Tensor, at: Chunk, part: Gradients) -> None:
    """Gradients of v and P, from the sum over taps of S F, (g, o, i)."""
    if part[0] is not None:
        part[0][at] = (summed * term.point[at]).sum(-1)
    if part[1] is not None:
        torch.mul(summed, term.scale[at][..., None], out=part[1][at])


def _output_filter(recipe: Recipe, term: OutputFilter, part: Gradients) -> Writer:
    taps = recipe.canonical[3]
    filters = term.filters.reshape(*term.scale.shape, 1, taps)
    d_filters = part[2]

    def write(rows: Tensor, at: Chunk, room: Tensor) -> None:
        del room
        _pointwise(term, torch.matmul(filters[at], rows).squeeze(2), at, part)
        if d_filters is not None:
            of_filters = torch.matmul(rows, term.point[at][..., None]).squeeze(-1) * term.scale[at][..., None]
            d_filters[at] = of_filters.view(d_filters[at].shape)

    return write


def _input_filter(recipe: Recipe, term: InputFilter, part: Gradients) -> Writer:
    g, _, i, taps = recipe.canonical
    filters = term.filters.reshape(g, 1, i, taps).mT.contiguous()
    total = None if part[2] is None else part[2].zero_().view(g, i, taps)

    def write(rows: Tensor, at: Chunk, room: Tensor) -> None:
        _pointwise(term, torch.mul(rows, filters[at[0]], out=room).sum(2), at, part)
        if total is not None:
            point = term.point[at] * term.scale[at][..., None]
            total[at[0]] += torch.mul(rows, point[:, :, None], out=room).sum(1).mT

    return write


def _product(recipe: Recipe, term: Product, part: Gradients) -> Writer:
    d_scale, d_point, d_kernel = part
    if d_point is not None:
        d_point.zero_()

    def write(rows: Tensor, at: Chunk, room: Tensor) -> None:
        del room
        matrix = rows.flatten(1, 2)  # (g, o taps, i)
        kernel = _rows(term, at)
        scale = term.scale[at][..., None, None]
        if d_scale is not None or d_kernel is not None:
            point = term.point[at[0]]
            if _by_conv(rows, point):
                of_kernel = _convolve(rows.contiguous(), point[0])
            else:
                of_kernel = torch.bmm(matrix, point.mT).view(kernel.shape)
            if d_scale is not None:
                d_scale[at] = (of_kernel * kernel).sum((2, 3))
            if d_kernel is not None:
                out = d_kernel[at]
                torch.mul(of_kernel.mT, scale, out=out.view(*out.shape[:3], -1))
        if d_point is not None:
            kernel.mul_(scale)
            if _by_conv(rows, term.point[at[0]]):
                d_point[at[0]] += _convolve_back(kernel, rows.contiguous())
            else:
                d_point[at[0]].baddbmm_(kernel.flatten(1, 2).mT, matrix)

    return write


def _line_writer(recipe: Recipe, term: Line, part: Gradients) -> Writer:
    d_scale, d_values = part

    def write(rows: Tensor, at: Chunk, room: Tensor) -> None:
        del room
        line = _line(recipe, rows, term.axis).mT
        if d_scale is not None:
            d_scale[at] = (line * term.values[at]).sum((2, 3))
        if d_values is not None:
            torch.mul(line, term.scale[at][..., None, None], out=d_values[at])

    return write
