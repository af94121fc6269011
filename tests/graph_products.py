"""Ops of random models that multiply or compare vectors, and layers that real models build by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.graph_parts import Builder, Part, UnfitError, divisors, new, op

Function = Callable[[Any, Tensor], Tensor]

# ----------------------------------------------------------------------------------------------------- products


@op(2)
def product_of_rows(b: Builder) -> tuple[Part, Sequence[int]]:
    """The ops for matrices and vectors by their own names."""
    x = b.value(2)
    c, o = b.values[x].shape[-1], b.width()
    functions: list[Function] = [
        lambda m, x: x.mm(m.down),
        lambda m, x: torch.addmm(m.bias, x, m.down, beta=0.5),
        lambda m, x: torch.inner(x, m.up),
        lambda m, x: torch.tensordot(x, m.down, dims=1),
        lambda m, x: x.mv(m.row).unsqueeze(1) * m.bias,
        lambda m, x: torch.addmv(m.row, m.down, m.bias) * x,
        lambda m, x: F.linear(x, torch.outer(m.bias, m.row)),
        lambda m, x: x * (torch.dot(m.row, m.row) / c) + torch.vdot(m.bias, m.bias) / o,
        lambda m, x: F.linear(x, m.up, m.up.mv(m.row)),
        lambda m, x: x @ m.down + m.row @ m.down,
        lambda m, x: x @ torch.kron(m.down, m.square) @ m.tall if c * o <= 64 else x.mm(m.down),
        lambda m, x: torch.chain_matmul(x, m.down, m.up) if c == o else x.mm(m.down),
    ]
    if c * o <= 64:
        functions[10] = lambda m, x: torch.cat([x, -x], 1) @ torch.kron(m.square, m.down)
    members = {"down": new(c, o), "up": new(o, c), "row": new(c), "bias": new(o), "square": new(2, 2)}
    function = b.choose(functions)
    return Part(lambda m, x: function(m, x), **members), [x]


@op(2)
def product_of_tokens(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3)
    y = b.like(x)
    _, t, c = b.values[x].shape
    o = b.width()
    functions: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
        lambda m, x, y: x.bmm(y.mT) / c,
        lambda m, x, y: x.mT.bmm(y) / t,
        lambda m, x, y: torch.baddbmm(x, x.bmm(y.mT), y, alpha=0.1),
        lambda m, x, y: torch.tensordot(x, m.down, dims=1) + torch.inner(y, m.up),
        lambda m, x, y: torch.cdist(x, y + 0.5),
        lambda m, x, y: torch.cdist(x, y + 0.5, p=1.0),
        lambda m, x, y: F.cosine_similarity(x + 1, y + m.row, dim=2) + 1,
        lambda m, x, y: F.cosine_similarity(x.unsqueeze(2) + 1, m.up, dim=-1) + 1,
        lambda m, x, y: F.pairwise_distance(x, y + 0.5, keepdim=True) * y,
        lambda m, x, y: torch.einsum("btc,bsc,co->bto", x, y, m.down) / t,
        lambda m, x, y: torch.einsum("btc,oc->bot", x + y, m.up),
        lambda m, x, y: (x.flatten(1) @ y.flatten(1).mT).softmax(-1) @ x.flatten(1) + y.flatten(1),
        lambda m, x, y: x @ (m.down @ m.up) @ y.transpose(-2, -1),
        lambda m, x, y: x.adjoint() @ y.mH.mT / t,
    ]
    function = b.choose(functions)
    return Part(lambda m, x, y: function(m, x, y), down=new(c, o), up=new(o, c), row=new(c)), [x, y]


@op()
def codebook(b: Builder) -> tuple[Part, Sequence[int]]:
    """Soft assignment to learnt vectors, by distance, by angle, or by product."""
    x = b.value(3, 2)
    c = b.values[x].shape[-1]
    functions: list[Function] = [
        lambda m, x: (x @ m.book.t()).softmax(-1) @ m.book,
        lambda m, x: (
            (-torch.cdist(x, m.book.expand(x.shape[0], -1, -1) if x.dim() == 3 else m.book)).softmax(-1) @ m.book
        ),
        lambda m, x: F.normalize(x, dim=-1, eps=1e-2) @ F.normalize(m.book, dim=-1).t() * m.heat,
        lambda m, x: (x.unsqueeze(-2) - m.book).square().sum(-1),
    ]
    function = b.choose(functions)
    return Part(lambda m, x: function(m, x), book=new(b.width(), c), heat=new(1)), [x]


# ---------------------------------------------------------------------------------------------- made weights


@op(2)
def normed_weight(b: Builder) -> tuple[Part, Sequence[int]]:
    """Weights given by direction and length, or divided by their largest singular value."""
    x = b.value(4, 3)
    shape = b.values[x].shape
    layer = nn.Conv2d(shape[1], b.width(), 3, padding=1) if len(shape) == 4 else nn.Linear(shape[2], b.width())
    way = b.choose(["weight", "weight first", "spectral", "manual", "frobenius"])
    layer.double()
    if way == "weight":
        return Part(lambda m, x: m.layer(x), layer=parametrizations.weight_norm(layer)), [x]
    if way == "weight first":
        return Part(lambda m, x: m.layer(x), layer=parametrizations.weight_norm(layer, dim=1)), [x]
    if way == "spectral":
        return Part(lambda m, x: m.layer(x), layer=parametrizations.spectral_norm(layer)), [x]
    call: Any = F.linear if isinstance(layer, nn.Linear) else lambda x, w, bias: F.conv2d(x, w, bias, padding=1)

    def apply(m: Any, x: Tensor) -> Tensor:
        w = m.layer.weight
        if way == "frobenius":
            return call(x, 2 * w / w.norm(), m.layer.bias)
        flat = w.flatten(1)
        return call(x, w * (m.gain / torch.linalg.norm(flat, dim=1)).view(-1, *[1] * (w.dim() - 1)), m.layer.bias)

    return Part(apply, layer=layer, gain=new(layer.weight.shape[0])), [x]


@op()
def hyper_weight(b: Builder) -> tuple[Part, Sequence[int]]:
    """Layers whose weights are looked up, mixed or cut out of larger ones."""
    x = b.value(2, 3)
    c, o = b.values[x].shape[-1], b.width()
    functions: list[Function] = [
        lambda m, x: F.linear(x, m.weight[:o, :c]),
        lambda m, x: F.linear(x, torch.cat([m.weight[:o, :c], m.weight[1:, 1:]], 0)),
        lambda m, x: F.linear(x, m.weight[1:, :c] + m.weight[:o, 1:]),
        lambda m, x: F.linear(x, torch.einsum("k,koc->oc", m.mix.softmax(0), m.stack)),
        lambda m, x: F.linear(x, (m.mix.view(-1, 1, 1) * m.stack).sum(0)),
        lambda m, x: F.linear(x, m.stack.mean(0)),
        lambda m, x: F.linear(x, torch.stack([m.weight[1:, 1:], m.weight[:o, :c]]).amax(0)),
        lambda m, x: F.linear(x, m.weight[:o, :c].triu()),
        lambda m, x: F.linear(x, m.stack.flatten(0, 1)),
        lambda m, x: F.linear(x, m.stack.permute(1, 0, 2).reshape(-1, c)),
        lambda m, x: F.linear(F.linear(x, m.stack[0]), m.stack[1].T),
    ]
    function = b.choose(functions)
    members = {"weight": new(o + 1, c + 1), "stack": new(3, o, c), "mix": new(3)}
    return Part(lambda m, x: function(m, x), **members), [x]


# ------------------------------------------------------------------------------------------- parts of real models


@op(3)
def split_convs(b: Builder) -> tuple[Part, Sequence[int]]:
    """Channels are taken apart, parts have convs of their own, and are joined: Res2Net, GhostNet, CSP, MixConv."""
    x = b.value(4)
    c = b.values[x].shape[1]
    way = b.choose(["own", "chain", "ghost", "partial", "grouped"])
    if c % 2:
        raise UnfitError
    half = c // 2
    groups = b.choose(divisors(half))
    members = {
        "first": nn.Conv2d(half, half, 3, padding=1, groups=groups),
        "second": nn.Conv2d(half, half, 3, padding=1, groups=half),
    }
    if way == "ghost":
        members["first"] = nn.Conv2d(c, half, 1)
    if way == "grouped":
        members["first"] = nn.Conv2d(c, c, 3, padding=1, groups=2)

    def apply(m: Any, x: Tensor) -> Tensor:
        if way == "ghost":
            y = m.first(x)
            return torch.cat([y, m.second(y)], 1)
        if way == "grouped":
            left, right = m.first(x).chunk(2, 1)
            return torch.cat([right, left], 1)
        left, right = x.chunk(2, 1)
        left = m.first(left)
        right = m.second(right + left) if way == "chain" else m.second(right) if way == "own" else right
        return torch.cat([left, right], 1)

    return Part(apply, **members), [x]


@op(2)
def join_and_shape(b: Builder) -> tuple[Part, Sequence[int]]:
    """A concatenation that is reshaped right away, into groups that do or do not fit its parts."""
    x = b.value(4, 3)
    shape = b.values[x].shape
    y = b.choose([k for k in b.latest() if b.values[k].shape[2:] == shape[2:]])
    total = shape[1] + b.values[y].shape[1]
    groups = b.choose([d for d in divisors(total) if d > 1])
    way = b.choose(["outer", "inner", "shuffle", "scale", "softmax"])

    def apply(m: Any, x: Tensor, y: Tensor) -> Tensor:
        z = torch.cat([x, y], 1)
        if way == "outer":
            return z.unflatten(1, (groups, -1)).mean(1)
        if way == "inner":
            return z.unflatten(1, (-1, groups)).amax(2)
        z = z.reshape(z.shape[0], groups, total // groups, *z.shape[2:])
        if way == "shuffle":
            z = z.transpose(1, 2)
        elif way == "scale":
            z = z * m.gain
        else:
            z = z.softmax(2)
        return z.flatten(1, 2)

    return Part(apply, gain=new(groups, 1, *[1] * (len(shape) - 2))), [x, y]


@op()
def unet(b: Builder) -> tuple[Part, Sequence[int]]:
    """Down, up, and joined with what was there before."""
    x = b.value(4)
    shape = b.values[x].shape
    if shape[2] % 2 or shape[3] % 2:
        raise UnfitError
    c, mid = shape[1], b.width()
    way = b.choose(["transposed", "nearest", "shuffle"])
    up = nn.ConvTranspose2d(mid, mid, 2, stride=2) if way == "transposed" else nn.Conv2d(mid, 4 * mid, 1)

    def apply(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.down(x))
        if way == "nearest":
            y = F.interpolate(m.up(y), scale_factor=2.0)
        elif way == "shuffle":
            y = F.pixel_shuffle(m.up(y), 2)
        else:
            y = m.up(y)
        return m.join(torch.cat([x, y], 1))

    wide = c + (4 * mid if way == "nearest" else mid)
    return Part(apply, down=nn.Conv2d(c, mid, 2, stride=2), up=up, join=nn.Conv2d(wide, c, 1)), [x]


@op()
def unrolled(b: Builder) -> tuple[Part, Sequence[int]]:
    """A recurrent loop written out, with gates."""
    x = b.value(3)
    _, t, c = b.values[x].shape
    h = b.choose([4, 3])
    way = b.choose(["plain", "gru", "lstm"])

    def apply(m: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], h)
        memory, seen = state, list[Tensor]()
        for k in range(min(t, 3)):
            if way == "plain":
                state = torch.tanh(m.enter(x[:, k])[:, :h] + m.keep(state))
            elif way == "gru":
                z, r, n, _ = (m.enter(x[:, k]) + m.stay(state)).chunk(4, 1)
                state = torch.lerp(state, torch.tanh(n * r.sigmoid()), z.sigmoid())
            else:
                i, f, g, o = (m.enter(x[:, k]) + m.stay(state)).split(h, 1)
                memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
                state = o.sigmoid() * memory.tanh()
            seen.append(state)
        return torch.stack(seen, 1)

    return Part(apply, enter=nn.Linear(c, 4 * h), stay=nn.Linear(h, 4 * h), keep=nn.Linear(h, h)), [x]


@op(2)
def grouped_queries(b: Builder) -> tuple[Part, Sequence[int]]:
    """A decoder's attention: queries share keys and values, rotary positions, a causal mask, norms by head."""
    x = b.value(3)
    _, t, c = b.values[x].shape
    heads, few = b.choose([(4, 2), (2, 2), (4, 1), (6, 3)])
    way = b.choose(["gqa", "expand", "repeat", "mask"])
    normed, turned = b.flag(), b.flag()

    def turn(m: Any, q: Tensor) -> Tensor:
        if not turned:
            return q
        z = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2)) * torch.view_as_complex(m.angles)
        return torch.view_as_real(z).flatten(-2)

    def apply(m: Any, x: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = m.qkv(x).split([4 * heads, 4 * few, 4 * few], -1)
        q, k, v = (z.view(n, t, -1, 4).transpose(1, 2) for z in (q, k, v))
        if normed:
            q, k = m.norm(q), m.norm(k)
        q, k = turn(m, q), turn(m, k)
        if way == "expand":
            k, v = (z[:, :, None].expand(n, few, heads // few, t, 4).reshape(n, heads, t, 4) for z in (k, v))
        elif way != "gqa":
            k, v = (z.repeat_interleave(heads // few, 1) for z in (k, v))
        if way == "mask":
            weights = (q @ k.mT / 2).masked_fill(m.future, -1e4)
            y = weights.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=way == "gqa")
        return x + m.out(y.transpose(1, 2).reshape(n, t, -1))

    angle = torch.arange(t * 2, dtype=torch.float64).view(t, 2)
    return Part(
        apply,
        qkv=nn.Linear(c, 4 * (heads + 2 * few), bias=False),
        out=nn.Linear(4 * heads, c),
        norm=nn.RMSNorm(4, eps=1e-2),
        angles=torch.stack([angle.cos(), angle.sin()], -1),
        future=torch.ones(t, t).triu(1).bool(),
    ), [x]


@op()
def relative_bias(b: Builder) -> tuple[Part, Sequence[int]]:
    """Attention with a table of biases, looked up by relative position, that has a column for each head."""
    x = b.value(3)
    _, t, c = b.values[x].shape
    heads = b.choose([2, 3])
    way = b.choose(["index", "embedding", "gather"])
    place = torch.arange(t)[:, None] - torch.arange(t)[None] + t - 1

    def apply(m: Any, x: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = m.qkv(x).view(n, t, 3, heads, 4).permute(2, 0, 3, 1, 4)
        if way == "index":
            bias = m.table[m.place.view(-1)].view(t, t, -1).permute(2, 0, 1).contiguous()
        elif way == "embedding":
            bias = F.embedding(m.place, m.table).permute(2, 0, 1)
        else:
            bias = m.table.t().gather(1, m.place.view(1, -1).expand(heads, -1)).view(heads, t, t)
        weights = (q * 0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return m.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(n, t, 4 * heads))

    layers = {"qkv": nn.Linear(c, 12 * heads), "out": nn.Linear(4 * heads, c)}
    return Part(apply, **layers, table=new(2 * t - 1, heads), place=place), [x]


@op()
def running_buffer(b: Builder) -> tuple[Part, Sequence[int]]:
    """A statistic that train mode updates in place, by hand."""
    x = b.value(4, 3, 2)
    shape = b.values[x].shape
    way = b.choose(["channels", "count", "last"])

    def apply(m: Any, x: Tensor) -> Tensor:
        dims = (0, *range(2, x.dim())) if way != "last" else tuple(range(x.dim() - 1))
        now = x.mean(dims)
        if m.training and way == "count":
            m.count += 1
        if m.training:
            m.seen.mul_(0.9).add_(now.detach(), alpha=0.1)
        kept = m.seen if way == "last" else m.seen.view(-1, *[1] * (x.dim() - 2))
        return x - kept

    size = shape[-1] if way == "last" else shape[1]
    return Part(apply, seen=torch.zeros(size, dtype=torch.float64), count=torch.zeros((), dtype=torch.int64)), [x]


@op()
def tied_embedding(b: Builder) -> tuple[Part, Sequence[int]]:
    """A matrix that is used forwards and backwards, as embeddings are tied to a language model's last layer."""
    x = b.value(2, 3)
    c = b.values[x].shape[-1]
    functions: list[Function] = [
        lambda m, x: F.linear(m.norm(F.linear(x, m.table)).softmax(-1), m.table.t()),
        lambda m, x: F.linear(F.relu(x), m.table) @ m.table,
        lambda m, x: F.linear(x, m.table.t() @ m.table),
        lambda m, x: x + F.embedding(m.ids, m.table).mean(0),
        lambda m, x: F.linear(x + m.table[0], m.table),
    ]
    function = b.choose(functions)
    width = b.choose([6, 9])
    members = {"table": new(width, c), "norm": nn.LayerNorm(width, eps=1e-2), "ids": torch.tensor([2, 0, 5, 2])}
    return Part(lambda m, x: function(m, x), **members), [x]
