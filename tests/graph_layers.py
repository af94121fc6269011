"""Ops of random models that have parameters: linear layers, normalisation, attention. The plainest option is first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph_parts import Builder, Part, UnfitError, divisors, new, op

# ---------------------------------------------------------------------------------------------- linear layers


def _conv(b: Builder, cin: int, dims: int) -> nn.Module:
    groups = b.choose(divisors(cin))
    cout = groups * b.choose([k for k in (max(4 // groups, 1), 1, 2, 3, 6 // groups) if k])
    kernel = b.choose([(1,) * dims, (3,) * dims, (2,) * dims, (3, *(1,) * (dims - 1)), (4,) * dims])
    stride, dilation = b.choose([(1, 1), (2, 1), (1, 2)])
    mode = b.choose(["zeros", "circular", "reflect", "replicate", "same", "valid"])
    padding: Any = mode if mode in ("same", "valid") else tuple((k - 1) * dilation // 2 for k in kernel)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return kind(
        cin,
        cout,
        kernel,  # pyright: ignore[reportArgumentType]  as long as the class asks
        stride=1 if mode == "same" else stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=not b.flag(),
        padding_mode=mode if isinstance(padding, tuple) else "zeros",  # pyright: ignore[reportArgumentType]  one of them
    )


@op(8)
def conv(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 5)
    shape = b.values[x].shape
    return Part(lambda m, x: m.conv(x), conv=_conv(b, shape[1], len(shape) - 2)), [x]


@op(3)
def conv_norm_act(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3)
    shape = b.values[x].shape
    layer = _conv(b, shape[1], len(shape) - 2)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(layer.out_channels)
    act = b.choose([nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.ReLU6(inplace=True), nn.SiLU(inplace=True)])
    return Part(lambda m, x: m.act(m.norm(m.conv(x))), conv=layer, norm=norm, act=act), [x]


@op(2)
def conv_transpose(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3)
    shape = b.values[x].shape
    kind = nn.ConvTranspose2d if len(shape) == 4 else nn.ConvTranspose1d
    groups = b.choose(divisors(shape[1]))
    stride = b.choose([1, 2])
    layer = kind(
        shape[1],
        groups * b.choose([1, 2]),
        b.choose([2, 3]),
        stride=stride,
        padding=b.choose([0, 1]),
        output_padding=b.number() % stride,
        groups=groups,
        bias=not b.flag(),
    )
    return Part(lambda m, x: m.conv(x), conv=layer), [x]


@op(6)
def linear(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4, 5)
    layer = nn.Linear(b.values[x].shape[-1], b.width(), bias=not b.flag())
    return Part(lambda m, x: m.linear(x), linear=layer), [x]


@op(2)
def mlp(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4)
    c = b.values[x].shape[-1]
    hidden = b.width()
    act = b.choose([F.gelu, F.relu, F.silu])
    residual = b.flag()
    up, down = nn.Linear(c, hidden), nn.Linear(hidden, c)
    return Part(lambda m, x: m.down(act(m.up(x))) + (x if residual else 0), up=up, down=down), [x]


@op()
def token_mixer(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3)
    n = b.values[x].shape[1]
    up = nn.Linear(n, b.width())
    down = nn.Linear(up.out_features, n)
    return Part(lambda m, x: x + m.down(F.gelu(m.up(x.transpose(1, 2)))).transpose(1, 2), up=up, down=down), [x]


@op()
def matmul_weight(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4)
    shape = b.values[x].shape
    side = b.choose(["right", "left", "einsum"])
    if side == "right":
        return Part(lambda m, x: x @ m.weight, weight=new(shape[-1], b.width())), [x]
    if side == "einsum":
        return Part(lambda m, x: torch.einsum("b...c,oc->b...o", x, m.weight), weight=new(b.width(), shape[-1])), [x]
    if len(shape) < 3:
        raise UnfitError
    return Part(lambda m, x: m.weight @ x, weight=new(b.width(), shape[-2])), [x]


@op()
def einsum_weight(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3, 4)
    shape = b.values[x].shape
    if len(shape) == 4:
        return Part(lambda m, x: torch.einsum("bchw,dc->bdhw", x, m.weight), weight=new(b.width(), shape[1])), [x]
    heads = b.choose((2, 3))
    weight = new(heads, shape[2], b.choose((2, 4)))
    return Part(lambda m, x: torch.einsum("bic,hcd->bhid", x, m.weight).flatten(2), weight=weight), [x]


@op()
def made_weight(b: Builder) -> tuple[Part, Sequence[int]]:
    """A linear layer whose weight is computed from parameters."""
    x = b.value(2, 3)
    c, o = b.values[x].shape[-1], b.width()
    way = b.choose(["positive", "norm", "standard", "product", "mask", "tied"])
    if way == "product":
        return Part(lambda m, x: F.linear(x, m.up @ m.down), up=new(o, 3), down=new(3, c)), [x]
    if way == "mask":
        mask = torch.ones(o, c)
        return Part(lambda m, x: F.linear(x, m.weight * m.mask), weight=new(o, c), mask=mask), [x]
    if way == "tied":
        return Part(lambda m, x: F.relu(x @ m.weight) @ m.weight.t(), weight=new(c, o)), [x]
    if way == "norm":

        def normed(m: Any, x: Tensor) -> Tensor:
            return F.linear(x, m.scale * m.weight / (m.weight.square().sum(1, keepdim=True) + 0.1).sqrt())

        return Part(normed, weight=new(o, c), scale=new(o, 1)), [x]
    if way == "standard":

        def standard(m: Any, x: Tensor) -> Tensor:
            w = m.weight - m.weight.mean(1, keepdim=True)
            return F.linear(x, w / (w.var(1, keepdim=True, unbiased=False) + 0.1).sqrt())

        return Part(standard, weight=new(o, c)), [x]
    return Part(lambda m, x: F.linear(x, F.softplus(m.weight) - 0.5), weight=new(o, c)), [x]


@op()
def standardised_conv(b: Builder) -> tuple[Part, Sequence[int]]:
    """A conv whose kernel is standardised as in ResNetV2: by a batch norm over its outputs."""
    x = b.value(4)
    c, o = b.values[x].shape[1], b.width()

    def apply(m: Any, x: Tensor) -> Tensor:
        flat = m.weight.reshape(1, o, -1)
        kernel = F.batch_norm(flat, None, None, weight=m.gain.view(-1), training=True, momentum=0.0, eps=1e-2)
        return F.conv2d(x, kernel.reshape_as(m.weight), padding=1)

    return Part(apply, weight=new(o, c, 3, 3), gain=new(o, 1, 1, 1)), [x]


@op()
def bilinear(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3)
    y = b.like(x)
    c = b.values[x].shape[-1]
    return Part(lambda m, x, y: m.layer(x, y), layer=nn.Bilinear(c, c, b.width())), [x, y]


@op()
def tied_conv(b: Builder) -> tuple[Part, Sequence[int]]:
    """One kernel in two places: two dilations, or a conv and its transpose."""
    x = b.value(4)
    c, o = b.values[x].shape[1], b.width()

    def twice(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, m.weight, padding=1) + F.conv2d(x, m.weight, padding=2, dilation=2)

    def back(m: Any, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.relu(F.conv2d(x, m.weight, padding=1)), m.weight, padding=1)

    return Part(b.choose([twice, back]), weight=new(o, c, 3, 3)), [x]


@op(2)
def reuse(b: Builder) -> tuple[Part, Sequence[int]]:
    """A part that is there already, on other values of the same shapes."""
    k = b.choose([k for k, part in enumerate(b.parts) if next(part.parameters(), None) is not None])
    reads = list(b.wiring[k])
    reads[0] = b.like(reads[0])
    return b.parts[k], reads


@op()
def recurrent(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3)
    kind = b.choose([nn.LSTM, nn.GRU, nn.RNN])
    layers, both = b.choose([1, 2]), b.flag()
    rnn = kind(b.values[x].shape[-1], 4, num_layers=layers, bidirectional=both, bias=not b.flag(), batch_first=True)
    return Part(lambda m, x: m.rnn(x)[0], rnn=rnn), [x]


# --------------------------------------------------------------------------------------------- normalisation


@op(5)
def batch_norm(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 2, 5)
    shape = b.values[x].shape
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    norm = kind(shape[1], affine=not b.flag(), track_running_stats=not b.flag(), eps=1e-2)
    return Part(lambda m, x: m.norm(x), norm=norm), [x]


@op(3)
def layer_norm(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3, 2, 4)
    count = b.choose([1, 1, 2])
    kind = b.choose([nn.LayerNorm, nn.RMSNorm])
    shape = list(b.values[x].shape[1:])[-count:]
    norm = kind(shape, eps=1e-2, elementwise_affine=not b.flag())
    return Part(lambda m, x: m.norm(x), norm=norm), [x]


@op(2)
def layer_norm_first(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4)
    norm = nn.LayerNorm(b.values[x].shape[1], eps=1e-2)
    return Part(lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=norm), [x]


@op(2)
def group_norm(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3, 2)
    c = b.values[x].shape[1]
    return Part(lambda m, x: m.norm(x), norm=nn.GroupNorm(b.choose(divisors(c)), c, eps=1e-2)), [x]


@op()
def instance_norm(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4, 3)
    shape = b.values[x].shape
    kind = nn.InstanceNorm2d if len(shape) == 4 else nn.InstanceNorm1d
    norm = kind(shape[1], affine=b.flag(), track_running_stats=b.flag(), eps=1e-2)
    return Part(lambda m, x: m.norm(x), norm=norm), [x]


@op(2)
def normalise(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(2, 3, 4)
    dim, p = b.axis(x), b.choose([2.0, 1.0, 3.0])
    return Part(lambda m, x: F.normalize(x, p=p, dim=dim, eps=1e-2)), [x]


@op()
def response_norm(b: Builder) -> tuple[Part, Sequence[int]]:
    """Global response normalisation of ConvNeXt V2."""
    x = b.value(4)
    c = b.values[x].shape[1]

    def apply(m: Any, x: Tensor) -> Tensor:
        spread = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x + m.scale * x * spread / (spread.mean(1, keepdim=True) + 0.1) + m.bias

    return Part(apply, scale=new(c, 1, 1), bias=new(c, 1, 1)), [x]


@op()
def local_response_norm(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(4)
    return Part(lambda m, x: F.local_response_norm(x, 3)), [x]


# ------------------------------------------------------------------------------------------------- attention


def _attend(q: Tensor, k: Tensor, v: Tensor, way: str) -> Tensor:
    if way == "fused":
        return F.scaled_dot_product_attention(q, k, v)
    if way == "causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if way == "einsum":
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)
    if way == "cosine":
        weights = F.normalize(q, dim=-1, eps=1e-2) @ F.normalize(k, dim=-1, eps=1e-2).transpose(-2, -1)
        return weights.mul(2.0).softmax(-1) @ v
    if way == "linear":
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)
    if way == "merged":
        n, h = q.shape[:2]
        q, k, v = (t.reshape(n * h, t.shape[2], t.shape[3]) for t in (q, k, v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return y.view(n, h, y.shape[1], y.shape[2])
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


WAYS = ["plain", "fused", "einsum", "cosine", "linear", "merged", "causal"]


@op(5)
def attention(b: Builder) -> tuple[Part, Sequence[int]]:
    """Self-attention, with one projection for queries, keys and values, in its several layouts."""
    x = b.value(3)
    c = b.values[x].shape[2]
    heads = b.choose([h for h in (2, 1, 3, 4) if c % h == 0])
    way = b.choose(WAYS)
    layout = b.choose(["3hd", "h3d", "chunk", "unbind"])
    residual = b.flag()

    def apply(m: Any, x: Tensor) -> Tensor:
        n, t, c = x.shape
        y = m.qkv(x)
        if layout == "3hd":
            y = y.reshape(n, t, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
            q, k, v = y[0], y[1], y[2]
        elif layout == "unbind":
            q, k, v = y.reshape(n, t, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        elif layout == "h3d":
            q, k, v = y.view(n, t, heads, 3 * c // heads).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = (z.view(n, t, heads, -1).transpose(1, 2) for z in y.chunk(3, -1))
        y = _attend(q, k, v, way).transpose(1, 2).reshape(n, t, c)
        return m.out(y) + (x if residual else 0)

    return Part(apply, qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c)), [x]


@op(2)
def cross_attention(b: Builder) -> tuple[Part, Sequence[int]]:
    """Separate projections; the keys may have fewer heads; a bias by position may be added."""
    x = b.value(3)
    y = b.choose([k for k in b.latest() if b.values[k].dim() == 3])
    (_, t, c), (_, s, e) = b.values[x].shape, b.values[y].shape
    heads, width, few = b.choose([(2, 3, 2), (2, 2, 1), (4, 2, 2), (1, 4, 1)])
    way = b.choose(["plain", "bias", "fused", "mask"])

    def apply(m: Any, x: Tensor, y: Tensor) -> Tensor:
        n = x.shape[0]
        q = m.q(x).view(n, t, heads, width).transpose(1, 2)
        k, v = (layer(y).view(n, s, few, width).transpose(1, 2) for layer in (m.k, m.v))
        if few == 1:
            k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
        elif few < heads:
            k, v = k.repeat_interleave(heads // few, 1), v.repeat_interleave(heads // few, 1)
        if way == "fused":
            z = F.scaled_dot_product_attention(q, k, v)
        elif way == "mask":
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias.unsqueeze(0))
        else:
            weights = q @ k.transpose(-2, -1)
            weights = weights + m.bias if way == "bias" else weights
            z = weights.softmax(-1) @ v
        return m.out(z.transpose(1, 2).flatten(2))

    members: dict[str, Any] = {
        "q": nn.Linear(c, heads * width),
        "k": nn.Linear(e, few * width),
        "v": nn.Linear(e, few * width),
        "out": nn.Linear(heads * width, c),
    }
    if way in ("bias", "mask"):
        members["bias"] = new(heads, t, s)
    return Part(apply, **members), [x, y]


@op()
def channel_attention(b: Builder) -> tuple[Part, Sequence[int]]:
    """Attention between the channels of each head, as in XCiT."""
    x = b.value(3)
    c = b.values[x].shape[2]
    heads = b.choose([h for h in (2, 1, 3) if c % h == 0])

    def apply(m: Any, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = m.qkv(x).reshape(n, t, 3, heads, c // heads).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1, eps=1e-2), F.normalize(k, dim=-1, eps=1e-2)
        weights = (q @ k.transpose(-2, -1) * m.heat).softmax(-1)
        return m.out((weights @ v).permute(0, 3, 1, 2).reshape(n, t, c))

    return Part(apply, qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c), heat=new(heads, 1, 1)), [x]


@op()
def library_attention(b: Builder) -> tuple[Part, Sequence[int]]:
    x = b.value(3)
    c = b.values[x].shape[2]
    heads = b.choose([h for h in (2, 1) if c % h == 0])
    if b.flag():
        layer = nn.TransformerEncoderLayer(c, heads, 6, dropout=0.0, batch_first=True, norm_first=b.flag())
        return Part(lambda m, x: m.layer(x), layer=layer), [x]
    layer = nn.MultiheadAttention(c, heads, batch_first=True)
    return Part(lambda m, x: m.layer(x, x, x, need_weights=False)[0], layer=layer), [x]


@op()
def rotary(b: Builder) -> tuple[Part, Sequence[int]]:
    """Halves of each head change places, with signs and tables."""
    x = b.value(3)
    _, t, c = b.values[x].shape
    if c % 4:
        raise UnfitError

    def apply(m: Any, x: Tensor) -> Tensor:
        n = x.shape[0]
        q = m.q(x).view(n, t, 2, c // 2).transpose(1, 2)
        a, z = q.chunk(2, -1)
        q = q * m.cos + torch.cat((-z, a), -1) * m.sin
        return (q @ q.transpose(-2, -1)).softmax(-1).flatten(2)

    angle = torch.arange(t * c // 2, dtype=torch.float64).view(t, c // 2)
    return Part(apply, q=nn.Linear(c, c), cos=angle.cos(), sin=angle.sin()), [x]


@op()
def conditional_conv(b: Builder) -> tuple[Part, Sequence[int]]:
    """Kernels mixed for each sample, run as one grouped conv over the batch."""
    x = b.value(4)
    _, c, _, _ = b.values[x].shape
    o = b.choose([4, 3])

    def apply(m: Any, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        route = torch.sigmoid(m.route(x.mean((2, 3))))
        kernel = (route @ m.weight.flatten(1)).view(n * o, c, 3, 3)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernel, padding=1, groups=n)
        return y.view(n, o, h, w)

    return Part(apply, route=nn.Linear(c, 3), weight=new(3, o, c, 3, 3)), [x]
