"""Norms, statistics and distances over channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.entry import Entry, normal


class GlobalResponse(nn.Module):
    """ConvNeXt's second block: a 2-norm over space, divided by its mean over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 9, 3)
        self.up, self.down = nn.Linear(9, 20), nn.Linear(20, 9)
        self.gamma, self.beta = nn.Parameter(torch.zeros(20)), nn.Parameter(torch.zeros(20))
        self.leave = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).permute(0, 2, 3, 1)
        y = F.gelu(self.up(x))
        size = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        y = torch.addcmul(y, self.gamma, y * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.beta
        return self.leave((x + self.down(y)).mean((1, 2)))


class Normed(nn.Module):
    """Every norm over channels that is one op, and those of features of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 12, 3)
        self.group = nn.GroupNorm(4, 12)
        self.whole = nn.GroupNorm(1, 12)
        self.instance = nn.InstanceNorm2d(12, affine=True)
        self.tracked = nn.InstanceNorm2d(12, affine=True, track_running_stats=True)
        self.batch = nn.BatchNorm2d(12)
        self.root = nn.RMSNorm(12)
        self.layer = nn.LayerNorm([12, 4, 5])
        self.leave = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = self.group(x) + self.whole(x) + self.batch(x)
        x = F.mish(self.instance(x)) + self.layer(x)
        x = self.root(x.permute(0, 2, 3, 1)).mean((1, 2))
        return self.leave(F.normalize(x, dim=1))


class Tracked(nn.Module):
    """An instance norm with running statistics, which average over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(3, 10, 3)
        self.norm = nn.InstanceNorm1d(10, affine=True, track_running_stats=True)
        self.leave = nn.Conv1d(10, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.norm(self.enter(x)))


class Spread(nn.Module):
    """Statistics pooling of speaker models: mean and deviation over time and over channels, with every correction."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(4, 10, 3)
        self.gain = nn.Parameter(torch.zeros(10, 10))
        self.leave = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        x = x / (x.std(1, keepdim=True) + 1) + x.var(1, correction=2, keepdim=True)
        spread, mean = torch.std_mean(x, -1, correction=0)
        wide, middle = torch.var_mean(x, (1, 2), keepdim=True)
        x = (x - middle) / (wide + 1).sqrt()
        deviation, centre = torch.std_mean(x, 2, False)
        gain = (self.gain - self.gain.mean()) / (self.gain.std(unbiased=False) + self.gain.var(unbiased=True) + 1)
        both, _ = torch.std_mean(self.gain, unbiased=True)
        more, _ = torch.var_mean(self.gain, unbiased=False)
        fourth = torch.var_mean(x, 1, correction=1)[0].mean(-1, keepdim=True) + x.std(2, correction=1) * (both + more)
        y = F.linear(mean + centre, gain)
        return self.leave(torch.cat([spread, y, deviation + x.var(2), fourth], 1))


class Cosine(nn.Module):
    """A head of prototypes: cosines, distances in several norms, and a Gaussian of them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 11)
        self.left, self.right = nn.Linear(11, 8), nn.Linear(11, 8)
        self.prototypes = nn.Parameter(torch.zeros(5, 8))
        self.leave = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.enter(x))
        a, b = self.left(x), self.right(x)
        far = torch.exp(-torch.cdist(a, self.prototypes))
        near = F.cosine_similarity(a[:, None], self.prototypes, dim=-1)
        apart = F.pairwise_distance(a, b).unsqueeze(1)
        alike = F.cosine_similarity(a, b).unsqueeze(1)
        taxi = torch.cdist(a, b[:1].detach() * 0, p=1.0)
        return self.leave(torch.cat([far, near, apart, alike, taxi, a.abs().amax(1, keepdim=True)], 1))


class Norms(nn.Module):
    """Weights and features divided by their norms, in every spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(12, 5))
        self.second = nn.Parameter(torch.zeros(10, 12))
        self.third = nn.Parameter(torch.zeros(9, 10))
        self.leave = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first / torch.linalg.matrix_norm(self.first))
        x = x / (torch.linalg.norm(x, dim=1, keepdim=True) + 1)
        x = F.selu(F.linear(x, self.second / (self.second.norm() + torch.linalg.norm(self.second, "fro"))))
        x = x / (torch.linalg.vector_norm(x, 1, dim=1, keepdim=True) + x.norm(3, 1, keepdim=True) + 1)
        weight = self.third / torch.linalg.norm(self.third)
        return self.leave(F.linear(x, weight / torch.linalg.vector_norm(weight, torch.inf, dim=1, keepdim=True)))


class Extremes(nn.Module):
    """Maxima, minima, and whether there is any: over channels, over space and over all of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 10, 3)
        self.weight = nn.Parameter(torch.zeros(9, 10))
        self.leave = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x - x.amax(1, keepdim=True) * 0.1 + x.amin((2, 3), keepdim=True)
        low, high = x.min(1, keepdim=True)[0], x.max(1, keepdim=True)[0]
        alive = (x > 0).any(1, keepdim=True) & ~(x > 0).all((2, 3), keepdim=True)
        x = torch.where(alive, (x - low) / (high - low + 1), x)
        x = x * (x > 0).any(3, keepdim=True).any(2, keepdim=True) * (x < 9).all(1, keepdim=True)
        x = x + (x > -9).any((1, 2), keepdim=True).to(x) + x * (((x > 2) | (x < 1)) & True | False)
        weight = (self.weight - self.weight.min()) / (self.weight.max() - self.weight.min() + 1)
        weight = weight * ((self.weight > 0).any() | (self.weight > 0).all())
        return self.leave(F.linear(x.amax((2, 3)), weight))


MODELS: dict[str, Entry] = {
    "global_response": Entry(GlobalResponse, normal((3, 6, 7))),
    "normed": Entry(Normed, normal((3, 6, 7))),
    "tracked": Entry(Tracked, normal((3, 11))),
    "spread": Entry(Spread, normal((4, 9))),
    "cosine": Entry(Cosine, normal((6,))),
    "norms": Entry(Norms, normal((5,))),
    "extremes": Entry(Extremes, normal((3, 6, 7))),
}
