"""What widening did to each tensor of a graph, as data that can be saved: all that folding needs beside the graph.

A file is safetensors with JSON in its header; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gpd_fx.errors import CheckpointError
from gpd_fx.io.files import output_path, publish, staging
from gpd_fx.plan.parameter_plan import ParamPlan

_KEY: Final = "gpd_fx_plan"
_FORMAT: Final = 1
_FIELDS: Final = ("gather", "keep", "alpha")


@dataclass(frozen=True, eq=False)
class WideningPlan:
    """The widening of every parameter and buffer of a graph.

    Attributes:
        tensors: by canonical name, how the tensor was widened. `gather` and `keep` are int64, `alpha` is float64.
        names: the canonical name of every attribute that the graph reads; tied tensors have one name.

    Example:
        >>> wide = gpd_fx.passes.Widen(2.0)(graph).graph_module
        >>> gpd_fx.passes.plan_of(wide).save("plan.safetensors")
        >>> plan = gpd_fx.passes.WideningPlan.load("plan.safetensors")   # in another process
        >>> gpd_fx.passes.Fold(plan, graph)(wide).graph_module
    """

    tensors: Mapping[str, ParamPlan]
    names: Mapping[str, str]

    @property
    def widens(self) -> bool:
        """Whether any tensor has a widened dimension."""
        return any(index is not None for plan in self.tensors.values() for index in plan.gather)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file; an interruption leaves an older file there as it was.

        Raises:
            ArgumentError: `path` cannot be written.
        """
        target = output_path(path)
        vectors: dict[str, Tensor] = {}
        for number, plan in enumerate(self.tensors.values()):
            for field in _FIELDS:
                for dim, vector in enumerate(getattr(plan, field)):
                    if vector is not None:
                        vectors[f"{number}.{field}.{dim}"] = vector.detach().cpu().clone()
        shapes = [[name, list(plan.shape)] for name, plan in self.tensors.items()]
        header = json.dumps({"format": _FORMAT, "tensors": shapes, "names": dict(self.names)})
        with staging(target) as folder:
            file = folder / target.name
            safetensors.torch.save_file(vectors, file, metadata={_KEY: header})
            publish(file, target)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> WideningPlan:
        """Read a plan that `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, not written by `save`, or written by a newer version.
        """
        source = Path(path)
        try:
            with safetensors.safe_open(source, "pt") as file:  # pyright: ignore[reportPrivateImportUsage, reportUnknownVariableType]  a class of the compiled part, which has no types
                header: Any = json.loads((file.metadata() or {}).get(_KEY, "null"))
                vectors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  a file, not a dict
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{str(source)!r} is no plan that can be read: {error}; save it again") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{str(source)!r} holds no plan; give a file that WideningPlan.save wrote")
        if header.get("format") != _FORMAT:
            raise CheckpointError(
                f"{str(source)!r} has the format {header.get('format')!r}, this version reads {_FORMAT}; save it again "
                "with this version of gpd_fx"
            )
        try:
            tensors: dict[str, ParamPlan] = {}
            for number, (name, shape) in enumerate(header["tensors"]):
                gather, keep, alpha = _fields(vectors, number, shape)
                tensors[name] = ParamPlan(name, tuple(shape), gather, keep, alpha)
            return WideningPlan(tensors, dict(header["names"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{str(source)!r} is a damaged plan ({error}); save it again") from error


def _fields(vectors: Mapping[str, Tensor], number: int, shape: list[int]) -> list[tuple[Tensor | None, ...]]:
    """The fields of one tensor's plan, checked against its shape."""
    fields = [tuple(vectors.get(f"{number}.{field}.{dim}") for dim in range(len(shape))) for field in _FIELDS]
    for size, gather, keep, alpha in zip(shape, *fields, strict=True):
        if gather is None:
            continue
        if keep is None or not torch.equal(gather[keep], torch.arange(size)):
            raise ValueError("a copy does not lead back to its channel")
        if alpha is not None and alpha.shape != gather.shape:
            raise ValueError("shares and copies differ in number")
    return fields
