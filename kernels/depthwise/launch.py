"""Running the kernels of a depthwise conv and batch norm: which tiles they take, and the tensors that come out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from gpd_fx.kernels.triton_support import available

if available():
    from gpd_fx.kernels.depthwise import triton_kernels
else:
    triton_kernels = None


ELEMENTS, INPUTS = 1024, 512
"""Elements of a tile of the conv's output, and of its input in `differentiate_conv`, which holds more of each."""
SMALL = 256
"""Channels that are not together go by fours where they have no more positions than this."""
PROGRAMS = 4096
"""A program takes several tiles where there are more than so many."""
MOST_STEPS = 16
MOST_SIDE = 7
"""Kernels longer than this are left alone: a row of one is unrolled."""
_SECTOR = 16  # neighbours that are read together
_ROWS, _COLUMNS = 64, 32  # of a tile of the parts that are added up


@dataclass(frozen=True)
class Conv:
    """A depthwise conv's geometry."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @staticmethod
    def of(weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Conv:
        """From the arguments of `conv2d`."""
        pairs = [(n[0], n[-1]) for n in (weight.shape[2:], stride, padding, dilation)]
        return Conv(*pairs)

    def out(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output for those of an input."""
        zipped = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        high, wide = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zipped)
        return high, wide

    def constants(self) -> dict[str, int]:
        """What the kernels are compiled for."""
        pairs = (self.kernel, self.stride, self.padding, self.dilation)
        names = ("kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw")
        return dict(zip(names, itertools.chain(*pairs), strict=True))


@dataclass(frozen=True)
class Tiles:
    """How positions are cut up: images, rows and columns of a tile, and how many tiles there are."""

    images: int
    rows: int
    columns: int
    count: int

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(shape: tuple[int, int, int], window: tuple[int, int, int, int], positions: int, last: bool) -> Tiles:
        """Tiles of so many positions that read the fewest elements.

        Args:
            shape: images, rows and columns.
            window: how many rows and columns are read for each row and column, and how many beyond these.
            positions: a power of two.
            last: whether the channels lie together, and not the columns.
        """
        powers = [2**n for n in range(positions.bit_length())]

        def cost(tile: tuple[int, int, int]) -> int:
            images, rows, columns = tile
            read = columns * window[1] + window[3]
            read = read if last else ceil(read / _SECTOR) * _SECTOR
            count = prod(ceil(n / m) for n, m in zip(shape, tile, strict=True))
            return count * (images * (rows * window[0] + window[2]) * read + positions)

        sizes = [(positions // (h * w), h, w) for h in powers for w in powers if h * w <= positions]
        best = min(sizes, key=cost)
        return Tiles(*best, prod(ceil(n / m) for n, m in zip(shape, best, strict=True)))


@dataclass(frozen=True)
class Grid:
    """Tiles, how many channels belong to one, and how many tiles a program takes."""

    tiles: Tiles
    block: int
    steps: int
    programs: tuple[int, int]

    @staticmethod
    def of(x: Tensor, size: tuple[int, int], window: tuple[int, int, int, int], elements: int, last: bool) -> Grid:
        """For positions of this size in the images of x."""
        images, channels = x.shape[:2]
        block = elements // 16 // x.element_size() if last else 4 if prod(size) <= SMALL else 1
        tiles = Tiles.of((images, *size), window, elements // block, last)
        blocks = ceil(channels / block)
        steps = max(1, min(MOST_STEPS, tiles.count * blocks // PROGRAMS))
        return Grid(tiles, block, steps, (ceil(tiles.count / steps), blocks))

    def constants(self) -> dict[str, int]:
        """What the kernels are compiled for."""
        tiles = self.tiles
        return {"tn": tiles.images, "th": tiles.rows, "tw": tiles.columns, "block": self.block, "steps": self.steps}


class Call:
    """One conv over one input: tiles and sizes that its kernels share."""

    def __init__(self, x: Tensor, weight: Tensor, conv: Conv) -> None:
        self.last = lies_last(x)
        self.x = lying(x, self.last)
        self.weight = weight.contiguous()
        images, self.channels, height, width = x.shape
        self.out = conv.out((height, width))
        self.shape = (images, self.channels, *self.out)
        self.count = images * prod(self.out)
        self.sizes = (images, height, width, *self.out, self.channels)
        self.conv = conv
        reach = (conv.dilation[0] * (conv.kernel[0] - 1), conv.dilation[1] * (conv.kernel[1] - 1))
        self.over_outputs = Grid.of(x, self.out, (*conv.stride, *reach), ELEMENTS, self.last)
        back = (ceil(reach[0] / conv.stride[0]), ceil(reach[1] / conv.stride[1]))
        light = max(conv.kernel) < MOST_SIDE and max(conv.stride) == 1  # else a tile does not fit into the registers
        elements = INPUTS if light else INPUTS // 2
        self.over_inputs = Grid.of(x, (height, width), (1, 1, *back), elements, self.last)

    def start(self, name: str, grid: Grid, *args: Any, warps: int, **constants: Any) -> None:
        """Start a kernel that goes over tiles."""
        constants |= {"last": self.last} | self.conv.constants() | grid.constants()
        _launch(name, grid.programs, *args, num_warps=warps, **constants)

    def add_up(self, partial: Tensor, result: Tensor) -> None:
        """Start the kernel that adds the programs' parts."""
        size = result.numel()
        grid = (ceil(size / _COLUMNS), 1)
        _launch("add_up", grid, partial, result, len(partial), size, rows=_ROWS, block=_COLUMNS, num_warps=4)


def padding_of(given: str | int | Sequence[int], size: Sequence[int], dilation: Sequence[int]) -> list[int] | None:
    """The padding that conv2d is given, in numbers; None where it differs from one side to the other.

    Args:
        given: "same", "valid" or numbers.
        size: of the kernel.
        dilation: of its taps.
    """
    if isinstance(given, int):
        return [given, given]
    if given == "valid":
        return [0, 0]
    if given != "same":
        return [int(given[0]), int(given[-1])]
    reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    return None if any(n % 2 for n in reach) else [n // 2 for n in reach]


def lies_last(x: Tensor) -> bool:
    """Whether a tensor's channels lie together."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def lying(tensor: Tensor, last: bool) -> Tensor:
    """The tensor with its channels together, or with its columns."""
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    conv: Conv,
    eps: float,
    z: Tensor,
    statistics: Tensor,
) -> None:
    """Fill z and the statistics; three launches."""
    call = Call(x, weight, conv)
    grid, channels = call.over_outputs, call.channels
    partial = statistics.new_empty((grid.programs[0], 3, channels))
    call.start("take_statistics", grid, call.x, call.weight, partial, *call.sizes, warps=4)
    args = (partial, bias, statistics, len(partial), float(call.count), eps, channels)
    blocks = (ceil(channels / _COLUMNS), 1)
    _launch("merge_statistics", blocks, *args, biased=bias is not None, rows=_ROWS, block=_COLUMNS, num_warps=4)
    there = {"has_gamma": gamma is not None, "has_beta": beta is not None}
    args = (call.x, call.weight, gamma, beta, statistics, z, *call.sizes)
    call.start("normalise", grid, *args, warps=4, **there)


def backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    statistics: Tensor,
    conv: Conv,
    dx: Tensor,
    dw: Tensor,
    sums: Tensor,
) -> None:
    """Fill the gradients of x and of the kernel, and the sums that are those of beta and gamma; four launches."""
    call = Call(x, weight, conv)
    dz = lying(dz, call.last)
    normal = torch.empty_like(dz)
    grid = call.over_outputs
    partial = statistics.new_empty((grid.programs[0], 2, call.channels))
    args = (call.x, call.weight, statistics, dz, normal, partial, *call.sizes)
    call.start("differentiate_norm", grid, *args, warps=4)
    call.add_up(partial, sums)
    grid = call.over_inputs
    partial = statistics.new_empty((grid.programs[0], dw.numel()))
    count = float(call.count)
    args = (call.x, call.weight, gamma, statistics, sums, dz, normal, dx, partial, count, *call.sizes)
    taps = 2 ** (prod(conv.kernel) - 1).bit_length()
    warps = 2 if max(conv.kernel) < MOST_SIDE else 4
    call.start("differentiate_conv", grid, *args, warps=warps, has_gamma=gamma is not None, taps=taps)
    call.add_up(partial, dw)


def _launch(name: str, grid: tuple[int, int], *args: Any, **constants: Any) -> None:
    """Start a kernel; a tensor that is not there is given as None."""
    with torch.cuda.device_of(args[0]):
        getattr(triton_kernels, name)[grid](*args, **constants, num_stages=1, enable_fp_fusion=True)
