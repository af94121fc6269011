"""The expansion report: what widened, what did not and why, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpd_fx.report.graph_picture import boxes
from gpd_fx.report.report_data import ReportData
from gpd_fx.report.svg import draw
from gpd_fx.report.text import markdown, text


@dataclass(frozen=True)
class ExpansionReport(ReportData):
    """What an expansion did.

    The fields are those of `ReportData`, which says what they hold; `str()` is a table.
    """

    def to_markdown(self) -> str:
        """The report as a Markdown page."""
        return markdown(self)

    def to_svg(self, depth: int | None = None) -> str:
        """A picture of the graph: what is widened, what is frozen and why, as the text of an SVG file.

        Args:
            depth: how many levels of modules to open; beyond the deepest every op is drawn by itself. None opens as
                many as can be read on one page.
        """
        ratio = self.ratio if isinstance(self.ratio, Mapping) else f"{self.ratio:g}"
        factor = self.teacher_parameters / max(self.student_parameters, 1)
        about = (
            f"coverage {self.coverage:.4f}; {self.student_parameters:,} parameters become {self.teacher_parameters:,} "
            f"(x{factor:.2f}), branches apart; eval mode"
        )
        return draw(boxes(self.graph, depth), f"{self.model}, ratio {ratio}", about)

    def __str__(self) -> str:
        return text(self)
