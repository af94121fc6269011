"""CIFAR-10 in memory: the images of a zip or folder of class folders, decoded once, and batches of them.

The file or folder holds `train/<class>/*` and `test/<class>/*`, at any depth.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

_MEAN, _SPREAD = 120.7, 63.0  # of all pixels and colours of the training images
_EDGE = 4  # pixels of padding that a crop may move over


@dataclass(frozen=True)
class Images:
    """Images as bytes (n, 3, side, side), and their classes (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: Tensor | slice) -> Images:
        """Some of them."""
        return Images(self.pixels[index], self.labels[index])


def load(source: Path, cache: Path) -> tuple[Images, Images]:
    """The training and the test images; decoded once, then read from `cache`."""
    if not cache.exists():
        content = _files(source)
        classes = sorted({Path(name).parent.name for name in content})
        arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = {}
        for part in ("train", "test"):
            names = sorted(name for name in content if Path(name).parent.parent.name == part)
            if not names:
                raise SystemExit(f"{source} has no images at .../{part}/<class>/")
            images = [np.asarray(Image.open(io.BytesIO(content[name])).convert("RGB")) for name in names]
            arrays[part] = np.stack(images).transpose(0, 3, 1, 2)
            labels = [classes.index(Path(name).parent.name) for name in names]
            arrays[f"{part}_labels"] = np.asarray(labels, dtype=np.uint8)
        cache.parent.mkdir(parents=True, exist_ok=True)
        whole = cache.with_suffix(".part.npz")
        np.savez(whole, allow_pickle=False, **arrays)
        whole.replace(cache)
    with np.load(cache, allow_pickle=False) as found:
        made = [
            Images(torch.from_numpy(found[part]), torch.from_numpy(found[f"{part}_labels"]).long())
            for part in ("train", "test")
        ]
    return made[0], made[1]


def _files(source: Path) -> dict[str, bytes]:
    """The content of all image files by name."""
    kinds = (".jpg", ".jpeg", ".png")
    if source.is_dir():
        return {str(p.relative_to(source)): p.read_bytes() for p in source.rglob("*") if p.suffix.lower() in kinds}
    with zipfile.ZipFile(source) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.lower().endswith(kinds)}


def prepare(pixels: Tensor) -> Tensor:
    """Bytes to floats around zero, with the channels last in memory."""
    return ((pixels.float() - _MEAN) / _SPREAD).contiguous(memory_format=torch.channels_last)


def batches(images: Images, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, each image moved by up to four pixels and mirrored at random; whole batches only."""
    order = torch.randperm(len(images), generator=generator)
    side = images.pixels.shape[-1]
    for start in range(0, len(images) - size + 1, size):
        chosen = images.part(order[start : start + size])
        padded = functional.pad(chosen.pixels, (_EDGE,) * 4)
        shift = torch.randint(2 * _EDGE + 1, (size, 2), generator=generator)
        mirrored = torch.randint(2, (size, 1), generator=generator).bool()
        span = torch.arange(side)
        rows = shift[:, :1] + span
        columns = shift[:, 1:] + torch.where(mirrored, span.flip(0), span)
        crop = padded[torch.arange(size)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        yield prepare(crop.permute(0, 3, 1, 2)), chosen.labels
