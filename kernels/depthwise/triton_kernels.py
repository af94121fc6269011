"""Triton kernels of a depthwise conv and the batch norm behind it, which never write the conv's output.

With x̂ = (y - mean) · rstd of y = conv(x, w), what is read and written of the activations:

    take_statistics        x            mean of y and its squared distances from it, for each program
    normalise              x -> z       z = gamma x̂ + beta
    differentiate_norm     x, dz -> x̂   sums of dz and dz·x̂, for each program
    differentiate_conv     x, dz, x̂ -> dx    dy = gamma rstd (dz - mean of dz - x̂ · mean of dz·x̂), its sums over taps,
                                             and dw for each program

A program takes some tiles, one after the other: positions (of several images where these are small) times channels.
What it adds up it writes for itself, and one more kernel (`merge_statistics`, `add_up`) adds the programs' parts in
their order: no atomics, the same bits each time. All arithmetic is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportGeneralTypeIssues=false
# Triton gives its arguments and results no types, or those that they have outside of a kernel.


@triton.jit
def _places(tile, images, height, width, tn: tl.constexpr, th: tl.constexpr, tw: tl.constexpr):
    """Image, row and column of a tile's positions, and which of them there are."""
    p = tl.arange(0, tn * th * tw)
    down, across = tl.cdiv(height, th), tl.cdiv(width, tw)
    image = tile // (down * across) * tn + p // (th * tw)
    row = tile // across % down * th + p // tw % th
    column = tile % across * tw + p % tw
    return image, row, column, (image < images) & (row < height) & (column < width)


@triton.jit
def _origin(image, c, plane, channels, last: tl.constexpr):
    """Where the channels of images begin; only the images are so many that it takes 64 bits."""
    return image.to(tl.int64)[:, None] * (plane * channels) + (c if last else c * plane)[None, :]


@triton.jit
def _convolve(
    x, weight, image, row, column, inside, c, there, height, width, channels, last: tl.constexpr,
    kh: tl.constexpr, kw: tl.constexpr, sh: tl.constexpr, sw: tl.constexpr,
    ph: tl.constexpr, pw: tl.constexpr, dh: tl.constexpr, dw: tl.constexpr,
):  # fmt: skip
    """The conv at a tile of its output; zero where there is none."""
    origin = x + _origin(image, c, height * width, channels, last)
    pixel = channels if last else 1
    total = tl.zeros((inside.shape[0], c.shape[0]), tl.float32)
    for i in range(kh):  # only a row is unrolled: registers do not hold more
        h = row * sh - ph + i * dh
        for j in tl.static_range(kw):
            v = column * sw - pw + j * dw
            valid = inside & (h >= 0) & (h < height) & (v >= 0) & (v < width)
            found = tl.load(origin + ((h * width + v) * pixel)[:, None], valid[:, None] & there[None, :], other=0.0)
            tap = tl.load(weight + (c * kh + i) * kw + j, there, other=0.0).to(tl.float32)
            total += found.to(tl.float32) * tap[None, :]
    return total


@triton.jit
def take_statistics(
    x, weight, partial, images, height, width, out_height, out_width, channels, last: tl.constexpr,
    kh: tl.constexpr, kw: tl.constexpr, sh: tl.constexpr, sw: tl.constexpr,
    ph: tl.constexpr, pw: tl.constexpr, dh: tl.constexpr, dw: tl.constexpr,
    tn: tl.constexpr, th: tl.constexpr, tw: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """For each program and channel: mean, squared distances from it, and of how many positions."""
    program = tl.program_id(0)
    c = tl.program_id(1) * block + tl.arange(0, block)
    there = c < channels
    count = tl.full((1,), 0.0, tl.float32)
    mean = tl.zeros((block,), tl.float32)
    spread = tl.zeros((block,), tl.float32)
    for step in range(steps):
        image, row, column, inside = _places(program * steps + step, images, out_height, out_width, tn, th, tw)
        y = _convolve(x, weight, image, row, column, inside, c, there, height, width, channels, last,
                      kh, kw, sh, sw, ph, pw, dh, dw)  # fmt: skip
        n = tl.sum(inside.to(tl.float32), 0)
        middle = tl.sum(y, 0) / tl.maximum(n, 1.0)
        away = tl.where(inside[:, None], y - middle[None, :], 0.0)
        share = n / tl.maximum(count + n, 1.0)
        apart = middle - mean
        spread += tl.sum(away * away, 0) + apart * apart * count * share
        mean += apart * share
        count += n
    at = partial + program * 3 * channels + c
    tl.store(at, mean, there)
    tl.store(at + channels, spread, there)
    tl.store(at + 2 * channels, count + tl.zeros_like(mean), there)


@triton.jit
def merge_statistics(
    partial, bias, result, programs, count, eps, channels,
    biased: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Of each channel: mean, 1 / standard deviation, the mean with the conv's bias, the unbiased variance."""
    c = tl.program_id(0) * block + tl.arange(0, block)
    there = c < channels
    first = tl.load(partial + c, there, other=0.0)
    shift = tl.zeros((block,), tl.float32)
    for start in range(0, programs, rows):
        row = start + tl.arange(0, rows)
        at = partial + (row * 3 * channels)[:, None] + c[None, :]
        mask = (row < programs)[:, None] & there[None, :]
        number = tl.load(at + 2 * channels, mask, other=0.0)
        shift += tl.sum(number * (tl.load(at, mask, other=0.0) - first[None, :]), 0)
    mean = first + shift / count
    spread = tl.zeros((block,), tl.float32)
    for start in range(0, programs, rows):
        row = start + tl.arange(0, rows)
        at = partial + (row * 3 * channels)[:, None] + c[None, :]
        mask = (row < programs)[:, None] & there[None, :]
        number = tl.load(at + 2 * channels, mask, other=0.0)
        apart = tl.load(at, mask, other=0.0) - mean[None, :]
        spread += tl.sum(tl.load(at + channels, mask, other=0.0) + number * apart * apart, 0)
    tl.store(result + c, mean, there)
    tl.store(result + channels + c, 1.0 / tl.sqrt(spread / count + eps), there)
    if biased:
        mean += tl.load(bias + c, there, other=0.0).to(tl.float32)
    tl.store(result + 2 * channels + c, mean, there)
    tl.store(result + 3 * channels + c, spread / (count - 1.0), there)


@triton.jit
def normalise(
    x, weight, gamma, beta, statistics, z, images, height, width, out_height, out_width, channels,
    has_gamma: tl.constexpr, has_beta: tl.constexpr, last: tl.constexpr,
    kh: tl.constexpr, kw: tl.constexpr, sh: tl.constexpr, sw: tl.constexpr,
    ph: tl.constexpr, pw: tl.constexpr, dh: tl.constexpr, dw: tl.constexpr,
    tn: tl.constexpr, th: tl.constexpr, tw: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """The normalised output."""
    c = tl.program_id(1) * block + tl.arange(0, block)
    there = c < channels
    mean = tl.load(statistics + c, there, other=0.0)
    scale = tl.load(statistics + channels + c, there, other=0.0)
    shift = tl.zeros((block,), tl.float32)
    if has_gamma:
        scale *= tl.load(gamma + c, there, other=0.0).to(tl.float32)
    if has_beta:
        shift += tl.load(beta + c, there, other=0.0).to(tl.float32)
    pixel = channels if last else 1
    for step in range(steps):
        tile = tl.program_id(0) * steps + step
        image, row, column, inside = _places(tile, images, out_height, out_width, tn, th, tw)
        y = _convolve(x, weight, image, row, column, inside, c, there, height, width, channels, last,
                      kh, kw, sh, sw, ph, pw, dh, dw)  # fmt: skip
        at = _origin(image, c, out_height * out_width, channels, last)
        at += ((row * out_width + column) * pixel)[:, None]
        made = (y - mean[None, :]) * scale[None, :] + shift[None, :]
        tl.store(z + at, made.to(z.dtype.element_ty), inside[:, None] & there[None, :])


@triton.jit
def differentiate_norm(
    x, weight, statistics, dz, normal, partial, images, height, width, out_height, out_width, channels,
    last: tl.constexpr,
    kh: tl.constexpr, kw: tl.constexpr, sh: tl.constexpr, sw: tl.constexpr,
    ph: tl.constexpr, pw: tl.constexpr, dh: tl.constexpr, dw: tl.constexpr,
    tn: tl.constexpr, th: tl.constexpr, tw: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """x̂, and for each program and channel the sums of dz and of dz·x̂."""
    program = tl.program_id(0)
    c = tl.program_id(1) * block + tl.arange(0, block)
    there = c < channels
    mean = tl.load(statistics + c, there, other=0.0)
    rstd = tl.load(statistics + channels + c, there, other=0.0)
    plain = tl.zeros((block,), tl.float32)
    along = tl.zeros((block,), tl.float32)
    pixel = channels if last else 1
    for step in range(steps):
        image, row, column, inside = _places(program * steps + step, images, out_height, out_width, tn, th, tw)
        y = _convolve(x, weight, image, row, column, inside, c, there, height, width, channels, last,
                      kh, kw, sh, sw, ph, pw, dh, dw)  # fmt: skip
        at = _origin(image, c, out_height * out_width, channels, last)
        at += ((row * out_width + column) * pixel)[:, None]
        mask = inside[:, None] & there[None, :]
        up = tl.load(dz + at, mask, other=0.0).to(tl.float32)
        made = (y - mean[None, :]) * rstd[None, :]
        tl.store(normal + at, made.to(normal.dtype.element_ty), mask)
        plain += tl.sum(up, 0)
        along += tl.sum(up * made, 0)
    at = partial + program * 2 * channels + c
    tl.store(at, plain, there)
    tl.store(at + channels, along, there)


@triton.jit
def differentiate_conv(
    x, weight, gamma, statistics, sums, dz, normal, dx, partial, count,
    images, height, width, out_height, out_width, channels,
    has_gamma: tl.constexpr, last: tl.constexpr,
    kh: tl.constexpr, kw: tl.constexpr, sh: tl.constexpr, sw: tl.constexpr,
    ph: tl.constexpr, pw: tl.constexpr, dh: tl.constexpr, dw: tl.constexpr,
    tn: tl.constexpr, th: tl.constexpr, tw: tl.constexpr, block: tl.constexpr, steps: tl.constexpr,
    taps: tl.constexpr,
):  # fmt: skip
    """dx, and dw for each program; `taps` is how many there are, rounded up to a power of two."""
    program = tl.program_id(0)
    c = tl.program_id(1) * block + tl.arange(0, block)
    there = c < channels
    scale = tl.load(statistics + channels + c, there, other=0.0)
    if has_gamma:
        scale *= tl.load(gamma + c, there, other=0.0).to(tl.float32)
    shift = tl.load(sums + c, there, other=0.0) / count
    slope = tl.load(sums + channels + c, there, other=0.0) / count
    tap = tl.arange(0, taps)
    summed = tl.zeros((taps, block), tl.float32)
    pixel = channels if last else 1
    for step in range(steps):
        image, row, column, inside = _places(program * steps + step, images, height, width, tn, th, tw)
        at = _origin(image, c, height * width, channels, last) + ((row * width + column) * pixel)[:, None]
        mask = inside[:, None] & there[None, :]
        value = tl.load(x + at, mask, other=0.0).to(tl.float32)
        origin = _origin(image, c, out_height * out_width, channels, last)
        total = tl.zeros_like(value)
        for i in range(kh):
            h = row + ph - i * dh
            down = h // sh
            high = inside & (h >= 0) & (h % sh == 0) & (down < out_height)
            for j in tl.static_range(kw):
                v = column + pw - j * dw
                across = v // sw
                used = (high & (v >= 0) & (v % sw == 0) & (across < out_width))[:, None] & there[None, :]
                place = origin + ((down * out_width + across) * pixel)[:, None]
                up = tl.load(dz + place, used, other=0.0).to(tl.float32)
                made = tl.load(normal + place, used, other=0.0).to(tl.float32)
                dy = tl.where(used, up - shift[None, :] - made * slope[None, :], 0.0)
                total += dy * tl.load(weight + (c * kh + i) * kw + j, there, other=0.0).to(tl.float32)[None, :]
                summed += tl.where((tap == i * kw + j)[:, None], tl.sum(dy * value, 0)[None, :], 0.0)
        tl.store(dx + at, (total * scale[None, :]).to(dx.dtype.element_ty), mask)
    at = partial + (program * channels + c)[None, :] * (kh * kw) + tap[:, None]
    tl.store(at, summed * scale[None, :], (tap < kh * kw)[:, None] & there[None, :])


@triton.jit
def add_up(partial, result, programs, size, rows: tl.constexpr, block: tl.constexpr):
    """The sum of all programs' parts."""
    place = tl.program_id(0) * block + tl.arange(0, block)
    there = place < size
    total = tl.zeros((block,), tl.float32)
    for start in range(0, programs, rows):
        row = start + tl.arange(0, rows)
        mask = (row < programs)[:, None] & there[None, :]
        total += tl.sum(tl.load(partial + (row * size)[:, None] + place[None, :], mask, other=0.0), 0)
    tl.store(result + place, total.to(result.dtype.element_ty), there)
