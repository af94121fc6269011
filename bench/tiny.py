"""Networks of a few thousand parameters and fewer, on which every benchmark runs in seconds."""

from __future__ import annotations

from torch import nn


def network() -> nn.Module:
    """Strided, grouped and depthwise convs, one with a bias, 1x1 convs, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def convs() -> nn.Module:
    """Two convs: what an interpreter of kernels does in seconds."""
    return nn.Sequential(nn.Conv2d(3, 6, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 2))
