"""The checkpoints of a run: what each holds besides the state, and which one a run is taken up from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from gpd_fx.api.checkpoint import plan_digest
from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.state.snapshot import checkpoint_path, checkpoints, prune, read_state, write_state
from gpd_fx.errors import CheckpointError
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher

# What may be changed when a run is taken up again, since no result depends on it.
_FREE: Final = {
    "data", "download", "workers", "keep", "checkpoint_every", "evaluate_every", "log_every", "onnx", "recalibrate",
    "device", "static_compile", "student_weights", "static_weights", "test_batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class Store:
    """The folder of a run's checkpoints.

    Attributes:
        folder: of the checkpoints.
        config: a completed configuration.
        plan: a digest of how the model widens; None for a student alone.
    """

    folder: Path
    config: DistillConfig
    plan: str | None

    @classmethod
    def of(cls, folder: Path, config: DistillConfig, model: nn.Module) -> Store:
        """The store of the run in a folder."""
        plan = plan_digest(model.composition.plans) if isinstance(model, DynamicTeacher) else None
        return cls(folder / "checkpoints", config, plan)

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint."""
        found = checkpoints(self.folder)
        return found[-1] if found else None

    def path(self, update: int) -> Path:
        """The file of the state after so many updates."""
        return checkpoint_path(self.folder, update)

    def write(self, update: int, state: Mapping[str, Any]) -> None:
        """Write a state to its file, whole or not at all, and remove old ones."""
        write_state(self.path(update), {"config": self.config.to_dict(), "plan": self.plan, **state})
        prune(self.folder, self.config.keep)

    def read(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint.

        Raises:
            CheckpointError: the checkpoint is of another model or another run.
        """
        state, mine = read_state(path), self.config.to_dict()
        changed = sorted(
            name for name, value in state["config"].items() if name not in _FREE and mine.get(name, value) != value
        )
        if changed:
            raise CheckpointError(
                f"{str(path)!r} was written with other values of {', '.join(changed)}; put them back, or begin a new "
                "run"
            )
        if state["plan"] != self.plan:
            raise CheckpointError(f"{str(path)!r}: this model widens in another way here; use the same versions")
        return state
