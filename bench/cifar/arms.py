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
ABLATION = {
    "gpd-1.5": Arm("GPD, ratio 1.5", 1.5),
    "gpd-3": Arm("GPD, ratio 3", 3.0),
    "gpd-4": Arm("GPD, ratio 4", 4.0),
    "gpd-plain": Arm("GPD without branches", 2.0, None),
    "gpd-equal": Arm("GPD, equal alpha", 2.0, equal=True),
    "gpd-apart": Arm("GPD, nothing shared", 2.0, shared=False),
}
LOSSES = {
    "gpd-light": Arm("GPD, distillation weight 1", 2.0, loss={"distill_weight": 1.0}),
    "gpd-hot": Arm("GPD, temperature 4, no smoothing", 2.0, loss={"temperature": 4.0, "smoothing": 0.0}),
}
ARMS = MAIN | ABLATION | LOSSES
