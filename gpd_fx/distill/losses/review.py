"""Feature distillation by knowledge review (ReviewKD, Chen et al., CVPR 2021).

With features F_1 ... F_n of a network from shallow to deep, and those of the static teacher U_1 ... U_n, it goes from
the deepest to the shallowest, and each level is fused with the ones below it by attention:

    X_n = N(C1 F_n)
    X_i = A[0] N(C1 F_i) + A[1] up(X_(i+1)),    A = sigmoid(C1 [N(C1 F_i), up(X_(i+1))])
    O_i = N(C3 X_i)
    loss = sum over i of HCL(O_i, U_i)

C1 and C3 are convolutions with kernels of 1 and 3, N is batch norm, up is to the size of the level. The hierarchical
context loss (HCL) is the mean squared error of the maps, and of their means over grids of 4, 2 and 1, each grid with
half the weight of the one before, divided by the sum of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpd_fx.errors import ArgumentError

_GRIDS = (4, 2, 1)
_WIDEST = 256  # channels inside


def as_map(features: Tensor) -> Tensor:
    """Features as (batch, channels, height, width).

    Maps are there already; vectors become maps of one place; tokens (batch, tokens, channels) a square, or a column
    where their number is none.

    Raises:
        ArgumentError: another number of dimensions.
    """
    if features.dim() == 4:
        return features
    if features.dim() == 2:
        return features[:, :, None, None]
    if features.dim() != 3:
        raise ArgumentError(f"features of shape {tuple(features.shape)} are neither maps, tokens nor vectors")
    side = round(features.shape[1] ** 0.5)
    size = (side, side) if side * side == features.shape[1] else (features.shape[1], 1)
    return features.transpose(1, 2).unflatten(2, size)


def hierarchical_context(features: Tensor, target: Tensor) -> Tensor:
    """The loss between two maps of the same shape; the second gets no gradient."""
    if features.shape != target.shape:
        raise ArgumentError(f"maps of {tuple(features.shape)} and {tuple(target.shape)} cannot be compared")
    features, target = features.float() if features.dtype.itemsize < 4 else features, target.detach()
    target = target.to(features.dtype)
    loss, weight, total = functional.mse_loss(features, target), 1.0, 1.0
    for grid in _GRIDS:
        if grid >= features.shape[2]:
            continue
        weight /= 2
        pooled = [functional.adaptive_avg_pool2d(each, grid) for each in (features, target)]
        loss = loss + weight * functional.mse_loss(pooled[0], pooled[1])
        total += weight
    return loss / total


class Fusion(nn.Module):
    """One level: its features made comparable with the static teacher's, with what the level below found."""

    def __init__(self, channels: int, inner: int, wanted: int, deepest: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * inner, 2, 1), nn.Sigmoid())
        self.leave = nn.Sequential(nn.Conv2d(inner, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted))

    def forward(self, features: Tensor, below: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is compared, and what the level above takes."""
        x = self.enter(features)
        if self.attend is not None and below is not None:
            below = functional.interpolate(below, x.shape[2:], mode="nearest")
            attention = self.attend(torch.cat([x, below], dim=1))
            x = x * attention[:, :1] + below * attention[:, 1:]
        return self.leave(x), x


class Review(nn.Module):
    """The loss of one network's features, from shallow to deep, against the static teacher's.

    Args:
        channels: of the network's features.
        wanted: of the static teacher's.
    """

    def __init__(self, channels: Sequence[int], wanted: Sequence[int]) -> None:
        super().__init__()
        inner = min(_WIDEST, max(wanted))
        deepest = len(channels) - 1
        self.levels = nn.ModuleList(
            Fusion(have, inner, want, level == deepest)
            for level, (have, want) in enumerate(zip(channels, wanted, strict=True))
        )

    def forward(self, features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        losses: list[Tensor] = []
        below: Tensor | None = None
        for level, mine, target in reversed(list(zip(self.levels, features, targets, strict=True))):
            goal = as_map(target)
            seen, below = level(as_map(mine), below)
            if seen.shape[2:] != goal.shape[2:]:
                seen = functional.interpolate(seen, goal.shape[2:], mode="nearest")
            losses.append(hierarchical_context(seen, goal))
        return torch.stack(losses).sum()
