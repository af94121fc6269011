"""The demo's data and student: scikit-learn's handwritten digits and a residual conv net small enough to learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from gpd_fx.io.extras import need

TRAIN: Final = 600  # few on purpose: with all the images every network is right, and there is nothing to compare
VALIDATION: Final = 600  # many, so that neither arm gets the wrong learning rate by chance


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class DigitNet(nn.Module):
    """The demo's student: a stem, two residual blocks and a linear head for 8x8 grey images of ten digits."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(features.mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 images of handwritten digits in three parts, each class in the same share."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def load_digits() -> Digits:
    """Split scikit-learn's digits, always in the same way.

    Raises:
        ArgumentError: scikit-learn is missing.
    """
    datasets, selection = (need(f"sklearn.{part}", "the demo", "demo") for part in ("datasets", "model_selection"))
    data: Any = datasets.load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(data.target, dtype=torch.int64)
    rows = list(range(len(labels)))
    train, rest = selection.train_test_split(rows, train_size=TRAIN, stratify=data.target, random_state=0)
    labelled = data.target[rest]
    validation, test = selection.train_test_split(rest, train_size=VALIDATION, stratify=labelled, random_state=0)
    return Digits(*(TensorDataset(images[part], labels[part]) for part in (train, validation, test)))
