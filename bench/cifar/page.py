"""The tables of docs/cifar.md, from the runs that are kept in `bench/results`: `python -m bench.cifar page`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bench.cifar.arms import ABLATION, LOSSES, MAIN
from bench.cifar.show import draw
from bench.cifar.tables import COLUMNS, Records, markdown, rates_of, rows_of
from bench.markdown import put

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cifar.md"
KEPT = ROOT / "bench" / "results" / "cifar.jsonl"
BEYOND = ROOT / "bench" / "results" / "cifar-beyond.jsonl"
"""Runs at rates beyond the grid, from which nothing is chosen: whether its ends are the best."""
BEGIN, END = "<!-- made by `python -m bench.cifar page`: begin -->", "<!-- end -->"


class Group(NamedTuple):
    """A table and a picture of arms, beside what they are compared with."""

    about: str
    beside: list[str]
    arms: list[str]


GROUPS = {
    "cifar": Group(
        "The ways of training, GPD with its defaults:", ["alone", "gpd"], [n for n in MAIN if n not in ("alone", "gpd")]
    ),
    "cifar-losses": Group(
        "The weight of the distillation, and a softer target:", ["alone", "gpd", "dkd-gpd", "finetune"], [*LOSSES]
    ),
    "cifar-ablation": Group(
        "Ratio, branches, sharing and shares, at the published weight of 3:", ["alone", "gpd-strong"], [*ABLATION]
    ),
}
"""By the name of the picture."""


def render(records: Records, beyond: Records = ()) -> str:
    """The text between the markers; runs `beyond` the grid stand only among the learning rates."""
    parts: list[str] = []
    for picture, (about, beside, arms) in _shown(records).items():
        parts += [f"{about}\n", markdown(COLUMNS, rows_of(records, beside + arms))]
        parts.append(f"![accuracies and gaps]({picture}.svg)\n")
    parts.append("Accuracy on held-out images, by peak learning rate:\n")
    every = [*records, *beyond]
    parts.append(markdown(*rates_of(every)))
    hours = sum(r["wall"] for r in every if "wall" in r) / 3600
    parts.append(f"{len(every)} runs took {hours:.1f} hours of one thread.\n")
    return "\n".join(parts)


def _shown(records: Records) -> dict[str, Group]:
    """The groups of which there is more than what they are compared with."""
    return {picture: group for picture, group in GROUPS.items() if rows_of(records, group.arms)}


def renewed(page: str, records: Records, beyond: Records = ()) -> str:
    """The page with the text between its markers made anew.

    Raises:
        SystemExit: the page has no markers.
    """
    try:
        return put(page, render(records, beyond).removesuffix("\n"), BEGIN, END, str(PAGE))
    except ValueError as error:
        raise SystemExit(str(error)) from None


def write(records: Records, beyond: Records) -> None:
    """Renew the page and its pictures."""
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), records, beyond), encoding="utf-8")
    for picture, group in _shown(records).items():
        draw(records, group.beside + group.arms, PAGE.with_name(f"{picture}.svg"))
