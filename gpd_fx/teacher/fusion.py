"""What became of the depthwise convs of the wide graphs that were to run as one op with their batch norms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Fused:
    """A depthwise conv in the graph of a mode, whether it is one op with its batch norm, and why not.

    Attributes:
        parameter: the student's name of the kernel.
        mode: "train" or "eval".
        runs: "fused" or "apart".
        reason: in words.
    """

    parameter: str
    mode: str
    runs: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What `DynamicTeacher.fuse` did, one row a depthwise conv and mode."""

    rows: tuple[Fused, ...]

    @property
    def fused(self) -> tuple[tuple[str, str], ...]:
        """What was fused, as (mode, parameter)."""
        return tuple((row.mode, row.parameter) for row in self.rows if row.runs == "fused")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        table = [("parameter", "mode", "runs", "reason"), *((r.parameter, r.mode, r.runs, r.reason) for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{len(self.fused)} of {len(self.rows)} depthwise convs run as one op with their batch norm"]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join(lines)


def synchronised(module: nn.Module) -> set[str]:
    """The names of parameters and buffers of batch norms that may take their statistics over several processes."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, nn.SyncBatchNorm)
        for name in (*part._parameters, *part._buffers)  # pyright: ignore[reportPrivateUsage]  places that are empty too
    }
