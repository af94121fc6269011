"""How one parameter of the student becomes a wide parameter of the dynamic teacher, and back.

A widened dimension of size n holds N >= n unscaled copies of the student's slices, described by three vectors:

    gather[j] in 0..n-1    the student's index that wide index j copies                  wide = student[gather]
    keep[s]   in 0..N-1    where the student's own slice s lies, gather[keep[s]] == s    student = wide[keep]
    alpha[j]  float64      its share where the dimension is contracted; the shares of the copies of one index sum to 1

Nearly every `keep` is `arange(n)` (originals first), or the same within each group of a grouped layer. Such a slice is
a `Cut`, a view, and needs no index on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

from gpd_fx.kernels.compose.layout import Cut, KernelLayout, Slice, along, take

_BLOCK = 2**16  # elements that are made at a time


@dataclass(frozen=True, eq=False)
class ParamPlan:
    """The widening of one parameter; one entry a dimension in `gather`, `keep` and `alpha`, None where nothing happens.

    Attributes:
        name: the student's (canonical) parameter name.
        shape: the student's shape.
        gather: int64 `[wide size]`, the student's index of each wide index.
        keep: int64 `[student size]`, the wide index of each of the student's own slices.
        alpha: float64 `[wide size]`, multiplied into the teacher's tensor.
        kernel: how the parameter is used as a conv or linear weight; None where it is not (only) that: no branches.
    """

    name: str
    shape: tuple[int, ...]
    gather: tuple[Tensor | None, ...]
    keep: tuple[Tensor | None, ...]
    alpha: tuple[Tensor | None, ...]
    kernel: KernelLayout | None = None

    def __post_init__(self) -> None:
        """Every tuple has one entry a dimension."""
        for field in ("gather", "keep", "alpha"):
            entries = getattr(self, field)
            if len(entries) != len(self.shape):
                raise ValueError(f"{self.name}: {field} has {len(entries)} entries for the shape {self.shape}")

    @staticmethod
    def identity(name: str, shape: Sequence[int], kernel: KernelLayout | None = None) -> ParamPlan:
        """A plan that widens nothing."""
        none = (None,) * len(shape)
        return ParamPlan(name, tuple(shape), none, none, none, kernel)

    @cached_property
    def wide_shape(self) -> tuple[int, ...]:
        """The shape of the wide parameter."""
        return tuple(n if g is None else g.numel() for n, g in zip(self.shape, self.gather, strict=True))

    @property
    def wide_numel(self) -> int:
        """How many elements the wide parameter has."""
        return prod(self.wide_shape)

    @property
    def scales(self) -> bool:
        """Whether the teacher's tensor is alpha times the parameter, and not the parameter itself."""
        return any(alpha is not None for alpha in self.alpha)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """`keep` with cuts in the place of regular indices."""
        return tuple(
            None if index is None else (Cut.of_index(index, size) or index)
            for index, size in zip(self.keep, self.wide_shape, strict=True)
        )

    def widen(self, tensor: Tensor) -> Tensor:
        """Copy the student's tensor along every widened dimension (no alpha); `tensor` itself where there is none."""
        if all(index is None for index in self.gather):
            return tensor
        wide = tensor.new_empty(self.wide_shape)
        for rows in self.blocks():
            wide[rows] = self.rows(tensor, rows)
        return wide

    def blocks(self) -> Iterator[slice]:
        """Rows of the wide tensor, some at a time: what is made of a large one step by step takes little memory."""
        count = self.wide_shape[0] if self.shape else 0  # a number has no rows
        step = max(1, _BLOCK * count // max(self.wide_numel, 1))
        return (slice(start, start + step) for start in range(0, count, step))

    def rows(self, tensor: Tensor, rows: slice) -> Tensor:
        """Some rows of the widened tensor (no alpha)."""
        for dim, index in enumerate(self.gather):
            if index is not None:
                tensor = tensor.index_select(dim, (index if dim else index[rows]).to(tensor.device))
            elif dim == 0:
                tensor = tensor[rows]
        return tensor

    def scaled_rows(self, tensor: Tensor, rows: slice) -> Tensor:
        """Some rows of the teacher's tensor."""
        return self.scale(self.rows(tensor, rows), rows)

    def scale(self, tensor: Tensor, rows: slice = slice(None)) -> Tensor:
        """`tensor`, all of the wide one or some rows, times alpha along its dimensions; itself where there is none."""
        for dim, alpha in enumerate(self.alpha):
            if alpha is not None:
                part = alpha if dim else alpha[rows]
                tensor = tensor * along(part, dim, tensor.dim()).to(tensor.dtype).to(tensor.device)
        return tensor

    def scale_(self, tensor: Tensor) -> Tensor:
        """As `scale`, in place."""
        for dim, alpha in enumerate(self.alpha):
            if alpha is not None:
                tensor.mul_(along(alpha, dim, tensor.dim()).to(tensor.dtype).to(tensor.device))
        return tensor

    def student(self, tensor: Tensor) -> Tensor:
        """The student's slice of a wide tensor."""
        slices = tuple(s.to(tensor.device) if isinstance(s, Tensor) else s for s in self.slices)
        return take(tensor, slices, self.shape)
