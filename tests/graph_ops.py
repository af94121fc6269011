"""Ops of random models that change, join, take apart, reshape and reduce values. The plainest option is first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph_parts import Builder, Part, UnfitError, divisors, new, op


def _along(x: Tensor, dim: int) -> list[int]:
    """The shape of a parameter along one dimension."""
    return [n if d == dim else 1 for d, n in enumerate(x.shape)][1:]


# -------------------------------------------------------------------------------------------------- pointwise


ACTS: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    F.gelu,
    F.silu,
    F.hardswish,
    F.sigmoid,
    F.tanh,
    F.leaky_relu,
    F.elu,
    F.softplus,
    F.hardsigmoid,
    F.mish,
    F.selu,
    torch.abs,
    torch.square,
    F.relu6,
    F.softsign,
    F.logsigmoid,
    lambda x: 0.5 * x + 1,
    lambda x: 1 - x,
    lambda x: -x,
    lambda x: x.clamp(-0.5, 1.5),
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x.masked_fill(x < 0, 0.0),
    lambda x: 1 / (1 + x.exp()),
    lambda x: x.contiguous(),
    lambda x: F.dropout(x, 0.0),
    lambda x: x.detach() + x,
    lambda x: torch.addcmul(x, x, x, value=0.1),
]


@op(6)
def act(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4, 5)
    function = b.choose(ACTS)
    return Part(lambda m, x: function(x)), [x]


@op(2)
def act_in_place(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4, 5)
    functions: list[Callable[[Tensor], Tensor]] = [
        F.relu_,
        F.leaky_relu_,
        F.hardtanh_,
        F.elu_,
        lambda y: (y + 1).mul_(0.5).add_(y, alpha=0.3).sub_(0.1),
    ]
    function = b.choose(functions)
    return Part(lambda m, x: function(x * 1.5)), [x]


@op(2)
def write_slice(b: Builder) -> tuple[Part, Sequence[int]]:
    """Changes a part of a value in place, through a view."""
    x = b.value(2, 3, 4)
    dim = b.axis(x)
    n = b.values[x].shape[dim]
    start = b.number() % n
    length = 1 + b.number() % (n - start)
    way = b.choose(["scale", "act", "zero", "copy"])

    def apply(m: Any, x: Tensor) -> Tensor:
        y = x + 0.5
        part = (
            y.narrow(dim, start, length) if way == "copy" else y[(slice(None),) * dim + (slice(start, start + length),)]
        )
        if way == "scale":
            part.mul_(0.5)
        elif way == "act":
            part.copy_(F.silu(part * 2))
        elif way == "zero":
            part.zero_()
        else:
            part.copy_(F.gelu(x.narrow(dim, start, length)))
        return y

    return Part(apply), [x]


@op()
def write_base(b: Builder) -> tuple[Part, Sequence[int]]:
    """A view is taken, then its base changes in place."""
    x = b.value(3, 4)

    def apply(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1.5
        flat = y.flatten(1)
        y.add_(0.5)
        return y, flat

    return Part(apply), [x]


@op()
def prelu(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 2)
    c = b.values[x].shape[1]
    return Part(lambda m, x: m.act(x), act=nn.PReLU(b.choose([c, 1]))), [x]


@op(3)
def scale(b: Builder) -> tuple[Part, Sequence[int]]:
    """A parameter or buffer along one axis or several."""
    x = b.value(2, 3, 4)
    shape = _along(b.values[x], b.axis(x))
    kind = b.choose(["weight", "buffer", "passing", "table"])
    if kind == "weight":
        return Part(lambda m, x: x * m.gain, gain=new(*shape)), [x]
    if kind == "table":  # a position embedding
        return Part(lambda m, x: x + m.bias, bias=new(1, *b.values[x].shape[1:])), [x]
    return Part(lambda m, x: x * getattr(m, kind), **{kind: torch.ones(shape)}), [x]


# ---------------------------------------------------------------------------------------------- several values


BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: x + y,
    lambda x, y: x * y,
    lambda x, y: x - 0.5 * y,
    lambda x, y: x * torch.sigmoid(y),
    torch.maximum,
    lambda x, y: x / (1 + y.abs()),
    lambda x, y: torch.lerp(x, y, 0.3),
    lambda x, y: torch.where(x > y, x, y),
    lambda x, y: (x + 0.0).add_(y),
]


@op(8)
def combine(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 2)
    function = b.choose(BINARY)
    return Part(lambda m, x, y: function(x, y)), [x, b.like(x)]


@op(3)
def residual(b: Builder) -> tuple[Part, Sequence[int]]:
    """Two values with the same space, joined by a projection."""
    x = b.value(4)
    shape = b.values[x].shape
    y = b.choose([k for k in b.latest() if b.values[k].dim() == 4 and b.values[k].shape[2:] == shape[2:]])
    function = b.choose(BINARY)
    layer = nn.Conv2d(b.values[y].shape[1], shape[1], 1)
    return Part(lambda m, x, y: function(x, m.conv(y)), conv=layer), [x, y]


@op(2)
def broadcast(b: Builder) -> tuple[Part, Sequence[int]]:
    """A value and its own mean over an axis."""
    x = b.value(4, 3)
    dim = b.axis(x)
    function = b.choose(BINARY)
    return Part(lambda m, x: function(x, x.mean(dim, keepdim=True))), [x]


@op(3)
def squeeze_excite(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4)
    c, hidden = b.values[x].shape[1], b.width()
    gate = b.choose([F.sigmoid, F.hardsigmoid, lambda y: 1 + torch.tanh(y)])
    if b.flag():

        def dense(m: Any, x: Tensor) -> Tensor:
            y = gate(m.up(F.relu(m.down(x.mean((2, 3))))))
            return x * y[:, :, None, None]

        return Part(dense, down=nn.Linear(c, hidden), up=nn.Linear(hidden, c)), [x]

    def apply(m: Any, x: Tensor) -> Tensor:
        return x * gate(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))

    return Part(apply, down=nn.Conv2d(c, hidden, 1), up=nn.Conv2d(hidden, c, 1)), [x]


@op()
def channel_conv(b: Builder) -> tuple[Part, Sequence[int]]:
    """Efficient channel attention: a convolution across the channels."""
    x = b.value(4)
    layer = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def apply(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x.mean((2, 3)).unsqueeze(1))
        return x * torch.sigmoid(y).transpose(1, 2).unsqueeze(-1)

    return Part(apply, conv=layer), [x]


@op()
def space_attention(b: Builder) -> tuple[Part, Sequence[int]]:
    """CBAM's second half: mean and maximum over the channels, a conv, a gate."""
    x = b.value(4)

    def apply(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(m.conv(both))

    return Part(apply, conv=nn.Conv2d(2, 1, 3, padding=1)), [x]


@op()
def selective(b: Builder) -> tuple[Part, Sequence[int]]:
    """Selective kernels: a softmax over branches, by channel."""
    x = b.value(4)
    y = b.like(x)
    c = b.values[x].shape[1]

    def apply(m: Any, x: Tensor, y: Tensor) -> Tensor:
        stacked = torch.stack([x, y], 1)
        logits = m.up(F.relu(m.down(stacked.sum(1).mean((2, 3))))).view(x.shape[0], 2, c, 1, 1)
        return (stacked * torch.softmax(logits, 1)).sum(1)

    return Part(apply, down=nn.Linear(c, 4), up=nn.Linear(4, 2 * c)), [x, y]


@op(5)
def concatenate(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 2)
    dim = b.axis(x)
    shape = list(b.values[x].shape)

    def fits(other: Tensor) -> bool:
        return [n for d, n in enumerate(other.shape) if d != dim] == [n for d, n in enumerate(shape) if d != dim]

    others = [k for k in b.latest() if fits(b.values[k])]
    reads = [x, *(b.choose(others) for _ in range(b.choose([1, 1, 2])))]
    return Part(lambda m, *values: torch.cat(values, dim)), reads


@op()
def concatenate_own(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 2)
    dim = b.axis(x)
    way = b.choose(["negative", "act", "parameter", "zeros", "input"])
    if way == "parameter":
        shape = [1, *b.values[x].shape[1:]]
        shape[dim] = b.choose([1, 2])
        token = new(*shape)
        return Part(lambda m, x: torch.cat([m.token.expand(x.shape[0], *shape[1:]), x], dim), token=token), [x]
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "negative": lambda x: -x,
        "act": F.gelu,
        "zeros": torch.zeros_like,
        "input": lambda x: x,
    }
    function = functions[way]
    return Part(lambda m, x: torch.cat([x, function(x)], dim)), [x]


@op()
def stack(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 2)
    dim = b.choose(range(1, b.values[x].dim() + 1))
    return Part(lambda m, x, y: torch.stack([x, y], dim)), [x, b.like(x)]


@op()
def outer(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3)
    y = b.like(x)
    if b.values[x].dim() == 2:
        return Part(lambda m, x, y: torch.einsum("bi,bj->bij", x, y)), [x, y]
    way = b.choose(["bic,bjc->bij", "bic,bid->bcd", "bic,bjc->bijc", "bic,bic->bic"])
    return Part(lambda m, x, y: torch.einsum(way, x, y) / 3), [x, y]


# -------------------------------------------------------------------------------------------- taking apart


@op(3)
def split(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 2)
    dim = b.axis(x)
    n = b.values[x].shape[dim]
    way = b.choose(["chunk", "split", "sizes", "tensor_split"])
    if n < 2:
        raise UnfitError
    if way == "chunk":
        k = b.choose([2, 3, 4])
        return Part(lambda m, x: tuple(x.chunk(k, dim))), [x]
    if way == "tensor_split":
        return Part(lambda m, x: tuple(x.tensor_split(2, dim))), [x]
    at = 1 + b.number() % (n - 1)
    if way == "split":
        return Part(lambda m, x: tuple(x.split(at, dim))[:3]), [x]
    return Part(lambda m, x: tuple(x.split([at, n - at], dim))), [x]


@op(3)
def take(b: Builder) -> tuple[Part, Sequence[int]]:
    """A slice: from the front, the back, the middle, every second, or by a table."""
    x = b.value(4, 3, 2, 5)
    dim = b.axis(x)
    n = b.values[x].shape[dim]
    at = b.number() % n
    index: dict[str, Any] = {
        "front": slice(None, at + 1),
        "back": slice(-at - 1, None),
        "middle": slice(at // 2, at // 2 + max(n // 2, 1)),
        "second": slice(at % 2, None, 2),
        "table": torch.arange(n).flip(0)[: max(n // 2, 1)],
    }
    where = index[b.choose(list(index))]
    if isinstance(where, Tensor):
        if b.flag():
            return Part(lambda m, x: x.index_select(dim, m.table), table=where), [x]
        return Part(lambda m, x: x[(slice(None),) * dim + (m.table,)], table=where), [x]
    return Part(lambda m, x: x[(slice(None),) * dim + (where,)]), [x]


@op()
def pick(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3, 4, 5)
    dim = b.axis(x)
    at = b.number() % b.values[x].shape[dim]
    if b.flag():
        return Part(lambda m, x: tuple(x.unbind(dim))[:3]), [x]
    return Part(lambda m, x: x.select(dim, at)), [x]


@op(2)
def gated(b: Builder) -> tuple[Part, Sequence[int]]:
    """GLU, and the same by halves."""
    x = b.value(4, 3, 2)
    dim = b.axis(x)
    if b.values[x].shape[dim] % 2:
        raise UnfitError

    def halves(m: Any, x: Tensor) -> Tensor:
        a, g = x.chunk(2, dim)
        return a * F.gelu(g)

    return Part(b.choose([lambda m, x: F.glu(x, dim), halves])), [x]


@op()
def maxout(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 2)
    c = b.values[x].shape[1]
    k = b.choose([d for d in divisors(c) if d > 1])
    inner = b.flag()

    def apply(m: Any, x: Tensor) -> Tensor:
        if inner:
            return x.unflatten(1, (c // k, k)).amax(2)
        return x.reshape(x.shape[0], k, c // k, *x.shape[2:]).amax(1)

    return Part(apply), [x]


# -------------------------------------------------------------------------------------------------- shapes


@op(4)
def reshape(b: Builder) -> tuple[Part, Sequence[int]]:
    """Any other factorisation of the elements of a sample."""
    x = b.value(2, 3, 4, 5)
    todo = prod(b.values[x].shape[1:])
    shape: list[int] = []
    for _ in range(b.choose([1, 2, 3])):
        shape.append(b.choose([d for d in divisors(todo) if d <= 16]))
        todo //= shape[-1]
    shape.append(todo)
    if b.flag():
        return Part(lambda m, x: x.contiguous().view(x.shape[0], *shape)), [x]
    return Part(lambda m, x: x.reshape(-1, *shape)), [x]


@op(3)
def flatten(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 5)
    start = b.choose([d for d in (2, 1) if d < b.values[x].dim() - 1])
    turned = b.flag() and start == 2
    return Part(lambda m, x: x.flatten(start).transpose(1, 2) if turned else x.flatten(start)), [x]


@op(4)
def permute(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3, 4, 5)
    rank = b.values[x].dim()
    first, second = b.axis(x), b.axis(x)
    way = b.choose(["transpose", "last", "movedim"])
    if way == "last":
        return Part(lambda m, x: x.permute(0, *range(2, rank), 1)), [x]
    if way == "movedim":
        return Part(lambda m, x: x.movedim(first, second)), [x]
    return Part(lambda m, x: x.transpose(first, second)), [x]


@op()
def unsqueeze(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4)
    dim = b.choose(range(1, b.values[x].dim() + 1))
    return Part(lambda m, x: x.unsqueeze(dim)), [x]


@op()
def expand(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4)
    dim, k = b.choose(range(1, b.values[x].dim() + 1)), b.choose([2, 3])
    way = b.choose(["expand", "repeat", "repeat_interleave", "expand_as"])

    def apply(m: Any, x: Tensor) -> Tensor:
        if way == "repeat_interleave":
            return x.repeat_interleave(k, min(dim, x.dim() - 1))
        if way == "repeat":
            return x.repeat(*[k if d == min(dim, x.dim() - 1) else 1 for d in range(x.dim())])
        if way == "expand_as":
            return x.mean(1, keepdim=True).expand_as(x) + x
        y = x.unsqueeze(dim)
        return y.expand(*[k if d == dim else -1 for d in range(y.dim())])

    return Part(apply), [x]


@op(2)
def channel_shuffle(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3)
    c = b.values[x].shape[1]
    groups = b.choose([d for d in divisors(c) if 1 < d < c])

    def apply(m: Any, x: Tensor) -> Tensor:
        n, _, *rest = x.shape
        return x.view(n, groups, c // groups, *rest).transpose(1, 2).contiguous().view(n, -1, *rest)

    def plain(m: Any, x: Tensor) -> Tensor:
        return F.channel_shuffle(x, groups) if x.dim() == 4 else apply(m, x)

    return Part(b.choose([lambda m, x: apply(m, x.contiguous()), plain])), [x]


@op()
def pixel_shuffle(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4)
    return Part(b.choose([lambda m, x: F.pixel_shuffle(x, 2), lambda m, x: F.pixel_unshuffle(x, 2)])), [x]


@op()
def patch_merge(b: Builder) -> tuple[Part, Sequence[int]]:
    """Neighbouring pixels become channels: Swin's way, YOLO's way, im2col."""
    x = b.value(4)

    def focus(m: Any, x: Tensor) -> Tensor:
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)

    def patches(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, h // 2, w // 2, 4 * c)

    return Part(b.choose([focus, patches, lambda m, x: F.unfold(x, 2, stride=2)])), [x]


@op()
def windows(b: Builder) -> tuple[Part, Sequence[int]]:
    """Window partition, a linear layer on the windows, and back; the batch takes the windows in."""
    x = b.value(4)
    c = b.values[x].shape[1]
    shift = b.flag()

    def apply(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1)
        y = torch.roll(y, (-1, -1), (1, 2)) if shift else y
        y = y.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = m.linear(y)
        y = y.view(-1, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return x + y.permute(0, 3, 1, 2)

    return Part(apply, linear=nn.Linear(c, c)), [x]


@op()
def rearrange(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4)
    dim = b.axis(x)
    return Part(b.choose([lambda m, x: x.roll(1, dim), lambda m, x: x.flip(dim)])), [x]


@op()
def pad(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4)
    k = b.values[x].dim() - 1 - b.axis(x)
    amounts = [0, 0] * k + [b.choose([0, 1, 2]), b.choose([1, 0, 2])]
    fill_in = b.choose([0.0, 0.5])
    return Part(lambda m, x: F.pad(x, amounts, value=fill_in)), [x]


@op(3)
def pool(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4)
    options: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, size=(5, 5), mode="bilinear"),
        lambda x: F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    ]
    function = b.choose(options)
    return Part(lambda m, x: function(x)), [x]


# ------------------------------------------------------------------------------------------------ reductions


REDUCTIONS: list[Callable[[Tensor, int, bool], Tensor]] = [
    lambda x, dim, keep: x.mean(dim, keepdim=keep),
    lambda x, dim, keep: x.sum(dim, keepdim=keep),
    lambda x, dim, keep: x.amax(dim, keepdim=keep),
    lambda x, dim, keep: x.logsumexp(dim, keepdim=keep),
    lambda x, dim, keep: (x.var(dim, keepdim=keep) + 0.1).sqrt(),
    lambda x, dim, keep: (x.var(dim, keepdim=keep, unbiased=False) + 0.1).sqrt(),
    lambda x, dim, keep: (x + x.detach().cos()).std(dim, keepdim=keep),
    lambda x, dim, keep: (x.square() + 0.1).norm(dim=dim, keepdim=keep),
    lambda x, dim, keep: torch.linalg.vector_norm(x.square() + 0.1, ord=3, dim=dim, keepdim=keep),
    lambda x, dim, keep: x.max(dim, keepdim=keep).values,
    lambda x, dim, keep: x.amin(dim, keepdim=keep),
    lambda x, dim, keep: torch.var_mean(x, dim, keepdim=keep)[1],
    lambda x, dim, keep: x.median(dim, keepdim=keep).values,
    lambda x, dim, keep: (x.abs() + 0.1).prod(dim, keepdim=keep),
]


@op(4)
def reduce(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3, 4, 5)
    dim, keep = b.axis(x), b.flag()
    function = b.choose(REDUCTIONS)
    return Part(lambda m, x: function(x, dim, keep)), [x]


@op()
def reduce_more(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 5)
    dims = b.choose([(2, 3), (1, 2), (1, 3), (-1, 1)])
    keep = b.flag()
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.mean(dims, keepdim=keep),
        lambda x: x.sum(dims, keepdim=keep) / 4,
        lambda x: x.amax(dims, keepdim=keep),
        lambda x: x.logsumexp(dims, keepdim=keep),
        lambda x: (x.var(dims, keepdim=keep) + 0.1).sqrt(),
    ]
    function = b.choose(functions)
    return Part(lambda m, x: function(x)), [x]


@op(3)
def softmax(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4)
    dim = b.axis(x)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.softmax(dim),
        lambda x: x.log_softmax(dim),
        lambda x: x * x.softmax(dim),
        lambda x: x.cumsum(dim),
        lambda x: x - x.mean(dim, keepdim=True),
    ]
    function = b.choose(functions)
    return Part(lambda m, x: function(x)), [x]
