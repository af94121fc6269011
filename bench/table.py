"""The performance table of the README, from `bench/results/*.json`: `python -m bench table`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import markdown
from bench.everything import RESULTS
from bench.measure import Row
from bench.section import Results, Section
from bench.step import COMPILED

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by `python -m bench table`: begin -->", "<!-- end -->"


def render(files: dict[str, Results]) -> str:
    """The text between the markers, from results by the name of their file."""
    parts = [_device(results) for _, results in sorted(files.items()) if results.sections]
    return "\n\n".join(parts)


def _device(results: Results) -> str:
    machine = results.sections[0].machine
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}" if machine["clock"] != "wall" else ""
    torch = " and ".join(sorted({section.machine["torch"] for section in results.sections}))
    lines = [f"**{machine['device']}**{threads}, torch {torch}; medians of {machine['clock']} time"]
    for kind, table in (("step", _steps), ("compose", _compositions), ("onnx", _files), ("expand", _expansions)):
        sections = [section for section in results.sections if section.kind == kind]
        lines += ["", *table(sections)] if sections else []
    return "\n".join(lines)


def _model(section: Section) -> str:
    return str(section.options["model"]).partition(":")[2]


def _branches(options: dict[str, Any]) -> str:
    if options["branches"] == "orepa":
        return "default"
    return "full inner width" if "1x1-kxk:full" in options["branches"] else str(options["branches"])


def _ratio(section: Section, name: str) -> str:
    row = section.row(name)
    return "" if row is None or row.ratio is None else f"{row.ratio:.2f}"


def _steps(sections: Sequence[Section]) -> list[str]:
    rows: list[list[str]] = []
    for section in sections:
        options = section.options
        size = f"{options['batch']}, {options['resolution']}x{options['resolution']}"
        how = (options["amp"] or "float32") + ", channels-last" * options["channels_last"]
        for suffix in ("", COMPILED):
            plain, ours = section.row(f"plain{suffix}"), section.row(f"gpd_fx{suffix}")
            if plain is None or plain.median is None:
                continue
            copies = "" if ours is None else _number(ours, "copies over plain", "+{:.1f}")
            case = [_model(section), _branches(options), size, how + ", compiled" * bool(suffix)]
            times = [f"{1000 * plain.median:.0f} ms", *(_ratio(section, n + suffix) for n in ("gpd_fx", "einsum"))]
            rows.append([*case, *times, _ratio(section, "convs") if not suffix else "", copies])
    head = ["training step", "branches", "batch", "", "plain", "**gpd_fx**", "einsum", "convs", "memory"]
    return markdown.table(head, rows)


def _number(row: Row, key: str, form: str) -> str:
    return form.format(row.figures[key]) if key in row.figures else ""


def _compositions(sections: Sequence[Section]) -> list[str]:
    rows: list[list[str]] = []
    for section in sections:
        for how in ("grouped", "grouped as a CUDA graph"):
            ours = section.row(f"{how}, both")
            if ours is None or ours.median is None or ours.ratio is None:
                continue
            name = f"{_model(section)}{', as a CUDA graph' * (how != 'grouped')}"
            figures = [_number(ours, "share", "{:.2f}"), _number(ours, "kernels", "{:.0f}")]
            rows.append(
                [name, _branches(section.options), f"{1000 * ours.median:.3g} ms", f"{1 / ours.ratio:.1f}", *figures]
            )
    head = ["composition, forward and backward", "branches", "time", "faster than einsum", "share of a copy", "kernels"]
    return markdown.table(head, rows)


def _files(sections: Sequence[Section]) -> list[str]:
    rows: list[list[str]] = []
    for section in sections:
        first, second = section.row("original"), section.row("student")
        if first is None or second is None:
            continue
        ratios = [f"{second.figures[key] / first.figures[key]:.3f}" for key in ("nodes", "bytes")]
        rows.append([_model(section), *ratios, _ratio(section, "student")])
    return markdown.table(["student's ONNX file, over the original's", "nodes", "bytes", "latency"], rows)


def _expansions(sections: Sequence[Section]) -> list[str]:
    rows: list[list[str]] = []
    for section in sections:
        first, second = section.row("two captures"), section.row("expand")
        if first is not None and second is not None and second.median is not None:
            rows.append([_model(section), f"{second.median:.1f} s", _ratio(section, "expand")])
    return markdown.table(["expand, over the two captures it needs", "time", "ratio"], rows)


def put(readme: str, text: str) -> str:
    """The README with the text between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    return markdown.put(readme, text, BEGIN, END, "the README")


def load_all(folder: Path = RESULTS) -> dict[str, Results]:
    """Every file of results."""
    return {path.name: Results.load(path) for path in sorted(folder.glob("*.json"))}


def main(
    readme: Annotated[Path, typer.Option(help="The file with the markers.")] = README,
    folder: Annotated[Path, typer.Option(help="Where the results lie.")] = RESULTS,
) -> None:
    """Write the README's table."""
    text = readme.read_text(encoding="utf-8")
    readme.write_text(put(text, render(load_all(folder))), encoding="utf-8")
