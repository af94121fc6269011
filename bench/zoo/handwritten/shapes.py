"""Channels that are joined, cut, repeated, and that change places with space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.entry import Entry, normal


class Joins(nn.Module):
    """Tensors stacked and joined in every spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(4, 6))
        self.more = nn.Parameter(torch.zeros(5, 6))
        self.mid = nn.ModuleList(nn.Linear(9, n) for n in (4, 3, 5))
        self.place = nn.Parameter(torch.zeros(2, 3, 5))
        self.deep = nn.Parameter(torch.zeros(2, 3, 4))
        self.leave = nn.Linear(2 * 3 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, torch.vstack([self.rows, self.more]))
        a, b, c = (layer(x) for layer in self.mid)
        x = torch.column_stack([a, b, torch.concatenate([c, -c[:, 1:3]], 1)])[:, :9]
        y = torch.dstack([self.place, self.deep]) * x[:, None, None]
        return self.leave(torch.ravel(y[0]) * 0.1 + y.reshape(y.shape[0], -1))


class Cuts(nn.Module):
    """Channels cut in every spelling, a part of them passed on unchanged (CSP, partial convolution)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.parts = nn.ModuleList(nn.Conv2d(n, n, 1) for n in (3, 5, 8))
        self.quarter = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.zeros(2 * 16))
        self.leave = nn.Conv2d(15, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.block(b)], 1)
        x = torch.cat([part(y) for part, y in zip(self.parts, x.split([3, 5, 8], 1), strict=True)], 1)
        first, rest = x.tensor_split([4], 1)
        x = torch.cat([self.quarter(first), rest], 1)
        x = torch.cat([F.relu(y) for y in x.split(6, 1)], 1)
        gain, bias = self.scale.tensor_split(2)
        x = x * gain.unsqueeze(-1).unsqueeze(-1) + bias.view(1, -1, 1, 1)
        return self.leave(x.narrow(1, 1, 15))


class Repeats(nn.Module):
    """Channels repeated inside and outside, and constants spread over them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 3)
        self.inner = nn.Conv2d(12, 12, 3, groups=6)
        self.small = nn.Conv2d(12, 3, 1)
        self.outer = nn.Conv2d(18, 9, 1)
        self.gain = nn.Parameter(torch.zeros(1, 9, 1, 1))
        self.token = nn.Parameter(torch.zeros(1, 1, 1, 4))
        self.leave = nn.Conv2d(9, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.enter(x).repeat_interleave(2, 1))
        x = x + self.gain.tile(1, 1, 1, 1).mean()
        x = F.relu(self.outer(torch.cat([x, self.small(x).tile(1, 2, 1, 1)], 1)))
        x = x + self.gain.expand_as(x) * self.token.expand(-1, 9, 3, -1).repeat(1, 1, 1, 1)
        return self.leave(x * self.gain.repeat_interleave(x.shape[2], 2))


class Turns(nn.Module):
    """Dimensions change places in every spelling; space is rolled, flipped, and its windows and diagonals are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.zeros(8, 6))
        self.leave = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + x.flip(3) - x.roll(1, 2) + x.mT
        x = self.mix(x.movedim((2, 3), (0, 1)).swapaxes(0, 2)).moveaxis((0, 1), (2, 0)).transpose(1, 2)
        x = x.swapdims(0, 1).permute(1, 3, 0, 2)
        y = x.diagonal(0, 2, 3).mean(-1) + x.unfold(3, 3, 2).amax(-1).mean((2, 3))
        y = (
            y
            + x.triu().mean((2, 3))
            + torch.tril(x, -1)[:, :, :, :, None, None].squeeze((4, 5)).squeeze().sum((2, 3)) / 25
        )
        y = torch.where(y > 0, y, y.exp() - 1)
        return self.leave(F.linear(y, self.weight.T))


class Taken(nn.Module):
    """Places picked by constants: index, index_select, gather, take along a dimension, and steps."""

    order: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("order", torch.tensor([4, 1, 0, 6]))
        self.register_buffer("table", torch.tensor([[2, 0], [5, 6]]))
        self.mix = nn.Linear(8, 10)
        self.leave = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.enter(x))
        y = x.index_select(2, self.order) + x[:, :, self.order] + x[..., 1::2][..., :1]
        y = y + x.gather(2, self.order.expand(x.shape[0], x.shape[1], -1))
        y = y.transpose(1, 2) + x.transpose(1, 2)[:, self.table].flatten(1, 2)
        y = self.mix(self.norm(y)).index_fill(1, self.order[1:2], 0.5)
        return self.leave(y[:, 0] + y[:, -1])


class InPlace(nn.Module):
    """Parts of a tensor changed in place through views, as hand-written position and shift code does."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 10, 3)
        self.mix = nn.Conv2d(10, 10, 1)
        self.leave = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).clone()
        out = torch.zeros_like(x)
        out[:, :4, :, 1:] = x[:, :4, :, :-1]
        out[:, 4:7, 1:] = x[:, 4:7, :-1]
        out[:, 7:].copy_(x[:, 7:])
        out.narrow(1, 2, 5).mul_(0.5).add_(1)
        out.permute(0, 2, 3, 1)[:, 0].zero_()
        out.view(out.shape[0], 10, -1).relu_()
        y = F.leaky_relu_(self.mix(out), 0.1)
        y.transpose_(2, 3).clamp_(-3, 3)
        y[:, :, 0].fill_(0.25)
        return self.leave(y.masked_fill_(y > 2, 2.0))


class Spaces(nn.Module):
    """Space to depth by reshapes, and frames folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(32, 12, 1)
        self.time = nn.Conv1d(12, 12, 3, padding=1)
        self.leave = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        x = self.enter(x.flatten(0, 1))
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        x = F.silu(self.deep(x))
        y = x.mean((2, 3)).view(b, t, -1).transpose(1, 2)
        y = self.time(torch.cat([torch.zeros_like(y[:, :3]), y[:, 3:]], 1))
        return self.leave(y.mean(-1) + x.reshape(b, t, 12, -1).transpose(1, 2).flatten(2).amax(2))


class Kron(nn.Module):
    """A weight that is a Kronecker product, one of low rank, and one with a rank-one update."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(9, 12)
        self.left, self.right = nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(3, 2))
        self.tall, self.flat = nn.Parameter(torch.zeros(9, 4)), nn.Parameter(torch.zeros(4, 15))
        self.u, self.v = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.zeros(15))
        self.last = nn.Parameter(torch.zeros(7, 9))
        self.leave = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(self.enter(x), torch.kron(self.left, self.right)))
        weight = torch.addmm(torch.outer(self.u, self.v), self.tall, self.flat) + torch.ger(self.u, self.v)
        x = F.linear(x, weight, torch.addmv(self.u, weight, self.v))
        weight = torch.inner(self.last, torch.mm(self.tall, self.tall.t()))
        return self.leave(F.linear(x, weight, torch.mv(self.last, self.u) * torch.dot(self.v, self.v)))


MODELS: dict[str, Entry] = {
    "joins": Entry(Joins, normal((6,))),
    "cuts": Entry(Cuts, normal((3, 5, 6))),
    "repeats": Entry(Repeats, normal((3, 7, 8))),
    "turns": Entry(Turns, normal((3, 5, 5))),
    "taken": Entry(Taken, normal((3, 7))),
    "in_place": Entry(InPlace, normal((3, 7, 9))),
    "spaces": Entry(Spaces, normal((5, 3, 4, 6))),
    "kron": Entry(Kron, normal((9,))),
}
