"""The arms of the comparison: what each trains, and with which losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        ratio: of the dynamic teacher; None: there is none.
        branches: what `expand` takes.
        static: the loss from the static teacher, "kd" or "dkd"; None: there is none.
        start: "scratch", or "trained": from a student that was trained alone.
        shared: whether teacher and student share their parameters; if not, the teacher is a network beside it.
        equal: whether all copies of a channel have the same share of it.
        against: the arm that this one is compared with, seed by seed; empty: none.
        loss: what `GPDLoss` takes otherwise than by default.
    """

    title: str
    ratio: float | None = None
    branches: str | None = "orepa"
    static: str | None = None
    start: str = "scratch"
    shared: bool = True
    equal: bool = False
    against: str = "alone"
    loss: Mapping[str, Any] = field(default_factory=dict[str, Any])


MAIN = {
    "alone": Arm("student alone", against=""),
    "kd": Arm("KD from a static teacher", static="kd"),
    "dkd": Arm("DKD from a static teacher", static="dkd"),
    "gpd": Arm("GPD, no static teacher", 2.0),
    "dkd-gpd": Arm("DKD and GPD", 2.0, static="dkd", against="dkd"),
    "longer": Arm("trained again, alone", start="trained"),
    "finetune": Arm("trained again, with GPD", 2.0, start="trained", against="longer"),
}
STRONG = {"distill_weight": 3.0}
"""As the method was published; `GPDLoss` has 1 by default."""
LOSSES = {
    "gpd-free": Arm("GPD, weight 0: no distillation", 2.0, loss={"distill_weight": 0.0}),
    "gpd-faint": Arm("GPD, weight 0.3", 2.0, loss={"distill_weight": 0.3}),
    "gpd-strong": Arm("GPD, weight 3", 2.0, loss=STRONG),
    "gpd-hot": Arm(
        "GPD, weight 3, temperature 4, no smoothing", 2.0, loss=STRONG | {"temperature": 4.0, "smoothing": 0.0}
    ),
    "dkd-gpd-strong": Arm("DKD and GPD, weight 3", 2.0, static="dkd", against="dkd", loss=STRONG),
    "finetune-strong": Arm("trained again, with GPD, weight 3", 2.0, start="trained", against="longer", loss=STRONG),
}
ABLATION = {
    "gpd-1.5": Arm("GPD, weight 3, ratio 1.5", 1.5, loss=STRONG),
    "gpd-3": Arm("GPD, weight 3, ratio 3", 3.0, loss=STRONG),
    "gpd-4": Arm("GPD, weight 3, ratio 4", 4.0, loss=STRONG),
    "gpd-plain": Arm("GPD, weight 3, without branches", 2.0, None, loss=STRONG),
    "gpd-equal": Arm("GPD, weight 3, equal alpha", 2.0, equal=True, loss=STRONG),
    "gpd-apart": Arm("GPD, weight 3, nothing shared", 2.0, shared=False, loss=STRONG),
}
ARMS = MAIN | LOSSES | ABLATION
