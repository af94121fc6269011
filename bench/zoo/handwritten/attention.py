"""Attention over positions, over channels and over neither, and gates made of channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.entry import Entry, normal, tokens


class SqueezeExcite(nn.Module):
    """A gate of channels, by product."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 10, 3)
        self.squeeze = nn.Conv2d(10, 4, 1)
        self.excite = nn.Conv2d(4, 10, 1)
        self.leave = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        gate = self.excite(F.relu(self.squeeze(x.sum((2, 3), keepdim=True) / 30)))
        return self.leave(x * F.hardsigmoid(gate))


class ChannelSoftmax(nn.Module):
    """Channels compete: softmax over them, and a log softmax over them before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 9, 3)
        self.score = nn.Linear(9, 9)
        self.leave = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        weight = torch.softmax(self.score(x.mean((2, 3))), 1)
        x = x * weight[:, :, None, None]
        return self.leave(F.log_softmax(x.flatten(2).logsumexp(2), dim=1))


class CrossCovariance(nn.Module):
    """Attention between the channels of a head: they are contracted, the positions are summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 12, 2, stride=2)
        self.qkv = nn.Linear(12, 36)
        self.heat = nn.Parameter(torch.ones(3, 1, 1))
        self.leave = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, c // 3).permute(2, 0, 3, 4, 1).unbind(0)
        scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * self.heat
        return self.leave((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, c) + x)


class Translator(nn.Module):
    """torch's own transformer, encoder and decoder, between tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(23, 12)
        self.places = nn.Parameter(torch.zeros(1, 9, 12))
        self.core = nn.Transformer(12, 4, 1, 1, 20, dropout=0.0, batch_first=True)
        self.leave = nn.Linear(12, 23, bias=False)
        self.leave.weight = self.words.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = torch.full((target.shape[1], target.shape[1]), -torch.inf, dtype=self.places.dtype).triu(1)
        source, target = self.words(source), self.words(target)
        source, target = source + self.places[:, : source.shape[1]], target + self.places[:, : target.shape[1]]
        return self.leave(self.core(source, target, tgt_mask=mask, tgt_is_causal=True))


class GroupedQueries(nn.Module):
    """Several queries to a key, rotary positions by complex numbers, SwiGLU, RMS norm, a causal mask."""

    turn: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(19, 16)
        self.norm = nn.RMSNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 24), nn.Linear(16, 8), nn.Linear(16, 8)
        self.out = nn.Linear(24, 16, bias=False)
        self.gate = nn.Linear(16, 40)
        self.down = nn.Linear(20, 16)
        angles = torch.outer(torch.arange(7.0), 10 ** -torch.arange(2.0))
        self.register_buffer("turn", torch.stack([angles.cos(), angles.sin()], -1))
        self.leave = nn.Linear(16, 19)

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous())
        return torch.view_as_real(pairs * torch.view_as_complex(self.turn.to(x.dtype))).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, value = self.gate(self.norm(x)).split(20, -1)
        return self.leave(x + self.down(F.silu(gate) * value))


class Relative(nn.Module):
    """Attention with a table of relative positions that an index spreads, and queries summed in one product."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 12)
        self.maps = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.table = nn.Parameter(torch.zeros(13, 3))
        self.register_buffer("index", torch.arange(7)[:, None] - torch.arange(7) + 6)
        self.leave = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (to(x).view(-1, 7, 3, 4).movedim(2, 1).flatten(0, 1) for to in self.maps)
        bias = self.table[self.index.view(-1)].view(7, 7, 3).permute(2, 0, 1)
        scores = torch.baddbmm(bias.repeat(x.shape[0], 1, 1), q, k.transpose(1, 2), alpha=0.5)
        y = torch.bmm(F.softmax(scores, -1), v).unflatten(0, (-1, 3))
        return self.leave(x + y.moveaxis(1, 2).flatten(2))


class Einsums(nn.Module):
    """Linear attention and an expert mixture, all by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 12)
        self.qkv = nn.Parameter(torch.zeros(3, 12, 3, 4))
        self.up = nn.Parameter(torch.zeros(4, 12, 10))
        self.down = nn.Parameter(torch.zeros(4, 10, 12))
        self.route = nn.Linear(12, 4)
        self.leave = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = torch.einsum("bnc,schd->sbhnd", x, self.qkv).unbind()
        context = torch.einsum("bhnd,bhne->bhde", k.softmax(2), v)
        x = x + torch.einsum("bhnd,bhde->bnhe", q.exp(), context).flatten(2)
        share = self.route(x).softmax(-1)
        return self.leave(x + torch.einsum("...c,eco,eop,...e->...p", x, self.up, self.down, share))


class NonLocal(nn.Module):
    """Every place sees every place, by matrix products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 10, 3)
        self.query, self.key, self.value = (nn.Conv2d(10, n, 1) for n in (6, 6, 8))
        self.out = nn.Conv2d(8, 10, 1)
        self.leave = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        scores = torch.matmul(q.adjoint(), k.mH.mT) / 6**0.5
        y = torch.matmul(v, scores.softmax(-1).swapaxes(1, 2)).view_as(v).unflatten(2, x.shape[2:])
        return self.leave(x + self.out(y))


class Pooled(nn.Module):
    """One learnt query pools a sequence; a bilinear form and outer products join two views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 12)
        self.query = nn.Parameter(torch.zeros(12))
        self.bias = nn.Parameter(torch.zeros(6))
        self.pair = nn.Bilinear(12, 10, 8)
        self.other = nn.Linear(12, 10)
        self.core = nn.Parameter(torch.zeros(8, 10, 6))
        self.leave = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        share = torch.matmul(x, self.query).softmax(-1)
        pooled = torch.matmul(share.unsqueeze(1), x).squeeze(1)
        other = F.elu(self.other(x.mean(1)))
        joined = self.pair(pooled, other)
        y = torch.tensordot(joined.unsqueeze(2) * other.unsqueeze(1), self.core, dims=2)
        return self.leave(torch.addmm(self.bias, y, self.core.mean(0).t() @ self.core.mean(0)))


class Windows(nn.Module):
    """Windows that are shifted by half, attention in them, and patches merged: channels change places with space."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.merge = nn.Linear(48, 20, bias=False)
        self.leave = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(b, h // 2, 2, w // 3, 3, c).transpose(2, 3).reshape(-1, 6, c)
        y = self.attention(y, y, y, need_weights=False)[0]
        y = y.view(b, h // 2, w // 3, 2, 3, c).swapdims(2, 3).reshape(b, h, w, c)
        x = x + torch.roll(y, (1, 1), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.leave(self.merge(x).mean((1, 2)))


MODELS: dict[str, Entry] = {
    "squeeze_excite": Entry(SqueezeExcite, normal((3, 7, 8))),
    "channel_softmax": Entry(ChannelSoftmax, normal((3, 7, 6))),
    "cross_covariance": Entry(CrossCovariance, normal((3, 6, 10))),
    "translator": Entry(Translator, tokens(23, (9,), (5,))),
    "grouped_queries": Entry(GroupedQueries, tokens(19, (7,))),
    "relative": Entry(Relative, normal((7, 5))),
    "einsums": Entry(Einsums, normal((7, 5))),
    "non_local": Entry(NonLocal, normal((3, 6, 7))),
    "pooled": Entry(Pooled, normal((7, 5))),
    "windows": Entry(Windows, normal((3, 6, 12))),
}
