"""How fast all arms train: SGD's learning rate over the steps, and what is decayed.

The learning rate rises linearly over the warm-up and falls to zero along a half cosine. Parameters with fewer than two
dimensions (norms, biases, branch scales) are not decayed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from gpd_fx.errors import ArgumentError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the data.
        learning_rate: the highest value, reached after the warm-up.
        momentum: of SGD (Nesterov).
        weight_decay: for parameters with two or more dimensions.
        warmup: share of all steps during which the learning rate rises.
    """

    epochs: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.1

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value that cannot work, by name.
        """
        if self.epochs < 1:
            raise ArgumentError(f"Schedule(epochs={self.epochs!r}) must be 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ArgumentError(f"Schedule(learning_rate={self.learning_rate!r}) must be a finite number above 0")
        if not 0 < self.momentum < 1:
            raise ArgumentError(f"Schedule(momentum={self.momentum!r}) must lie between 0 and 1 (Nesterov needs it)")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ArgumentError(f"Schedule(weight_decay={self.weight_decay!r}) must be a finite number, 0 or more")
        if not 0 <= self.warmup < 1:
            raise ArgumentError(f"Schedule(warmup={self.warmup!r}) must be at least 0 and below 1")

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of `step` (from 0) out of `steps`, as a share of the highest."""
        rising = self.warmup * steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, steps - rising))))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: weight decay for two and more dimensions, none for the others."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.dim() < 2], "weight_decay": 0.0},
    ]
