"""The state of a run in one file: tensors as safetensors, everything else as JSON in its header.

A state is a tree of dicts, lists and tuples with tensors, numbers, texts and None in it. Nothing is pickled, floats
keep every bit, and a file appears whole or not at all, so that a run that is killed finds the last whole one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from gpd_fx.errors import CheckpointError
from gpd_fx.io.files import publish, staging

_KEY: Final = "gpd_fx.distill"
_FORMAT: Final = 1
_NAME: Final = re.compile(r"update-(\d{9})\.safetensors")


def write_state(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree to `path`, whole or not at all.

    Raises:
        CheckpointError: the tree holds something that neither JSON nor safetensors holds.
    """
    tensors: dict[str, Tensor] = {}
    header = {_KEY: json.dumps({"format": _FORMAT, "tree": _encode(tree, tensors, "")})}
    with staging(path) as folder:
        draft = folder / path.name
        safetensors.torch.save_file(tensors, draft, metadata=header)
        publish(draft, path)
    _flush(path.parent)


def read_state(path: Path) -> dict[str, Any]:
    """The tree in a file that `write_state` wrote, with its tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, not written by `write_state`, or by a newer version.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = cast("dict[str, str]", file.metadata() or {})
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as a checkpoint of a run ({error})") from error
    if _KEY not in header:
        raise CheckpointError(f"{str(path)!r} is no checkpoint of a run; `gpd-fx distill` writes these")
    content = json.loads(header[_KEY])
    if content["format"] > _FORMAT:
        raise CheckpointError(f"{str(path)!r} has format {content['format']}; this version reads up to {_FORMAT}")
    return _decode(content["tree"], tensors)


def checkpoint_path(folder: Path, update: int) -> Path:
    """The file of the state after a number of updates."""
    return folder / f"update-{update:09d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what interrupted writes have left."""
    for path in checkpoints(folder)[:-keep]:
        path.unlink()
    for path in folder.glob(".update-*"):
        shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Make the names in a folder survive a loss of power, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        return _encode(value.item(), tensors, path)
    if isinstance(value, int | float):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return {"dict": [[_key(key, path), _encode(item, tensors, f"{path}/{key}")] for key, item in pairs]}
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, tensors, f"{path}/{number}") for number, item in enumerate(items)]}
    raise CheckpointError(
        f"{path} in the state of the run is a {type(value).__name__}, which a checkpoint cannot hold; "
        "choose an optimizer or schedule whose state consists of tensors and numbers"
    )


def _key(key: Any, path: str) -> str | int | float:
    if isinstance(key, bool) or not isinstance(key, str | int | float):
        raise CheckpointError(f"{path} in the state of the run has the key {key!r}; keys must be texts or numbers")
    return key


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = cast("dict[str, Any]", value).items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
