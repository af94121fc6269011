"""Where the tile kernels find a network's tensors: a row of addresses and strides for each layer.

Which tensor goes where, how each must lie and what comes out is known before the step; only the addresses are not. So
a step reads the addresses of its tensors, in one order, and puts them into a table that holds all else already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpd_fx.kernels.compose import columns
from gpd_fx.kernels.compose.forms import (
    Form,
    form_of,
    lying,
    memory_format,
    strides_of,
    tap_stride,
)
from gpd_fx.kernels.compose.recipe import (
    INPUT_FILTER,
    OUTPUT_FILTER,
    PRODUCT,
    Recipe,
    Starts,
)


class Result(NamedTuple):
    """A tensor that a launch makes: which of the operator's results it is, and how it lies."""

    place: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class Rows:
    """How the table of some layers is filled.

    Attributes:
        template: the table, with strides and without addresses.
        regular: which of the operator's tensors are read, contiguous.
        last: which are read with their channels last, and their number of dimensions.
        results: what is made.
        places: where in the table the addresses go: of what is read contiguous, then the others, then the results.
    """

    template: NDArray[np.int64]
    regular: list[int] = field(default_factory=list[int])
    last: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    results: list[Result] = field(default_factory=list[Result])
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def read(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """What the kernels read of the operator's tensors, lying as they must."""
        found = [t if t.is_contiguous() else t.contiguous() for n in self.regular if (t := tensors[n]) is not None]
        for n, dims in self.last:
            tensor = tensors[n]
            assert tensor is not None
            found.append(tensor.contiguous(memory_format=memory_format(True, dims)))
        return found

    def blanks(self, like: Tensor) -> list[Tensor]:
        """Room for what is made, with the dtype and on the device of a tensor."""
        dtype, device = like.dtype, like.device
        return [torch.empty_strided(shape, strides, dtype=dtype, device=device) for _, shape, strides in self.results]

    def table(self, addresses: Sequence[int]) -> Tensor:
        """The table with addresses in it, on the CPU."""
        filled = self.template.copy()
        filled[self.places] = addresses
        return torch.from_numpy(filled)


class _Filler:
    """Collects what the rows of one launch are made of."""

    def __init__(self, layers: int) -> None:
        self.rows = Rows(np.zeros(layers * columns.DYN, np.int64))
        self._regular: list[int] = []
        self._last: list[int] = []
        self._results: list[int] = []

    def reads(self, place: int, tensor: int, shape: Sequence[int], last: bool) -> None:
        """The kernels read one of the operator's tensors."""
        if last:
            self.rows.last.append((tensor, len(shape)))
            self._last.append(place)
        else:
            self.rows.regular.append(tensor)
            self._regular.append(place)

    def makes(self, place: int, result: int, shape: tuple[int, ...], last: bool) -> None:
        """The kernels write one of the operator's results."""
        self.rows.results.append(Result(result, shape, lying(shape, last)))
        self._results.append(place)

    def finish(self) -> Rows:
        """All of it."""
        self.rows.places = np.array([*self._regular, *self._last, *self._results], np.int64)
        return self.rows


def forward_rows(recipes: Sequence[Recipe], starts: Sequence[Starts], taken: Sequence[int]) -> Rows:
    """The rows of the layers `taken` for composing; the operator's tensors are the weights, then the operands."""
    filler = _Filler(len(taken))
    for row, number in enumerate(taken):
        recipe, start, at = recipes[number], starts[number], row * columns.DYN
        filler.reads(at + columns.WEIGHT, number, recipe.wide, recipe.last)
        if recipe.teacher:
            filler.makes(at + columns.TEACHER, start.result, recipe.wide, recipe.last)
        if recipe.student:
            filler.makes(at + columns.STUDENT, start.result + recipe.teacher, recipe.shape, recipe.last)
        _operands(filler, recipe, at, len(recipes) + start.operand, None, 0)
    return filler.finish()


def backward_rows(
    recipes: Sequence[Recipe],
    starts: Sequence[Starts],
    taken: Sequence[int],
    needed: Sequence[str],
    given: Sequence[bool],
) -> Rows:
    """The rows of the layers `taken` for their gradients.

    Args:
        recipes: all layers.
        starts: theirs.
        taken: by number.
        needed: for each layer, a 1 for each gradient that is asked for.
        given: which gradients of the results there are. These are the operator's tensors, then the operands.
    """
    filler = _Filler(len(taken))
    first = [0]
    for flags in needed:
        first.append(first[-1] + flags.count("1"))
    for row, number in enumerate(taken):
        recipe, start, at, flags = recipes[number], starts[number], row * columns.DYN, needed[number]
        if recipe.teacher and given[start.result]:
            filler.reads(at + columns.TEACHER, start.result, recipe.wide, recipe.last)
        of_student = start.result + recipe.teacher
        if recipe.student and given[of_student]:
            filler.reads(at + columns.STUDENT, of_student, recipe.shape, recipe.last)
        result = first[number]
        if flags[0] == "1":
            filler.makes(at + columns.D_WEIGHT, result, recipe.wide, recipe.last)
            result += 1
        _operands(filler, recipe, at, len(given) + start.operand, flags[1:], result)
    return filler.finish()


def _operands(filler: _Filler, recipe: Recipe, at: int, tensor: int, needed: str | None, result: int) -> None:
    """A layer's row but for its weight: `tensor` is its first operand, `result` the first gradient of one."""
    form = form_of(recipe)
    assert form is not None
    template = filler.rows.template
    template[at + columns.STRIDE : at + columns.STRIDE + 4] = strides_of(form, recipe)
    for dim, present in enumerate(recipe.alpha):
        if present:
            place = columns.ROW_ALPHA if dim == form.row else columns.COLUMN_ALPHA
            filler.reads(at + place, tensor, recipe.wide[dim : dim + 1], False)
            tensor += 1
    for (place, gradient), (shape, last), flag in zip(
        _columns(recipe), recipe.shapes(), needed or "0" * len(recipe.shapes()), strict=True
    ):
        filler.reads(at + place, tensor, shape, last)
        tensor += 1
        if flag == "1":
            assert gradient is not None
            filler.makes(at + gradient, result, shape, last)
            result += 1
        if place == columns.PRODUCT + 2:
            template[at + columns.PRODUCT_STRIDE : at + columns.PRODUCT_STRIDE + 4] = _strides(form, shape, last)


def _strides(form: Form, shape: tuple[int, ...], last: bool) -> tuple[int, int, int, int]:
    """The strides of a product's kernel: group, output, inner channel, tap."""
    strides = lying(shape, last)
    return form.outputs * strides[0], strides[0], strides[1], tap_stride(strides[2:], shape[2:])


def _columns(recipe: Recipe) -> Iterator[tuple[int, int | None]]:
    """Of each of its terms' tensors, the column of its address and that of its gradient's; a filter may have none."""
    filters, lines = columns.FILTERED, columns.LINES
    for part in recipe.terms:
        if part.kind == OUTPUT_FILTER:
            yield from ((filters, filters + 3), (filters + 1, filters + 4), (filters + 2, None))
            filters += 5
        elif part.kind in (INPUT_FILTER, PRODUCT):
            first = columns.SUMMED if part.kind == INPUT_FILTER else columns.PRODUCT
            yield from ((first + n, first + 3 + n) for n in range(3))
        else:
            yield from ((lines, lines + 2), (lines + 1, lines + 3))
            lines += 4
