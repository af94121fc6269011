"""Small images and networks that the tests of the trainer share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from gpd_fx.distill import DistillConfig, Images

CLASSES = 3


class Net(nn.Module):
    """Convolution, batch norm, dropout: everything whose state matters to a run."""

    def __init__(self, width: int = 4, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.body = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body(x))
        return self.head(self.drop(x.mean((2, 3))))


def write_images(root: Path, train: int = 24, test: int = 9, size: int = 12) -> Path:
    """Folders of images whose colour tells their class."""
    image: Any = __import__("PIL.Image").Image
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for number in range(count):
            kind = number % CLASSES
            folder = root / split / f"class{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., kind] += 100
            image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def tensors(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Dataset[Any]:
    """The same as tensors of 6 by 6."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randn(count, 3, 6, 6, generator=generator, dtype=dtype)
    images[torch.arange(count), labels] += 1.5
    return TensorDataset(images, labels)


def images(train: int = 48, test: int = 30) -> Images:
    """What a run trains on and is evaluated on."""
    return Images(tensors(train), tensors(test, 1), CLASSES, (3, 6, 6))


def config(**values: Any) -> DistillConfig:
    """A short run on the CPU."""
    given: dict[str, Any] = {"student": "tests:Net", "ema_decay": 0.9, "onnx": False, "device": "cpu"}
    given |= {"epochs": 2, "batch_size": 16, "workers": 0, **values}
    return DistillConfig(**given)
