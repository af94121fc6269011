"""The cost model: which branches are composed into their kernel, and which run apart, for inputs of a given size.

For a product branch with K (g, o, c, *k) and P (g, c, i), in multiply-adds forward:

    composed    g·o·c·i·k²                                         whatever the batch; the student's slice comes with it
    apart       positions in · g·c·i + positions out · g·o·c·k²    and the student's own product, at its size

Running apart also costs the traffic of the channels between, of a second output and of a second weight, and a few more
calls. Backward is twice the forward in either form. So branches of early layers are composed, and wide ones of late
layers, at small batch or resolution, run apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from gpd_fx.plan.parameter_plan import ParamPlan

# In multiply-adds of the composition, measured on a CPU, forward and backward together.
CONV = 0.84
"""One multiply-add of a conv or linear op."""
STUDENT = 1.4
"""One multiply-add of the student's own product."""
WEIGHT = 210.0
"""One element of the second weight, which conv libraries bring into an order of their own at every call."""
TRAFFIC = 28.0
"""One activation that is written and read again."""
CALLS = 5.6e6
"""The calls that running apart adds."""


@dataclass(frozen=True)
class Use:
    """One op that uses a weight: over how many positions (samples times pixels) it goes, and how many it makes."""

    positions_in: int
    positions_out: int

    @staticmethod
    def of(given: Sequence[int], made: Sequence[int], layer: ProductSizes) -> Use:
        """From the shapes of an op's input and output."""
        return Use(prod(given) // (layer.groups * layer.inputs), prod(made) // (layer.groups * layer.outputs))


@dataclass(frozen=True)
class ProductSizes:
    """The sizes of a product branch: those of a group but `groups`, and the student's."""

    groups: int
    outputs: int
    inner: int
    inputs: int
    taps: int
    student: tuple[int, int, int]  # groups, outputs and inputs of a group

    @staticmethod
    def of(plan: ParamPlan, inner: int) -> ProductSizes:
        """The branch with `inner` channels of a parameter that is not transposed."""
        assert plan.kernel is not None
        groups, outputs, inputs, *kernel = plan.kernel.canonical_shape(plan.wide_shape)
        count = plan.kernel.student_groups
        return ProductSizes(
            groups, outputs, inner, inputs, prod(kernel), (count, plan.shape[0] // count, plan.shape[1])
        )

    def composed(self) -> float:
        """The cost of composing it."""
        return self.groups * self.outputs * self.inner * self.inputs * self.taps

    def apart(self, uses: Sequence[Use]) -> float:
        """The cost of running it apart wherever its weight is used."""
        groups, outputs, inputs = self.student
        total = STUDENT * groups * outputs * self.inner * inputs * self.taps
        weight = self.groups * self.inner * (self.inputs + self.outputs * self.taps)
        for use in uses:
            first = use.positions_out if self.taps == 1 else use.positions_in
            hidden, made = first * self.groups * self.inner, use.positions_out * self.groups * self.outputs
            total += CONV * (hidden * self.inputs + made * self.inner * self.taps)
            total += TRAFFIC * (hidden + made) + WEIGHT * weight + CALLS
        return total


@dataclass(frozen=True)
class Choice:
    """How one branch runs, and why.

    Attributes:
        parameter: the student's name of the weight.
        branch: name of the branch.
        composed: cost of composing it into the kernel, in multiply-adds.
        apart: cost of running it as two ops, likewise; None where it cannot.
        runs: "composed" or "apart".
        reason: in words.
    """

    parameter: str
    branch: str
    composed: float
    apart: float | None
    runs: str
    reason: str

    @staticmethod
    def cheaper(parameter: str, branch: str, product: ProductSizes, uses: Sequence[Use]) -> Choice:
        """The cheaper way."""
        composed, apart = product.composed(), product.apart(uses)
        runs = "apart" if apart < composed else "composed"
        positions = sum(use.positions_out for use in uses)
        factor = max(composed, apart) / max(min(composed, apart), 1.0)
        reason = f"{factor:.2g} times cheaper over {positions:,} positions"
        return Choice(parameter, branch, composed, apart, runs, reason)


@dataclass(frozen=True)
class BranchSchedule:
    """What `DynamicTeacher.schedule` chose, one row a branch that is a product of two kernels."""

    choices: tuple[Choice, ...]

    @property
    def apart(self) -> tuple[tuple[str, str], ...]:
        """The branches that run apart, as (parameter, branch)."""
        return tuple((choice.parameter, choice.branch) for choice in self.choices if choice.runs == "apart")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"choices": [asdict(choice) for choice in self.choices]}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("parameter", "branch", "composed", "apart", "runs", "reason")]
        for c in self.choices:
            apart = "" if c.apart is None else f"{c.apart / 1e6:,.1f} M"
            rows.append((c.parameter, c.branch, f"{c.composed / 1e6:,.1f} M", apart, c.runs, c.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{len(self.apart)} of {len(self.choices)} product branches run apart; costs in multiply-adds"]
        for row in rows:
            cells = [
                cell.rjust(width) if number in (2, 3) else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)
