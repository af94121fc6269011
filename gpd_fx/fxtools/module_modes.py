"""Modes of a module's parts: while a module trains, some of its parts may stay in eval mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def frozen_parts(module: nn.Module) -> tuple[str, ...]:
    """The paths of submodules that are in eval mode while the module itself is in train mode."""
    return tuple(path for path, part in module.named_modules() if module.training and not part.training)


def set_mode(module: nn.Module, training: bool, frozen: Sequence[str] = ()) -> None:
    """Put a module into a mode by its own `train`, and keep the submodules at the paths `frozen` in eval mode."""
    module.train(training)
    for path in frozen:
        module.get_submodule(path).training = False
