"""How a weight lies in memory, and which slice of it is the student's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class KernelLayout:
    """How a parameter is used as the weight of a conv or linear op; all sizes are those of the wide layer.

    Storage order: conv `(g*o, i, *k)`, transposed conv `(g*i, o, *k)`, linear `(o, i)`. The canonical order, which
    everything about branches is written in, is `(g, o, i, *k)`.
    """

    groups: int = 1
    transposed: bool = False
    student_groups: int = 1

    def canonical_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes `(g, o, i, *k)` of a weight stored with `shape`."""
        first, second, *k = shape
        first //= self.groups
        return (self.groups, second, first, *k) if self.transposed else (self.groups, first, second, *k)

    def canonical(self, weight: Tensor) -> Tensor:
        """View a stored weight as `(g, o, i, *k)`."""
        split = weight.unflatten(0, (self.groups, -1))
        return split.transpose(1, 2) if self.transposed else split

    def stored(self, kernel: Tensor) -> Tensor:
        """Bring a canonical kernel back to its storage order; contiguous."""
        return (kernel.transpose(1, 2) if self.transposed else kernel).flatten(0, 1).contiguous()


@dataclass(frozen=True)
class Cut:
    """A slice of a dimension seen as `of` equal blocks: the first `blocks` of them, the first `length` of each."""

    of: int
    blocks: int
    length: int

    @staticmethod
    def of_index(keep: Tensor, size: int) -> Cut | None:
        """The cut that takes exactly the indices `keep` from a dimension of `size`, or None where there is none."""
        index: list[int] = keep.tolist()
        length = next((n for n, j in enumerate(index) if j != n), len(index))
        if length == 0 or len(index) % length:
            return None
        blocks = len(index) // length
        step = index[length] if blocks > 1 else size
        if step == 0 or size % step or index != [b * step + j for b in range(blocks) for j in range(length)]:
            return None
        return Cut(size // step, blocks, length)


Slice: TypeAlias = Cut | Tensor | None
"""One dimension of a student's slice: a cut, an index, or the whole dimension."""


def take(wide: Tensor, slices: Sequence[Slice], shape: Sequence[int]) -> Tensor:
    """Slice each dimension of `wide`; a view where every slice is a cut and the blocks allow it."""
    for dim in reversed(range(len(slices))):  # from the last, since a cut adds a dimension
        part = slices[dim]
        if isinstance(part, Tensor):
            wide = wide.index_select(dim, part)
        elif part is not None and part.of == 1:
            wide = wide.narrow(dim, 0, part.length)
        elif part is not None:
            blocked = wide.unflatten(dim, (part.of, -1))
            wide = blocked.narrow(dim, 0, part.blocks).narrow(dim + 1, 0, part.length)
    return wide.reshape(tuple(shape))


def along(vector: Tensor, dim: int, dims: int) -> Tensor:
    """View `vector` so that it broadcasts along dimension `dim` of a tensor with `dims` dimensions."""
    return vector.reshape((-1,) + (1,) * (dims - dim - 1))
