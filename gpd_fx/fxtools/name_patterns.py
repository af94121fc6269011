"""Names that differ by numbers only, written as one: `blocks.{0..11}.mlp.fc1.weight[0]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

_NUMBER = re.compile(r"\d+(?![^\[]*\])")  # but no dimension, which stands in brackets


def pattern(name: str) -> str:
    """A name with its numbers left open, the dimension behind it apart."""
    return _NUMBER.sub("*", name)


def span(names: Sequence[str]) -> str:
    """One name for several of the same pattern."""
    names = list(dict.fromkeys(names))
    numbers = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if prod(map(len, columns)) != len(names):
        return f"{names[0]} and {len(names) - 1} like it" if len(names) > 1 else names[0]
    written = iter(map(_range, columns))
    return _NUMBER.sub(lambda _: next(written), names[0])


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few of many names."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
