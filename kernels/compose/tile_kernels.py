"""Triton kernels that compose the kernels of all layers in one launch, and differentiate them in one or two more.

A program takes one task, a tile of one layer. Tensors are found through a table of addresses, not copied together. Each
element of a result is written by one program: no atomics, the same bits each time. All arithmetic is in float32.

    kind 0  a tile of M, for both networks; or, of the gradients, all that sum over taps or inputs but dK
    kind 1  dK of a product
    kind 2  what sums over outputs: dP of a product, dF of a filter an input channel

To a product, a group of a layer is one matrix: its lines are the outputs with all their taps (line = o * taps + k), its
columns the inputs. M = K P, dK = dM P^T and dP = K^T dM then are plain products of large tiles. dP sums over all lines:
those of a large layer are taken in parts, whose sums a last launch adds, always in the same order. A layer of few
inputs a group has no use for matrix products: a tile of it takes lines of several groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpd_fx.kernels.compose.tile_parts import (
    D_WEIGHT,
    DYN,
    FILTERED,
    GEO,
    GROUPS,
    LINES,
    OUTPUTS,
    PART,
    PART_PLACE,
    PARTS,
    PRODUCT,
    STRIDE,
    STUDENT,
    STUDENT_TAP,
    SUMMED,
    TASK,
    TEACHER,
    UNIT,
    WEIGHT,
    both_networks,
    kernel_place_of,
    on_line,
    read,
    sizes,
    stride,
    upstream,
    write,
)

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# Triton gives its arguments and results no types, or those that they have outside of a kernel; and an `if` on a
# constant is decided when a kernel is compiled.


@triton.jit
def _forward(
    dyn, geo, maps, g, o, k, i, mask_o, mask_i, mask,
    small: tl.constexpr, chunk: tl.constexpr, has_lines: tl.constexpr, precision: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """A tile of M: o and k are column vectors, i a row, g a number or a column vector."""
    outputs, inputs, taps, width = sizes(geo)
    row, column = g * outputs + o, g * inputs + i
    at = row * inputs + i
    scale = read(tl.load(dyn + PRODUCT), row, mask_o, dtype)
    point, kernel = tl.load(dyn + PRODUCT + 1), tl.load(dyn + PRODUCT + 2)
    value = tl.zeros_like(at * 1.0)  # the product first: what comes later would take registers meanwhile
    if small:
        for c in range(width):
            left = scale * read(kernel, kernel_place_of(dyn, g, o, c, k), mask_o, dtype)
            value += left * read(point, (g * width + c) * inputs + i, mask, dtype)
    else:
        for first in range(0, width, chunk):
            c = first + tl.arange(0, chunk)
            inside = mask_o & (c < width)[None, :]
            left = read(kernel, kernel_place_of(dyn, g, o, c[None, :], k), inside, dtype)
            right = read(point, (g * width + c[:, None]) * inputs + i, mask_i & (c < width)[:, None], dtype)
            value = tl.dot(left, right, value, input_precision=precision)
        value *= scale
    for n in tl.static_range(3):
        term = dyn + FILTERED + 5 * n
        if tl.load(term) != 0:
            factor = read(tl.load(term), row, mask_o, dtype) * read(tl.load(term + 2), row * taps + k, mask_o, dtype)
            value += factor * read(tl.load(term + 1), at, mask, dtype)
    if tl.load(dyn + SUMMED) != 0:
        share = read(tl.load(dyn + SUMMED), row, mask_o, dtype) * read(tl.load(dyn + SUMMED + 1), at, mask, dtype)
        value += share * read(tl.load(dyn + SUMMED + 2), column * taps + k, mask, dtype)
    if has_lines:
        for n in tl.static_range(3):
            on, length, where = on_line(geo, n, k)
            v = read(tl.load(dyn + LINES + 4 * n), row, mask_o, dtype)
            value += v * read(tl.load(dyn + LINES + 4 * n + 1), at * length + where, mask & on, dtype)
    alpha, here, there, shared = both_networks(dyn, geo, maps, g, o, i, mask_o, mask_i, dtype)
    here += k * stride(dyn, STRIDE + 2)
    value += read(tl.load(dyn + WEIGHT), here, mask, dtype)
    write(tl.load(dyn + STUDENT), there + k * tl.load(geo + STUDENT_TAP), value, mask & shared, dtype)
    write(tl.load(dyn + TEACHER), here, value * alpha, mask, dtype)


@triton.jit
def compose_tiles(
    tasks, dyn, geo, maps,
    outputs_block: tl.constexpr, inputs_block: tl.constexpr, inner: tl.constexpr, chunk: tl.constexpr,
    lines_block: tl.constexpr, few: tl.constexpr, most_taps: tl.constexpr,
    has_small: tl.constexpr, has_large: tl.constexpr, has_lines: tl.constexpr,
    precision: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The teacher's and the student's tensors; one program a task."""
    task = tasks + tl.program_id(0) * TASK
    layer = tl.load(task)
    dyn += layer * DYN
    geo += layer * GEO
    small = tl.load(task + 2)
    outputs, inputs, taps, _ = sizes(geo)
    line = tl.load(task + 4) + tl.arange(0, lines_block)[:, None]
    row, k = line // taps, line % taps
    if has_small and small != 0:
        i = tl.arange(0, few)[None, :]
        inside = row < tl.load(geo + GROUPS) * outputs
        mask = inside & (i < inputs)
        _forward(dyn, geo, maps, row // outputs, row % outputs, k, i, inside, mask, mask,
                 True, chunk, has_lines, precision, dtype)  # fmt: skip
    if has_large and small == 0:
        i = tl.load(task + 5) + tl.arange(0, inputs_block)[None, :]
        inside = row < outputs
        _forward(dyn, geo, maps, tl.load(task + 3), row, k, i, inside, i < inputs, inside & (i < inputs),
                 False, chunk, has_lines, precision, dtype)  # fmt: skip


@triton.jit
def _rows_backward(
    dyn, geo, maps, g, o, mask_o,
    small: tl.constexpr, block: tl.constexpr, has_lines: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dW, and P, L and v of all but the product: what a block of outputs needs no other for."""
    outputs, inputs, taps, _ = sizes(geo)
    row = g * outputs + o
    d_weight = tl.load(dyn + D_WEIGHT)
    f0, f1, f2 = tl.load(dyn + FILTERED + 2), tl.load(dyn + FILTERED + 7), tl.load(dyn + FILTERED + 12)
    f3 = tl.load(dyn + SUMMED + 2)
    v0, v1 = read(tl.load(dyn + FILTERED), row, mask_o, dtype), read(tl.load(dyn + FILTERED + 5), row, mask_o, dtype)
    v2, v3 = read(tl.load(dyn + FILTERED + 10), row, mask_o, dtype), read(tl.load(dyn + SUMMED), row, mask_o, dtype)
    s0, s1, s2, s3 = tl.zeros_like(v0), tl.zeros_like(v0), tl.zeros_like(v0), tl.zeros_like(v0)
    l0, l1, l2 = tl.zeros_like(v0), tl.zeros_like(v0), tl.zeros_like(v0)
    for first in range(0, inputs, block):
        i = first + tl.arange(0, block)[None, :]
        column = g * inputs + i
        mask = mask_o & (i < inputs)
        mask_i = mask if small else i < inputs
        at = row * inputs + i
        alpha, here, there, shared = both_networks(dyn, geo, maps, g, o, i, mask_o, mask_i, dtype)
        a0 = tl.zeros_like(at).to(tl.float32)
        a1, a2, a3 = a0, a0, a0
        for k in range(taps):
            up = upstream(dyn, geo, alpha, here, there, shared, k, mask, dtype)
            write(d_weight, here + k * stride(dyn, STRIDE + 2), up, mask, dtype)
            a0 += up * read(f0, row * taps + k, mask_o, dtype)
            a1 += up * read(f1, row * taps + k, mask_o, dtype)
            a2 += up * read(f2, row * taps + k, mask_o, dtype)
            a3 += up * read(f3, column * taps + k, mask_i, dtype)
            if has_lines:
                on, length, where = on_line(geo, 0, k)
                l0 += _line_backward(dyn, 0, on, up, row, at * length + where, mask_o, mask, dtype)
                on, length, where = on_line(geo, 1, k)
                l1 += _line_backward(dyn, 1, on, up, row, at * length + where, mask_o, mask, dtype)
                on, length, where = on_line(geo, 2, k)
                l2 += _line_backward(dyn, 2, on, up, row, at * length + where, mask_o, mask, dtype)
        s0 += _point_backward(dyn + FILTERED, a0, v0, at, mask, dtype)
        s1 += _point_backward(dyn + FILTERED + 5, a1, v1, at, mask, dtype)
        s2 += _point_backward(dyn + FILTERED + 10, a2, v2, at, mask, dtype)
        s3 += _point_backward(dyn + SUMMED, a3, v3, at, mask, dtype)
    write(tl.load(dyn + FILTERED + 3), row, s0, mask_o, dtype)
    write(tl.load(dyn + FILTERED + 8), row, s1, mask_o, dtype)
    write(tl.load(dyn + FILTERED + 13), row, s2, mask_o, dtype)
    write(tl.load(dyn + SUMMED + 3), row, s3, mask_o, dtype)
    if has_lines:
        write(tl.load(dyn + LINES + 2), row, l0, mask_o, dtype)
        write(tl.load(dyn + LINES + 6), row, l1, mask_o, dtype)
        write(tl.load(dyn + LINES + 10), row, l2, mask_o, dtype)


@triton.jit
def _point_backward(term, summed, scale, at, mask, dtype: tl.constexpr):
    """Write dP from its sum over taps; returns this tile's share of dv."""
    write(tl.load(term + 4), at, summed * scale, mask, dtype)
    return tl.sum(summed * read(tl.load(term + 1), at, mask, dtype), 1, keep_dims=True)


@triton.jit
def _line_backward(dyn, number: tl.constexpr, on, up, row, at, mask_o, mask, dtype: tl.constexpr):
    """Write dL; returns this tile's share of dv."""
    scale = read(tl.load(dyn + LINES + 4 * number), row, mask_o, dtype)
    line, of_line = tl.load(dyn + LINES + 4 * number + 1), tl.load(dyn + LINES + 4 * number + 3)
    write(tl.where(on, of_line, 0), at, up * scale, mask, dtype)
    return tl.sum(up * read(tl.where(on, line, 0), at, mask, dtype), 1, keep_dims=True)


@triton.jit
def _few_kernel_backward(dyn, geo, maps, g, o, mask_o, block: tl.constexpr, dtype: tl.constexpr):
    """As `_kernel_backward`, for rows of outputs of several groups."""
    outputs, inputs, taps, width = sizes(geo)
    row = g * outputs + o
    point, kernel, d_kernel = tl.load(dyn + PRODUCT + 1), tl.load(dyn + PRODUCT + 2), tl.load(dyn + PRODUCT + 5)
    scale = read(tl.load(dyn + PRODUCT), row, mask_o, dtype)
    of_scale = tl.zeros_like(scale)
    i = tl.arange(0, block)[None, :]
    mask = mask_o & (i < inputs)
    alpha, here, there, shared = both_networks(dyn, geo, maps, g, o, i, mask_o, mask, dtype)
    for k in range(taps):
        up = upstream(dyn, geo, alpha, here, there, shared, k, mask, dtype)
        for c in range(width):
            summed = tl.sum(up * read(point, (g * width + c) * inputs + i, mask, dtype), 1, keep_dims=True)
            at = kernel_place_of(dyn, g, o, c, k)
            of_scale += summed * read(kernel, at, mask_o, dtype)
            write(d_kernel, at, summed * scale, mask_o, dtype)
    write(tl.load(dyn + PRODUCT + 3), row, of_scale, mask_o, dtype)


@triton.jit
def _kernel_backward(
    dyn, geo, maps, g, first,
    lines_block: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr, precision: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dK of a product and its dv, for a block of outputs with all their taps."""
    outputs, inputs, taps, width = sizes(geo)
    point, kernel, d_kernel = tl.load(dyn + PRODUCT + 1), tl.load(dyn + PRODUCT + 2), tl.load(dyn + PRODUCT + 5)
    several = tl.maximum(lines_block // taps, 1)
    which = tl.arange(0, lines_block)[None, :]
    of_scale = tl.zeros_like(which * 1.0)
    for below in range(0, several * taps, lines_block):
        line = below + tl.arange(0, lines_block)[:, None]
        o, k = first + line // taps, line % taps
        mask_o = (line < several * taps) & (o < outputs)
        scale = read(tl.load(dyn + PRODUCT), g * outputs + o, mask_o, dtype)
        for start in range(0, width, block):
            c = (start + tl.arange(0, block))[None, :]
            total = tl.zeros_like(c * 1.0 + scale)
            for left in range(0, inputs, chunk):
                i = left + tl.arange(0, chunk)
                mask_i = (i < inputs)[None, :]
                alpha, here, there, shared = both_networks(dyn, geo, maps, g, o, i[None, :], mask_o, mask_i, dtype)
                up = upstream(dyn, geo, alpha, here, there, shared, k, mask_o & mask_i, dtype)
                mask = (i < inputs)[:, None] & (c < width)
                right = read(point, (g * width + c) * inputs + i[:, None], mask, dtype)
                total = tl.dot(up, right, total, input_precision=precision)
            at = kernel_place_of(dyn, g, o, c, k)
            mask = mask_o & (c < width)
            of_line = tl.sum(total * read(kernel, at, mask, dtype), 1, keep_dims=True)
            of_scale += tl.sum(tl.where(line // taps == which, of_line, 0.0), 0, keep_dims=True)
            write(d_kernel, at, total * scale, mask, dtype)
    mask = (which < several) & (first + which < outputs)
    write(tl.load(dyn + PRODUCT + 3), g * outputs + first + which, of_scale, mask, dtype)


@triton.jit
def _columns_backward(
    dyn, geo, maps, scratch, g, first, start, part,
    block: tl.constexpr, inner: tl.constexpr, chunk: tl.constexpr, most_taps: tl.constexpr,
    precision: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dP of a product for a block of inner channels and inputs, and with the first of them dF of an input filter.

    Of a layer of several parts this is one part's share, which goes to its place in `scratch`.
    """
    outputs, inputs, taps, width = sizes(geo)
    i = first + tl.arange(0, block)[None, :]
    c = start + tl.arange(0, inner)[:, None]
    mask_i = i < inputs
    scales, kernel = tl.load(dyn + PRODUCT), tl.load(dyn + PRODUCT + 2)
    d_filter = tl.where(start == 0, tl.load(dyn + SUMMED + 5), 0)
    total = tl.zeros_like(c * 1.0 + i)
    tap = tl.arange(0, most_taps)[:, None]
    of_filter = tl.zeros_like(tap * 1.0 + i)
    parts, length = tl.load(geo + PARTS), tl.load(geo + PART)
    for below in range(part * length, tl.minimum(outputs * taps, (part + 1) * length), chunk):
        line = below + tl.arange(0, chunk)
        o, k = (line // taps)[:, None], (line % taps)[:, None]
        mask_o = o < outputs
        alpha, here, there, shared = both_networks(dyn, geo, maps, g, o, i, mask_o, mask_i, dtype)
        up = upstream(dyn, geo, alpha, here, there, shared, k, mask_o & mask_i, dtype)
        across, inside = (line // taps)[None, :], (line < outputs * taps)[None, :]
        left = read(kernel, kernel_place_of(dyn, g, across, c, (line % taps)[None, :]), (c < width) & inside, dtype)
        left *= read(scales, g * outputs + across, inside, dtype)
        total = tl.dot(left, up, total, input_precision=precision)
        if d_filter != 0:
            row = g * outputs + o
            share = read(tl.load(dyn + SUMMED + 1), row * inputs + i, mask_o & mask_i, dtype)
            share *= read(tl.load(dyn + SUMMED), row, mask_o, dtype) * up
            chosen = tl.where((line % taps)[None, :] == tap, 1.0, 0.0)
            of_filter = tl.dot(chosen, share, of_filter, input_precision=precision)
    at, place = (g * width + c) * inputs + i, (g * inputs + i) * taps + tap
    mask, mask_k = (c < width) & mask_i, (tap < taps) & mask_i
    if parts == 1:
        write(tl.load(dyn + PRODUCT + 4), at, total, mask, dtype)
        write(d_filter, place, of_filter, mask_k, dtype)
    else:
        groups = tl.load(geo + GROUPS)
        mine = scratch + tl.load(geo + PART_PLACE).to(tl.int64) * UNIT
        points, filters = groups * width * inputs, groups * inputs * taps
        tl.store(mine + part.to(tl.int64) * points + at, total, mask=mask)
        if d_filter != 0:
            tl.store(mine + parts.to(tl.int64) * points + part * filters + place, of_filter, mask=mask_k)


@triton.jit
def add_parts(tasks, dyn, geo, scratch, block: tl.constexpr, dtype: tl.constexpr):
    """The sum of a layer's parts, for a block of dP of a product (kind 0) or of dF of an input filter (kind 1)."""
    task = tasks + tl.program_id(0) * TASK
    layer, kind, first = tl.load(task), tl.load(task + 1), tl.load(task + 4)
    dyn += layer * DYN
    geo += layer * GEO
    groups, parts = tl.load(geo + GROUPS), tl.load(geo + PARTS)
    _, inputs, taps, width = sizes(geo)
    points, filters = groups * width * inputs, groups * inputs * taps
    size = tl.where(kind == 0, points, filters)
    result = tl.where(kind == 0, tl.load(dyn + PRODUCT + 4), tl.load(dyn + SUMMED + 5))
    mine = scratch + tl.load(geo + PART_PLACE).to(tl.int64) * UNIT + tl.where(kind == 0, 0, parts.to(tl.int64) * points)
    at = first + tl.arange(0, block)
    total = tl.zeros_like(at * 1.0)
    for part in range(parts):
        total += tl.load(mine + part * size + at, mask=at < size, other=0.0)
    write(result, at, total, at < size, dtype)


@triton.jit
def _few_columns_backward(
    dyn, geo, maps, first, lines_block: tl.constexpr, outputs_block: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """As `_columns_backward`, for rows of inputs of several groups."""
    outputs, inputs, taps, width = sizes(geo)
    column = first + tl.arange(0, lines_block)[:, None]
    mask_i = column < tl.load(geo + GROUPS) * inputs
    g, i = column // inputs, column % inputs
    scales, kernel, d_point = tl.load(dyn + PRODUCT), tl.load(dyn + PRODUCT + 2), tl.load(dyn + PRODUCT + 4)
    d_filter = tl.load(dyn + SUMMED + 5)
    point = tl.where(d_filter != 0, tl.load(dyn + SUMMED + 1), 0)
    of_none = tl.zeros_like(column * 1.0)
    for k in range(taps):
        of_filter = of_none
        for below in range(0, outputs, outputs_block):
            o = below + tl.arange(0, outputs_block)[None, :]
            mask = mask_i & (o < outputs)
            alpha, here, there, shared = both_networks(dyn, geo, maps, g, o, i, mask, mask_i, dtype)
            up = upstream(dyn, geo, alpha, here, there, shared, k, mask, dtype)
            row = g * outputs + o
            share = read(point, row * inputs + i, mask, dtype)
            share *= read(tl.load(dyn + SUMMED), row, mask, dtype)
            of_filter += tl.sum(up * share, 1, keep_dims=True)
        write(d_filter, column * taps + k, of_filter, mask_i, dtype)
    for c in range(width):
        total = of_none
        for k in range(taps):
            for below in range(0, outputs, outputs_block):
                o = below + tl.arange(0, outputs_block)[None, :]
                mask = mask_i & (o < outputs)
                alpha, here, there, shared = both_networks(dyn, geo, maps, g, o, i, mask, mask_i, dtype)
                up = upstream(dyn, geo, alpha, here, there, shared, k, mask, dtype)
                left = read(kernel, kernel_place_of(dyn, g, o, c, k), mask, dtype)
                total += tl.sum(up * left * read(scales, g * outputs + o, mask, dtype), 1, keep_dims=True)
        write(d_point, (g * width + c) * inputs + i, total, mask_i, dtype)


@triton.jit
def differentiate_tiles(
    tasks, dyn, geo, maps, scratch,
    outputs_block: tl.constexpr, inputs_block: tl.constexpr, inner: tl.constexpr, chunk: tl.constexpr,
    lines_block: tl.constexpr, few: tl.constexpr, most_taps: tl.constexpr,
    has_small: tl.constexpr, has_large: tl.constexpr, has_lines: tl.constexpr,
    precision: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The gradients of all weights and terms; one program a task."""
    task = tasks + tl.program_id(0) * TASK
    layer, kind, small = tl.load(task), tl.load(task + 1), tl.load(task + 2)
    dyn += layer * DYN
    geo += layer * GEO
    outputs, first = tl.load(geo + OUTPUTS), tl.load(task + 4)
    if has_small and small != 0:
        if kind == 2:
            _few_columns_backward(dyn, geo, maps, first, outputs_block, inputs_block, dtype)
        else:
            row = first + tl.arange(0, lines_block)[:, None]
            g, o = row // outputs, row % outputs
            inside = row < tl.load(geo + GROUPS) * outputs
            if kind == 1:
                _few_kernel_backward(dyn, geo, maps, g, o, inside, few, dtype)
            else:
                _rows_backward(dyn, geo, maps, g, o, inside, True, few, has_lines, dtype)
    if has_large and small == 0:
        g = tl.load(task + 3)
        if kind == 2:
            _columns_backward(dyn, geo, maps, scratch, g, first, tl.load(task + 5), tl.load(task + 6),
                              inputs_block, inner, chunk, most_taps, precision, dtype)  # fmt: skip
        elif kind == 1:
            _kernel_backward(dyn, geo, maps, g, first, lines_block, inputs_block, chunk, precision, dtype)
        else:
            o = first + tl.arange(0, outputs_block)[:, None]
            _rows_backward(dyn, geo, maps, g, o, o < outputs, False, inputs_block, has_lines, dtype)
