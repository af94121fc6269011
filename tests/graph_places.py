"""Ops of random models that move, pick, write, sort or resize values, or join them with new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph_parts import Builder, Part, UnfitError, divisors, new, op

Function = Callable[[Tensor], Tensor]


def _simple(b: Builder, x: int, functions: Sequence[Function]) -> tuple[Part, Sequence[int]]:
    function = b.choose(functions)
    return Part(lambda m, x: function(x)), [x]


# ------------------------------------------------------------------------------------------------- new tensors


@op(2)
def new_values(b: Builder) -> tuple[Part, Sequence[int]]:
    """Tensors made on the way, joined with or added to a value."""
    x = b.value(4, 3, 2)
    dim = b.axis(x)
    functions: list[Function] = [
        lambda x: torch.cat([x, torch.zeros_like(x)], dim),
        lambda x: torch.cat([x, x.new_ones(x.shape)], dim),
        lambda x: torch.cat([x.new_zeros(x.shape[0], 1, *x.shape[2:]), x], 1),
        lambda x: torch.where(x > 0, x, torch.full_like(x, 0.3)),
        lambda x: x + torch.ones(x.shape[1:], dtype=x.dtype),
        lambda x: torch.empty_like(x).copy_(x) * 2,
        lambda x: torch.empty(x.shape, dtype=x.dtype).fill_(0.5) + x,
        lambda x: x.new_full(x.shape, 0.5).mul_(x),
        lambda x: x.new_empty(x.shape).zero_().add_(x),
        lambda x: torch.concat([x, torch.ones_like(x[:, :1])], 1),
        lambda x: torch.concatenate([torch.full((x.shape[0], *x.shape[1:]), 0.1, dtype=x.dtype), x], dim),
        lambda x: x + torch.tensor(0.5, dtype=x.dtype),
        lambda x: x * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype),
        lambda x: x + torch.linspace(0, 1, x.shape[dim], dtype=x.dtype).view(*[-1 if d == dim else 1 for d in _of(x)]),
        lambda x: x * torch.eye(x.shape[-1], dtype=x.dtype)[0],
    ]
    return _simple(b, x, functions)


def _of(x: Tensor) -> range:
    return range(x.dim())


@op(2)
def fill_buffer(b: Builder) -> tuple[Part, Sequence[int]]:
    """A new tensor of which parts are written."""
    x = b.value(4, 3, 2)
    dim = b.axis(x)
    n = b.values[x].shape[dim]
    if n < 2:
        raise UnfitError
    at = 1 + b.number() % (n - 1)

    def halves(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y.narrow(dim, 0, at).copy_(x.narrow(dim, n - at, at))
        y.narrow(dim, at, n - at).add_(1.0)
        return y

    def shift(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y.narrow(dim, 1, n - 1).copy_(x.narrow(dim, 0, n - 1))
        return y

    def temporal(x: Tensor) -> Tensor:
        """As temporal shift modules do, with slices in the place of a cat."""
        y = x.clone()
        part = (slice(None),) * dim
        y[(*part, slice(0, at))] = F.relu(x[(*part, slice(0, at))])
        y[(*part, slice(at, None))] *= 0.5
        return y

    def padded(x: Tensor) -> Tensor:
        y = x.new_zeros(*[2 * size if d == dim else size for d, size in enumerate(x.shape)])
        y.narrow(dim, 0, n).copy_(x)
        return y

    return _simple(b, x, [halves, temporal, padded, shift])


# --------------------------------------------------------------------------------------------- in place, views


@op(2)
def change_view(b: Builder) -> tuple[Part, Sequence[int]]:
    """A value changes in place through one of its views, or a view changes with its value."""
    x = b.value(3, 4)
    shape = b.values[x].shape
    c = shape[1]
    k = b.choose([d for d in divisors(c) if d > 1])

    def grouped(y: Tensor) -> Tensor:
        y.view(y.shape[0], k, c // k, -1)[:, 0].mul_(0.5)
        return y

    def inner(y: Tensor) -> Tensor:
        y.unflatten(1, (c // k, k)).select(2, 0).add_(0.3)
        return y

    def turned(y: Tensor) -> Tensor:
        y.transpose(1, 2).mul_(0.7).clamp_(-1.0)
        return y

    def parts(y: Tensor) -> Tensor:
        first, others = y[:, :1], y[:, 1:]
        others.add_(others.mean(1, keepdim=True)).sigmoid_()
        first.zero_()
        return y

    def every(y: Tensor) -> Tensor:
        y[:, ::2] = y[:, ::2].tanh()
        return y

    def one(y: Tensor) -> Tensor:
        y[:, 0] = 0.5
        y[..., -1] += 1
        return y

    def seen(y: Tensor) -> Tensor:
        flat = y.flatten(2) if y.dim() > 3 else y.unsqueeze(3)
        y.mul_(2)
        return flat.sum(-1)

    def swapped(y: Tensor) -> Tensor:
        return y.transpose_(1, 2).add_(0.1)

    def diagonal(y: Tensor) -> Tensor:
        y.diagonal(0, -2, -1).fill_(0.2)
        return y

    def masked(y: Tensor) -> Tensor:
        return y.masked_fill_(y < 0, 0.1)

    def chained(y: Tensor) -> Tensor:
        z = y.unsqueeze(1).squeeze(1).permute(0, *range(2, y.dim()), 1)
        z.add_(torch.ones(c, dtype=y.dtype)).mul_(0.5)
        return y

    def narrow(y: Tensor) -> Tensor:
        y.narrow(1, 0, c // 2 or 1).narrow(2, 0, 1).neg_()
        return y

    def reshaped(y: Tensor) -> Tensor:
        z = y.reshape(y.shape[0], -1)
        z.relu_()
        return y

    ways = [grouped, inner, turned, parts, every, one, seen, swapped, masked, chained, narrow, reshaped]
    function = b.choose([*ways, diagonal])
    return Part(lambda m, x: function(x * 1.5)), [x]


@op()
def accumulate(b: Builder) -> tuple[Part, Sequence[int]]:
    """Two values, one of which grows in place."""
    x = b.value(4, 3, 2)
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: (x * 1.0).add_(y).mul_(torch.sigmoid(y)),
        lambda x, y: x.clone().addcmul_(x, y, value=0.3),
        lambda x, y: x.clone().lerp_(y, 0.4),
        lambda x, y: x.clone().copy_(y).sub_(x),
        lambda x, y: x.contiguous().clone().div_(1 + y.abs()).neg_(),
        lambda x, y: torch.zeros_like(x).add_(x).add_(y),
    ]
    function = b.choose(functions)
    return Part(lambda m, x, y: function(x, y)), [x, b.like(x)]


# --------------------------------------------------------------------------------------------------- by index


@op(2)
def indexed(b: Builder) -> tuple[Part, Sequence[int]]:
    """Picked or written by tables of indices, which are constants or found among the values."""
    x = b.value(3, 4)
    shape = b.values[x].shape
    dim = b.axis(x)
    n = shape[dim]
    table = torch.arange(n).roll(1)
    pairs = torch.tensor([[0, shape[1] - 1], [shape[2] - 1, 0]])
    front = (slice(None),) * dim

    def put(x: Tensor, table: Tensor) -> Tensor:
        y = x.clone()
        y[(*front, table[:1])] = 0.5
        return y

    def gathered(x: Tensor, table: Tensor) -> Tensor:
        places = table.view(*[-1 if d == dim else 1 for d in _of(x)]).expand_as(x)
        return x.gather(dim, places)

    functions: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, table: x[(*front, table)],
        gathered,
        lambda x, table: x.index_select(dim, table[: n // 2 + 1]),
        lambda x, table: x[:, pairs[0], pairs[1]],
        lambda x, table: x[:, pairs[0]][..., pairs[1] % x.shape[-1]],
        lambda x, table: x[:, :, pairs[1]] * 2,
        lambda x, table: x[:, pairs[0].unsqueeze(1), pairs[1].unsqueeze(0)],
        put,
        lambda x, table: x.index_add(dim, table, x),
        lambda x, table: x.index_fill(dim, table[:1], 0.25),
        lambda x, table: x.gather(dim, x.argmax(dim, keepdim=True)),
        lambda x, table: x + x.argmin(dim, keepdim=True) / n,
        lambda x, table: x.scatter(dim, table.view(*[-1 if d == dim else 1 for d in _of(x)]).expand_as(x), x),
        lambda x, table: x.take_along_dim(x.argsort(dim), dim),
        lambda x, table: x[..., None, 0] + x[:, :1],
    ]
    function = b.choose(functions)
    return Part(lambda m, x: function(x, m.table), table=table), [x]


@op()
def ordered(b: Builder) -> tuple[Part, Sequence[int]]:
    """Scans, sorts, transforms."""
    x = b.value(3, 4)
    dim = b.axis(x)
    n = b.values[x].shape[dim]
    functions: list[Function] = [
        lambda x: x.sort(dim).values,
        lambda x: x.topk(min(2, n), dim).values,
        lambda x: x.kthvalue(1, dim, keepdim=True).values + x,
        lambda x: x.sort(dim=dim, stable=True, descending=True)[0],
        lambda x: x.cummax(dim).values - x.cummin(dim).values,
        lambda x: (1 + 0.1 * x).cumprod(dim),
        lambda x: x.logcumsumexp(dim),
        lambda x: torch.fft.fft(x, dim=dim).abs(),
        lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=dim) * 0.5, n=n, dim=dim),
        lambda x: torch.fft.fft2(x).real,
        lambda x: torch.fft.ifft(torch.fft.fft(x, dim=dim), dim=dim).imag + x,
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:]) + x,
        lambda x: torch.fft.fftn(x, dim=(1, dim)).abs() if dim != 1 else x,
        lambda x: torch.fft.ifft2(x).real + x,
        lambda x: x.argsort(dim).to(x.dtype) / n,
        lambda x: torch.diff(x, dim=dim) if n > 1 else x,
    ]
    return _simple(b, x, functions)


@op()
def triangles(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3, 4)
    functions: list[Function] = [
        lambda x: x.tril(),
        lambda x: x.triu(-1),
        lambda x: x.diagonal(0, -2, -1),
        lambda x: torch.diag_embed(x.diagonal(0, -2, -1)),
        lambda x: x.unfold(-1, 2, 1),
        lambda x: x.unfold(1, 2, 2).sum(1),
        lambda x: x.clone().tril_(),
    ]
    return _simple(b, x, functions)


# ---------------------------------------------------------------------------------------------------- shapes


@op(2)
def turn(b: Builder) -> tuple[Part, Sequence[int]]:
    """The many names of moving and merging dimensions."""
    x = b.value(3, 4)
    shape = b.values[x].shape
    functions: list[Function] = [
        lambda x: x.mT,
        lambda x: x.swapaxes(1, -1),
        lambda x: x.swapdims(1, 2).contiguous(),
        lambda x: x.moveaxis(1, -1),
        lambda x: x.movedim((1, 2), (2, 1)),
        lambda x: torch.moveaxis(x, (2, 1), (1, 2)),
        lambda x: x.mH + 0.5,
        lambda x: x.adjoint() * 2,
        lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(-1),
        lambda x: x[:, None, ..., None].squeeze((1, -1)),
        lambda x: x.unsqueeze(2).squeeze(2).squeeze(1),
        lambda x: x.flatten(1).view_as(x) + x,
        lambda x: x.transpose(1, 2).reshape_as(x),
        lambda x: x.reshape(-1).view(x.shape).exp(),
        lambda x: torch.ravel(x).reshape(x.shape[0], -1),
        lambda x: x.reshape(x.shape[0] * shape[1], *shape[2:]).reshape(x.shape[0], -1, shape[-1]),
        lambda x: x.reshape(x.shape[0], *shape[1:-1], 1, shape[-1]).expand(-1, *[-1] * (len(shape) - 2), 2, -1) + 0,
        lambda x: torch.atleast_3d(x).rot90(1, (1, 2)),
        lambda x: x.type_as(x.neg()) * 2,
        lambda x: (x > 0).to(x.dtype) + (x < 0).to(x),
        lambda x: torch.view_as_real(torch.complex(x, x.neg())).sum(-1),
        lambda x: x.flip(1).unflatten(-1, (-1, 1)).flatten(-2),
    ]
    return _simple(b, x, functions)


@op(2)
def join(b: Builder) -> tuple[Part, Sequence[int]]:
    """The many names of joining, repeating and taking apart."""
    x = b.value(3, 4, 2)
    dim = b.axis(x)
    n = b.values[x].shape[dim]
    functions: list[Function] = [
        lambda x: torch.hstack([x, x * 2]),
        lambda x: torch.column_stack([x, x.cos()]),
        lambda x: torch.dstack([x, -x]) if x.dim() > 2 else torch.hstack([x, x]),
        lambda x: x.tile(2) if x.dim() < 4 else x.tile(2, 1, 1),
        lambda x: torch.stack(list(x.tensor_split([1, n - 1], dim))[1:2], 1) if n > 2 else x.unsqueeze(1),
        lambda x: torch.cat(x.split([1, n - 1], dim)[::-1], dim) if n > 1 else x,
        lambda x: torch.cat([x, x.flip(dim)], dim),
        lambda x: torch.cat([x.roll(1, dim), x], dim),
        lambda x: torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, n - 1, 1)], dim),
        lambda x: x.repeat_interleave(2, dim).unflatten(dim, (n, 2)).mean(dim + 1),
        lambda x: torch.cat([x, x], dim).unflatten(dim, (2, n)).sum(dim),
        lambda x: torch.stack([x, x.relu()], dim + 1).flatten(dim, dim + 1),
        lambda x: torch.stack([x, x.relu()], dim).flatten(dim, dim + 1),
        lambda x: torch.cat([x, F.pad(x.narrow(dim, 0, 1), _sides(x, dim, 1, 0))], dim),
        lambda x: F.pad(x, _sides(x, dim, 1, -1)) if n > 1 else x,
        lambda x: (
            sum(torch.meshgrid(x.mean(1).flatten()[:1], x.flatten()[:1], indexing="ij")) + x
            if x.dim() == 2
            else x.repeat(1, 1, *[2] * (x.dim() - 2))
        ),
        lambda x: x.expand(3, *x.shape).mean(0),
    ]
    return _simple(b, x, functions)


def _sides(x: Tensor, dim: int, before: int, behind: int) -> list[int]:
    return [*[0, 0] * (x.dim() - 1 - dim), before, behind]


@op()
def batch_of_channels(b: Builder) -> tuple[Part, Sequence[int]]:
    """Channels become part of the batch, a layer sees them one by one, and they come back."""
    x = b.value(4)
    _, c, h, w = b.values[x].shape
    k = b.choose([d for d in divisors(c) if d < c])
    way = b.choose(["conv", "norm", "pool", "mean", "linear"])

    def apply(m: Any, x: Tensor) -> Tensor:
        n = x.shape[0]
        y = x.reshape(n * (c // k), k, h, w) if way != "linear" else x.flatten(0, 1).flatten(1)
        if way == "conv":
            y = m.conv(y)
        elif way == "norm":
            y = m.norm(y)
        elif way == "pool":
            y = F.max_pool2d(y, 3, 1, 1)
        elif way == "mean":
            y = y - y.mean(0, keepdim=True)
        else:
            return m.linear(y).view(n, c, -1)
        return y.view(n, -1, h, w)

    members = {"conv": nn.Conv2d(k, 2 * k, 3, padding=1), "norm": nn.BatchNorm2d(k), "linear": nn.Linear(h * w, 3)}
    return Part(apply, **members), [x]


@op()
def batch_statistics(b: Builder) -> tuple[Part, Sequence[int]]:
    """Values that see the whole batch, or everything."""
    x = b.value(2, 3, 4)
    functions: list[Function] = [
        lambda x: x - x.mean(),
        lambda x: x / (x.std() + 1),
        lambda x: x * x.max() / (x.max() - x.min()),
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x / (x.norm() + 1),
        lambda x: x / (1 + x.square().sum()).sqrt(),
        lambda x: x + torch.amax(x) - torch.amin(x),
        lambda x: x * (x.var() + 0.1).rsqrt(),
        lambda x: x / (torch.linalg.vector_norm(x) + 1),
        lambda x: torch.where((x > 3).any(), x * 0.5, x),
        lambda x: torch.where((x > -30).all(), x * 0.5, x),
        lambda x: (x - x.mean()) / torch.std_mean(x)[0],
        lambda x: x - torch.var_mean(x)[1],
        lambda x: x.softmax(0) + x.log_softmax(0) * 0.1,
        lambda x: x - x.logsumexp(0, keepdim=True),
    ]
    return _simple(b, x, functions)


# ------------------------------------------------------------------------------------------ pools and resizing


@op(2)
def resize(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4)
    shape = b.values[x].shape

    def unpool(x: Tensor) -> Tensor:
        y, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y * 2, places, (2, 2), output_size=x.shape[-2:])

    def sample(x: Tensor) -> Tensor:
        grid = torch.linspace(-1, 1, 3, dtype=x.dtype)
        grid = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
        return F.grid_sample(x, grid.expand(x.shape[0], -1, -1, -1), align_corners=False)

    def patches(x: Tensor) -> Tensor:
        return F.fold(F.unfold(x, 3, padding=1) / 9, shape[2:], 3, padding=1)

    functions: list[Function] = [
        lambda x: F.interpolate(x, size=(4, 6), mode="bicubic"),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
        lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"),
        lambda x: F.interpolate(x, size=(5, 5), mode="bicubic", antialias=True, align_corners=False),
        lambda x: F.interpolate(x.flatten(2), scale_factor=2.0, mode="linear"),
        lambda x: F.interpolate(x.flatten(2), size=9, mode="nearest"),
        lambda x: F.interpolate(x.flatten(2), size=9, mode="nearest-exact"),
        lambda x: F.interpolate(x.unsqueeze(2), size=(2, 3, 3), mode="trilinear").sum(2),
        lambda x: F.interpolate(x.unsqueeze(2), scale_factor=2.0, mode="nearest")[:, :, 0],
        lambda x: F.interpolate(x.unsqueeze(2), scale_factor=2.0, mode="nearest-exact")[:, :, 1],
        lambda x: F.max_pool2d(x, 2, 1, return_indices=True)[0],
        unpool,
        sample,
        patches,
        lambda x: F.lp_pool2d(x.abs() + 0.1, 2, 2),
        lambda x: F.avg_pool2d(x, 2, 2, 0, True, False),
        lambda x: F.adaptive_max_pool2d(x, (2, 1)),
        lambda x: F.adaptive_avg_pool2d(x, (None, 2)),
        lambda x: F.pad(x, (1, 0, 2, 1), mode="circular"),
        lambda x: F.pad(x, (1, 1), mode="replicate"),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
        lambda x: F.local_response_norm(x, 2),
    ]
    return _simple(b, x, functions)


@op()
def resize_line(b: Builder) -> tuple[Part, Sequence[int]]:
    """Pools over one dimension or three."""
    x = b.value(3, 5)
    rank = b.values[x].dim()
    line: list[Function] = [
        lambda x: F.max_pool1d(x, 2),
        lambda x: F.avg_pool1d(x, 3, 1, 1),
        lambda x: F.adaptive_avg_pool1d(x, 2),
        lambda x: F.adaptive_max_pool1d(x, 2),
        lambda x: F.max_pool1d(x, 2, 1, return_indices=True)[0],
    ]
    block: list[Function] = [
        lambda x: F.max_pool3d(x, 2, 1),
        lambda x: F.avg_pool3d(x, 2, 1),
        lambda x: F.adaptive_avg_pool3d(x, 2),
        lambda x: F.adaptive_max_pool3d(x, 2),
        lambda x: F.max_pool3d(x, 2, 1, return_indices=True)[0],
    ]
    return _simple(b, x, line if rank == 3 else block)


@op(2)
def volume(b: Builder) -> tuple[Part, Sequence[int]]:
    """Layers over three dimensions, and back to two."""
    x = b.value(4)
    _, c, _, _ = b.values[x].shape
    o = b.width()
    groups = b.choose(divisors(c))
    way = b.choose(["conv", "same", "transposed", "norm", "depth"])
    kinds: dict[str, nn.Module] = {
        "conv": nn.Conv3d(c, groups * 2, (2, 3, 3), padding=(0, 1, 1), groups=groups),
        "same": nn.Conv3d(c, o, 3, padding="same"),
        "transposed": nn.ConvTranspose3d(c, groups * 2, 2, groups=groups),
        "norm": nn.BatchNorm3d(c, eps=1e-2),
        "depth": nn.Conv3d(1, o, (c, 1, 1)),
    }

    def apply(m: Any, x: Tensor) -> Tensor:
        if way == "depth":
            return m.layer(x.unsqueeze(1)).squeeze(2)
        y = m.layer(torch.stack([x, x.roll(1, -1)], 2))
        return y.mean(2)

    return Part(apply, layer=kinds[way]), [x]


# -------------------------------------------------------------------------------------------------- reductions


@op(2)
def reduce_all(b: Builder) -> tuple[Part, Sequence[int]]:
    """The many names of reducing."""
    x = b.value(3, 4)
    dim, keep = b.axis(x), b.flag()
    functions: list[Function] = [
        lambda x: x.std(dim, keepdim=keep) + 0.1 * x.mean(dim, keepdim=keep) if x.shape[dim] > 1 else x,
        lambda x: torch.stack(torch.std_mean(x, dim, keepdim=keep)).sum(0) if x.shape[dim] > 1 else x,
        lambda x: torch.stack(torch.var_mean(x, dim, correction=0, keepdim=keep)).sum(0),
        lambda x: torch.var(x, dim, correction=0.5, keepdim=keep),
        lambda x: x.min(dim, keepdim=keep).values + x.max(dim, keepdim=keep)[0],
        lambda x: x.norm(p=1, dim=dim, keepdim=keep),
        lambda x: torch.linalg.norm(x, dim=dim, keepdim=keep),
        lambda x: torch.linalg.norm(x, dim=(1, 2), keepdim=keep).reshape(x.shape[0], -1),
        lambda x: torch.linalg.norm(x, ord=float("inf"), dim=dim, keepdim=keep),
        lambda x: torch.linalg.matrix_norm(x, keepdim=True) * x,
        lambda x: x.abs().pow(3).sum(dim, keepdim=keep).pow(1 / 3),
        lambda x: (x > 0).any(dim, keepdim=True) * x,
        lambda x: (x > 0).all(dim, keepdim=True) * x + x,
        lambda x: (x > 0).any((1, 2), keepdim=True) * x if x.dim() > 3 else (x > 0.3).all((1, 2), keepdim=True) + x,
        lambda x: (x > 0).sum(dim, keepdim=True) * x,
        lambda x: torch.count_nonzero(x > 0, dim=1).unsqueeze(1) * x if x.dim() > 2 else x,
        lambda x: x.nansum(dim, keepdim=keep),
        lambda x: torch.aminmax(x, dim=dim, keepdim=keep)[1],
        lambda x: x.quantile(0.5, dim, keepdim=keep),
        lambda x: (x - x.mean((1, 2), keepdim=True)) / (x.var((1, 2), keepdim=True, unbiased=False) + 0.1).sqrt(),
        lambda x: x * x.square().mean((1, -1), keepdim=True).add(0.1).rsqrt(),
        lambda x: x.sum((1, 2)).unsqueeze(1) / x.shape[1],
        lambda x: x.pow(2).mean(1, keepdim=True).sqrt().expand_as(x) + x,
        lambda x: torch.linalg.norm(x.flatten(2), ord="fro", dim=(1, 2)).unsqueeze(1),
        lambda x: x.flatten(1).norm(dim=1, keepdim=True),
        lambda x: F.softmin(x, dim) * x,
    ]
    return _simple(b, x, functions)


# -------------------------------------------------------------------------------------------------- elementwise


@op(2)
def act_more(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4)
    functions: list[Function] = [
        lambda x: torch.where(x > 0, x, 0.5),
        lambda x: torch.where(x > 0, 1.0, -1.0).to(x.dtype),
        lambda x: torch.where(x > 1, 0.2, x),
        lambda x: x.masked_fill(x > 1, torch.tensor(0.5, dtype=x.dtype)),
        lambda x: F.celu(x) + F.hardshrink(x),
        lambda x: F.threshold(x, 0.1, 0.0) + F.tanhshrink(x),
        lambda x: F.softshrink(x) + F.rrelu(x),
        lambda x: torch.log1p(x.abs()) + torch.expm1(x.clamp(max=1)),
        lambda x: torch.erf(x) + torch.sin(x) * torch.cos(x),
        lambda x: torch.atan2(x, 1 + x.abs()),
        lambda x: torch.logaddexp(x, -x),
        lambda x: torch.nan_to_num(x) * x.isfinite(),
        lambda x: torch.hypot(x, x + 1).log2(),
        lambda x: F.alpha_dropout(x, 0.0) + F.feature_alpha_dropout(x, 0.0),
        lambda x: F.dropout1d(x, 0.0) if x.dim() == 3 else F.dropout(x, 0.0, inplace=False),
        lambda x: torch.polar(x.abs() + 0.1, x).real,
        lambda x: x.clamp(min=torch.zeros_like(x)) + x.clip(-1, 1),
        lambda x: torch.special.expit(x) * x.sign(),
        lambda x: torch.fmax(x, x.neg()) - torch.minimum(x, torch.ones((), dtype=x.dtype)),
        lambda x: x.float().double() if x.dim() > 9 else x.clone(),
    ]
    return _simple(b, x, functions)


@op()
def region(b: Builder) -> tuple[Part, Sequence[int]]:
    """A region without gradients, or without autocast, which are graphs of their own."""
    x = b.value(2, 3, 4)
    c = b.values[x].shape[-1]

    def plain(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(x)
        return x * gate

    def layer(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.linear(x, m.weight) * 0.5
        return torch.cat([x, y], -1)

    def cast(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = F.linear(x, m.weight).softmax(-1)
        return y + 1

    return Part(b.choose([plain, layer, cast]), weight=new(b.width(), c)), [x]
