"""The expansion report as plain text and as Markdown. What is alike but for numbers in its name shares a line."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gpd_fx.fxtools.name_patterns import pattern, some, span
from gpd_fx.report.report_data import Block, ReportData

T = TypeVar("T")
_NOTES = 2  # of one kind that are written out


@dataclass(frozen=True)
class _Line:
    """Alike channel groups of alike blocks."""

    channels: str
    count: int
    parameters: int
    flops: int
    names: str


def text(report: ReportData) -> str:
    """The report for a terminal."""
    teacher = report.teacher_parameters + report.branch_parameters
    lines = [
        f"Expansion of {report.model}, ratio {report.ratio}",
        "",
        f"{'':14}{'student':>16}{'dynamic teacher':>18}{'factor':>9}",
        f"{'parameters':14}{report.student_parameters:>16,}{teacher:>18,}"
        f"{_factor(teacher, report.student_parameters):>9}",
        f"{'  of branches':14}{'':>16}{report.branch_parameters:>18,}",
        f"{'FLOPs a sample':14}{report.student_flops:>16,}{report.teacher_flops:>18,}"
        f"{_factor(report.teacher_flops, report.student_flops):>9}",
        "",
        f"coverage {report.coverage:.4f} of the student's parameters lie on a widened axis",
        "verification " + _verified(report),
    ]
    blocks = report.blocks()
    if blocks:
        lines += ["", f"{_widened(report, blocks)}; alike ones share a line"]
        lines += [
            f"  {'channels':>16}{'groups':>8}{'parameters':>14}{'FLOPs':>18}  block, and where its channels are made"
        ]
        for _, title, rows in _entries(blocks):
            lines.append(f"  {'':>56}  {title}")
            for row in rows:
                cost = f"{f'+{row.parameters:,}':>14}{f'+{row.flops:,}':>18}"
                lines.append(f"  {row.channels:>16}{row.count:>8}{cost}    {row.names}")
    if report.frozen:
        lines += ["", "not widened", f"  {'unwidened parameters':>20}  op, node and reason"]
        for cost, where, reason, names in _frozen(report):
            lines += [f"  {cost:>20,}  {where}: {reason}", f"  {'':>20}    {names}"]
    skipped = _skipped(report)
    if skipped:
        lines += ["", "branches left out", *(f"  {kind}: {reason} ({names})" for kind, reason, names in skipped)]
    left = _left_by_kernels(report)
    if left:
        lines += ["", "left to torch's ops by the Triton kernels", *(f"  {reason} ({names})" for reason, names in left)]
    return "\n".join([*lines, *(f"\nnote: {note}" for note in _notes(report))])


def markdown(report: ReportData) -> str:
    """The report as a Markdown page."""
    teacher = report.teacher_parameters + report.branch_parameters
    counts = [
        ("parameters", report.student_parameters, teacher),
        ("FLOPs a sample", report.student_flops, report.teacher_flops),
    ]
    lines = [
        f"# Expansion of {_escape(report.model)}",
        "",
        f"Ratio {_code(str(report.ratio))}. Coverage {report.coverage:.4f}: the share of the student's parameters that "
        f"lie on a widened axis. Verification: {_verified(report)}.",
        *_table(
            ["", "student", "dynamic teacher", "factor"],
            [[name, f"{small:,}", f"{big:,}", _factor(big, small)] for name, small, big in counts],
        ),
    ]
    if report.branch_parameters:
        lines += ["", f"{report.branch_parameters:,} of the teacher's parameters are those of branches."]
    blocks = report.blocks()
    if blocks:
        rows: list[list[str]] = []
        for path, title, entry in _entries(blocks):
            for k, row in enumerate(entry):
                place = "" if k else _code(title) if path else title
                cost = [f"+{row.parameters:,}", f"+{row.flops:,}"]
                rows.append([place, row.channels, f"{row.count}", *cost, _code(row.names)])
        head = ["block", "channels", "groups", "parameters", "FLOPs", "made in"]
        lines += ["", "## Widened", "", f"{_widened(report, blocks)}; alike ones share a line."]
        lines += _table(head, rows, left=(0, 5))
    if report.frozen:
        rows = [
            [f"{cost:,}", _code(where), _escape(reason), _code(names)] for cost, where, reason, names in _frozen(report)
        ]
        lines += [
            "",
            "## Not widened",
            *_table(["parameters", "op and node", "reason", "channels"], rows, left=(1, 2, 3)),
        ]
    skipped = _skipped(report)
    if skipped:
        rows = [[_code(kind), _escape(reason), _code(names)] for kind, reason, names in skipped]
        lines += ["", "## Branches left out", *_table(["branch", "reason", "parameters"], rows, left=(0, 1, 2))]
    left = _left_by_kernels(report)
    if left:
        rows = [[_escape(reason), _code(names)] for reason, names in left]
        lines += ["", "## Left to torch's ops by the Triton kernels"]
        lines += _table(["reason", "parameters"], rows, left=(0, 1))
    notes = _notes(report)
    if notes:
        lines += ["", "## Notes", "", *(f"- {_escape(note)}" for note in notes)]
    return "\n".join([*lines, ""])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    rule = ["---" if k in left else "---:" for k in range(len(head))]
    return ["", *("| " + " | ".join(row) + " |" for row in (head, rule, *rows))]


def _escape(words: str) -> str:
    """Words as Markdown that shows them as they are, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&$])", r"\\\1", " ".join(words.split()))


def _code(words: str) -> str:
    """Words as a code span, in a table too."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    inner = " ".join(words.split()).replace("|", "\\|")
    return f"{fence} {inner} {fence}" if len(fence) > 1 else f"`{inner}`"


def _verified(report: ReportData) -> str:
    return "not run" if report.max_error is None else f"max relative error {report.max_error:.1e}"


def _widened(report: ReportData, blocks: Sequence[Block]) -> str:
    groups, places = len(report.groups), len(blocks)
    return f"{groups} widened channel group{'s' * (groups != 1)} in {places} block{'s' * (places != 1)}"


def _entries(blocks: Sequence[Block]) -> list[tuple[str, str, list[_Line]]]:
    """Blocks that differ by number only: a path of one, their names, and their groups."""

    def key(block: Block) -> Hashable:
        return pattern(block.path), *((pattern(g.name), g.channels, g.wide) for g in block.groups)

    found: list[tuple[str, str, list[_Line]]] = []
    for alike in _alike(blocks, key):
        count = f", {len(alike)} blocks" if len(alike) > 1 else ""
        title = span([block.path for block in alike]) + count if alike[0].path else "the whole model"
        rows: list[_Line] = []
        groups = [(group, len(block.path)) for block in alike for group in block.groups]
        for same in _alike(groups, lambda item: (pattern(item[0].name), item[0].channels, item[0].wide)):
            names = [g.name[at + 1 :] if at and g.name[:at] == g.block else g.name for g, at in same]
            first = same[0][0]
            cost = sum(g.added_parameters for g, _ in same), sum(g.added_flops for g, _ in same)
            rows.append(_Line(f"{first.channels} -> {first.wide}", len(same), *cost, span(names)))
        found.append((alike[0].path, title, rows))
    return found


def _frozen(report: ReportData) -> list[tuple[int, str, str, str]]:
    """Cost, op and node, reason, and channels of what stays, the same ops and reasons together."""
    found: list[tuple[int, str, str, str]] = []
    for alike in _alike(report.frozen, lambda entry: (entry.op, re.sub(r"\d+", "*", entry.reason))):
        first, more = alike[0], len(alike) - 1
        where = f"{first.op} at {first.node}" + (f" and {more} node{'s' * (more > 1)} like it" if more else "")
        names = some([name for entry in alike for name in entry.channels])
        found.append((sum(entry.cost for entry in alike), where, first.reason, names))
    return found


def _skipped(report: ReportData) -> list[tuple[str, str, str]]:
    """Kind, reason and parameters of branches that do not fit."""
    entries = [(*why, name) for name, kinds in report.skipped.items() for why in kinds.items()]
    groups = _alike(entries, lambda entry: entry[:2])
    return [(*alike[0][:2], some([name for _, _, name in alike])) for alike in groups]


def _left_by_kernels(report: ReportData) -> list[tuple[str, str]]:
    """Reason and parameters of layers that the Triton kernels cannot take."""
    groups = _alike(report.left_by_kernels.items(), lambda entry: entry[1])
    return [(alike[0][1], some([name for name, _ in alike])) for alike in groups]


def _notes(report: ReportData) -> list[str]:
    """The notes, a few of each kind."""
    found: list[str] = []
    for alike in _alike(report.notes, lambda note: re.sub(r"\d+", "*", note)):
        more = len(alike) - _NOTES
        found += alike[:_NOTES]
        if more > 0:
            found[-1] += f" -- and {more} more note{'s' * (more > 1)} like this one, for other blocks"
    return found


def _alike(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def _factor(big: int, small: int) -> str:
    return f"x{big / small:.2f}" if small else "-"
