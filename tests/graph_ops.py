"""The ops that random models are made of, each with its options, the plainest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph_parts import Builder, Part, UnfitError, new, op


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _along(x: Tensor, dim: int) -> list[int]:
    """The shape of a parameter along one dimension."""
    return [n if d == dim else 1 for d, n in enumerate(x.shape)][1:]


# ---------------------------------------------------------------------------------------------- linear layers


def _conv(b: Builder, cin: int, dims: int) -> nn.Module:
    groups = b.choose(_divisors(cin))
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
    groups = b.choose(_divisors(shape[1]))
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
    kind = b.choose([nn.LSTM, nn.GRU])
    return Part(lambda m, x: m.rnn(x)[0], rnn=kind(b.values[x].shape[-1], 4, batch_first=True)), [x]


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
    return Part(lambda m, x: m.norm(x), norm=nn.GroupNorm(b.choose(_divisors(c)), c, eps=1e-2)), [x]


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
    k = b.choose([d for d in _divisors(c) if d > 1])
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
        shape.append(b.choose([d for d in _divisors(todo) if d <= 16]))
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
    groups = b.choose([d for d in _divisors(c) if 1 < d < c])

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
