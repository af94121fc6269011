"""Weights of losses that may change during training: a number, or a line through points (epoch, value)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

from gpd_fx.errors import ArgumentError

Weight = float | dict[float, float]


def parse_weight(text: str) -> Weight:
    """`3`, or points `EPOCH:VALUE` with commas between them, as in `0:0,10:3`.

    Raises:
        ArgumentError: the text is of neither form.
    """
    try:
        if ":" not in text:
            return float(text)
        points = [point.split(":") for point in text.split(",")]
        return {float(epoch): float(value) for epoch, value in points}
    except ValueError:
        raise ArgumentError(
            f"weight {text!r} must be a number, or points EPOCH:VALUE with commas between them, such as 0:0,10:3"
        ) from None


def check_weight(name: str, weight: Any) -> None:
    """Refuse what is no weight.

    Raises:
        ArgumentError: a value is negative or not finite, or there is no point.
    """
    points: Mapping[Any, Any] = cast("Mapping[Any, Any]", weight) if isinstance(weight, Mapping) else {0.0: weight}
    numbers = [*points, *points.values()]
    if not points or not all(_is_number(number) for number in numbers):
        raise ArgumentError(
            f"weights.{name} is {weight!r}; it must be a finite number of 0 or more, or such numbers by epoch"
        )


def weight_at(weight: Weight, epoch: float) -> float:
    """The weight at a moment, where epoch 1.5 lies in the middle of the second one.

    Between two points the weight changes along a straight line; before the first and after the last it is constant.
    """
    if not isinstance(weight, Mapping):
        return float(weight)
    points = sorted((float(at), float(value)) for at, value in weight.items())
    if epoch <= points[0][0]:
        return points[0][1]
    for (start, first), (end, last) in pairwise(points):
        if epoch <= end:
            return first + (last - first) * (epoch - start) / (end - start)
    return points[-1][1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
