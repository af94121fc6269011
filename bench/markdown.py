"""Tables for pages, and the part of a page that a command writes: what lies between two markers."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def put(page: str, text: str, begin: str, end: str, name: str) -> str:
    """The page, called `name`, with the text between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, first, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{name} has no line {begin!r} with {end!r} after it")
    return f"{before}{begin}\n{text}\n{end}{after}"
