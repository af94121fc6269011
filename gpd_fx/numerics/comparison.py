"""How far two outputs are apart, random inputs like given ones, and inputs that differ as little as can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gpd_fx.numerics.precision import COMPLEX

CONDITIONING = 100.0
"""An error may be this many times what one unit in the last place of the input does, see `nudged`."""


def relative_error(expected: Any, actual: Any) -> float:
    """max |difference| / max |output| over all tensors of two outputs; inf where they do not compare."""
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(actual)
    if len(left) != len(right):
        return float("inf")
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if isinstance(a, Tensor)]
    return max((_tensor_error(a, b) for a, b in pairs), default=0.0)


def _tensor_error(expected: Tensor, actual: Any) -> float:
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return float("inf")
    if expected.is_complex() and actual.is_complex():
        expected, actual = torch.view_as_real(expected), torch.view_as_real(actual)
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual) else float("inf")
    expected, actual = expected.double(), actual.double()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    if not torch.equal(expected[~finite].nan_to_num(7.0), actual[~finite].nan_to_num(7.0)):
        return float("inf")
    difference = (expected - actual)[finite].abs().max().item() if finite.any() else 0.0
    scale = expected[finite].abs().max().item() if finite.any() else 0.0
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def random_like(
    example: Any, generator: torch.Generator, dtype: torch.dtype, batches: Mapping[int, int] | None = None
) -> Any:
    """Random inputs of an example's structure: normal floats, integers within the example's range.

    `batches` gives other leading sizes for some of the example's tensors, by their id.
    """

    def draw(tensor: Tensor) -> Tensor:
        batch = (batches or {}).get(id(tensor))
        if batch is not None:
            rows = torch.arange(batch, device=tensor.device) % tensor.shape[0]
            tensor = tensor[rows]
        if tensor.is_floating_point() or tensor.is_complex():
            kind = dtype if tensor.is_floating_point() else COMPLEX.get(dtype, tensor.dtype)
            exact = torch.float64 if tensor.is_floating_point() else torch.complex128
            drawn = torch.empty(tensor.shape, dtype=exact, device="cpu").normal_(generator=generator)
            return drawn.to(tensor.device, kind)
        if tensor.dtype == torch.bool or tensor.numel() == 0:
            return tensor
        low, high = int(tensor.min()), int(tensor.max())
        numbers = torch.randint(low, high + 1, tensor.shape, generator=generator, device="cpu")
        return numbers.to(tensor.device, tensor.dtype)

    return pytree.tree_map_only(Tensor, draw, example)


def nudged(inputs: Any, dtype: torch.dtype) -> Any:
    """Inputs changed by one unit in the last place of a dtype."""
    unit = torch.finfo(dtype).eps
    return pytree.tree_map_only(Tensor, lambda t: t * (1 + unit) if t.is_floating_point() else t, inputs)
