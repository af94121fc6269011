"""Writes the picture of an expansion as SVG: boxes, edges, a legend; the same text for the same picture."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from gpd_fx.report.graph_picture import STATES, Box
from gpd_fx.report.layered_layout import Layout, Point, arrange

_FILL = {
    "widened": "#d8f0d3",
    "closes": "#f3fbf1",
    "partly": "#fdf0c2",
    "mixed": "url(#mixed)",
    "frozen": "#d5e5f5",
    "plain": "#f4f4f4",
}
_STROKE = {
    "widened": "#4b9a46",
    "closes": "#4b9a46",
    "partly": "#c49a16",
    "mixed": "#3b78ad",
    "frozen": "#3b78ad",
    "plain": "#a3a3a3",
}
_STOP = "#b3261e"
_CHARS = 44  # that fit into a line of a box
_REASONS = 3  # lines of them in a box
_WIDTH, _MARGIN, _HEAD, _KEY = 300.0, 24.0, 62.0, 20.0
_TITLE, _LINE = 16.0, 14.0  # line heights in a box
_STYLE = (
    "text{font-family:ui-sans-serif,Helvetica,Arial,sans-serif;fill:#222}"
    ".n{font:bold 12px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
    ".l{font:10.5px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#444}"
    f".r{{font-size:10.5px;fill:#2f608a}}.x{{font-size:10.5px;fill:{_STOP}}}"
    ".e{fill:none;stroke-width:1.6}.k{font-size:12px}.t{font-size:18px;font-weight:bold}.s{font-size:12px;fill:#555}"
)


def draw(boxes: Sequence[Box], title: str, subtitle: str) -> str:
    """The picture as the text of an SVG file."""
    texts = [_texts(box) for box in boxes]
    sizes = [(_WIDTH, 12.0 + _TITLE + _LINE * (len(rows) - 1)) for rows in texts]
    edges = [(other, k) for k, box in enumerate(boxes) for other in box.edges]
    layout = arrange(sizes, edges)
    states = [state for state in STATES if any(box.state == state for box in boxes)]
    stops = any(box.stops for box in boxes)
    top = _MARGIN + _HEAD + _KEY * (len(states) + stops) + 12
    width = max(layout.width, 9.6 * len(title), 6.9 * len(subtitle), 440.0) + 2 * _MARGIN
    height = top + layout.height + _MARGIN
    shift = (width - layout.width) / 2
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" '
        f'height="{_n(height)}" role="img" aria-label="{_xml(title)}">',
        f"<title>{_xml(title)}</title>",
        f"<style>{_STYLE}</style>",
        "<defs>",
        '<pattern id="mixed" width="14" height="14" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="14" height="14" fill="{_FILL["widened"]}"/>'
        f'<rect width="7" height="14" fill="{_FILL["frozen"]}"/>'
        "</pattern>",
        *(
            f'<marker id="to-{state}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{_STROKE[state]}"/></marker>'
            for state in _FILL
        ),
        "</defs>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text class="t" x="{_n(_MARGIN)}" y="{_n(_MARGIN + 14)}">{_xml(title)}</text>',
        f'<text class="s" x="{_n(_MARGIN)}" y="{_n(_MARGIN + 36)}">{_xml(subtitle)}</text>',
        *_legend(states, stops),
        f'<g transform="translate({_n(shift)} {_n(top)})">',
    ]
    for k, box in enumerate(boxes):
        for other, state in box.edges.items():
            out.append(_edge(layout, sizes, other, k, state))
    for box, rows, size, centre in zip(boxes, texts, sizes, layout.centres, strict=True):
        out += _box(box, rows, size, centre)
    return "\n".join([*out, "</g>", "</svg>", ""])


def _legend(states: Sequence[str], stops: bool) -> list[str]:
    out: list[str] = []
    rows = [(_FILL[state], _STROKE[state], state == "closes", STATES[state]) for state in states]
    if stops:
        rows.append(("#fff", _STOP, False, "parameters stay as they are because of an op in it"))
    for k, (fill, stroke, dashed, words) in enumerate(rows):
        y = _MARGIN + _HEAD + _KEY * k
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        out.append(
            f'<rect x="{_n(_MARGIN)}" y="{_n(y - 10)}" width="22" height="13" rx="3" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="{2 if stroke == _STOP else 1.2}"{dash}/>'
            f'<text class="k" x="{_n(_MARGIN + 32)}" y="{_n(y + 1)}">{_xml(words)}</text>'
        )
    return out


def _texts(box: Box) -> list[tuple[str, str]]:
    """Class and words of each line of a box."""
    rows = [("n", _short(box.title, 37)), *(("l", _short(line, _CHARS)) for line in box.lines)]
    if box.reasons and (box.stops or box.state != "widened"):
        lines = [line for reason in box.reasons for line in textwrap.wrap(reason, 54)]
        if len(lines) > _REASONS:
            lines = [*lines[: _REASONS - 1], f"{lines[_REASONS - 1]} …"]
        rows += [("x" if box.stops else "r", line) for line in lines]
    return rows


def _short(words: str, limit: int) -> str:
    if len(words) <= limit:
        return words
    half = (limit - 1) // 2
    return f"{words[: limit - 1 - half]}…{words[-half:]}"


def _box(box: Box, rows: Sequence[tuple[str, str]], size: tuple[float, float], centre: Point) -> list[str]:
    (width, height), (x, y) = size, centre
    left, top = x - width / 2, y - height / 2
    stroke = _STOP if box.stops else _STROKE[box.state]
    dash = ' stroke-dasharray="4 3"' if box.state == "closes" and not box.stops else ""
    about = "\n".join([box.title, *box.lines, STATES[box.state], *box.reasons])
    out = [
        "<g>",
        f"<title>{_xml(about)}</title>",
        f'<rect x="{_n(left)}" y="{_n(top)}" width="{_n(width)}" height="{_n(height)}" rx="6" '
        f'fill="{_FILL[box.state]}" stroke="{stroke}" stroke-width="{2 if box.stops else 1.2}"{dash}/>',
    ]
    at = top + 6
    for kind, words in rows:
        at += _TITLE if kind == "n" else _LINE
        out.append(f'<text class="{kind}" x="{_n(left + 10)}" y="{_n(at - 4)}">{_xml(words)}</text>')
    return [*out, "</g>"]


def _edge(layout: Layout, sizes: Sequence[tuple[float, float]], a: int, b: int, state: str) -> str:
    lanes = layout.lanes[a, b]
    (ax, ay), (bx, by) = layout.centres[a], layout.centres[b]
    start = _port(ax, sizes[a][0], lanes[0][0] if lanes else bx), ay + sizes[a][1] / 2
    end = _port(bx, sizes[b][0], lanes[-1][0] if lanes else ax), by - sizes[b][1] / 2
    points = [start, *lanes, end]
    path = f"M{_n(start[0])} {_n(start[1])}"
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        straight = abs(x0 - x1) < 0.05
        path += f"V{_n(y1)}" if straight else f"C{_n(x0)} {_n(middle)} {_n(x1)} {_n(middle)} {_n(x1)} {_n(y1)}"
    return f'<path class="e" d="{path}" stroke="{_STROKE[state]}" marker-end="url(#to-{state})"/>'


def _port(x: float, width: float, towards: float) -> float:
    """Where an edge leaves or enters a box: as near to where it goes as the box is wide."""
    reach = width / 2 - 14
    return min(max(towards, x - reach), x + reach)


def _n(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _xml(words: str) -> str:
    """Words as XML, without the characters that it cannot hold."""
    return escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", words))
