"""The tile kernels under triton's interpreter, which runs them on CPU tensors, and what they read and write there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gpd_fx.kernels import launch


def interpreted() -> None:
    """Skip where there is no triton; triton decides when a kernel is defined whether the interpreter runs it."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this run, for a device")
    if not _interpreter_counts():
        pytest.skip("the interpreter of this triton cannot count a loop with this numpy; it needs numpy below 2.4")
    from gpd_fx.kernels import tile_kernels

    assert type(tile_kernels.compose_tiles).__name__ == "InterpretedFunction"


def _interpreter_counts() -> bool:
    """Older ones make a number of an array of one element, which numpy forbids from 2.4 on."""
    numpy, triton = (tuple(map(int, version(name).split(".")[:2])) for name in ("numpy", "triton"))
    return triton >= (3, 7) or numpy < (2, 4)


@dataclass
class Traffic:
    """What some launches read and wrote.

    Attributes:
        launches: the names of the kernels that were started.
        moved: bytes, each address of a launch once.
        requested: bytes, each address once for every program that asks for it.
    """

    launches: list[str] = field(default_factory=list[str])
    moved: int = 0
    requested: int = 0


@contextmanager
def traffic(where: ModuleType = launch) -> Generator[Traffic]:
    """Count the launches of a module, and the bytes of every load and store within them."""
    from triton.runtime import interpreter

    found, builder = Traffic(), interpreter.InterpreterBuilder
    original_load, original_store, start = builder.create_masked_load, builder.create_masked_store, where._launch
    set_place = builder.set_grid_idx
    touched: dict[str, list[np.ndarray[Any, Any]]] = {"loads": [], "stores": []}
    program: dict[str, list[np.ndarray[Any, Any]]] = {"loads": [], "stores": []}

    def note(kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        places = np.unique(pointers.data[mask.data.astype(bool)]).astype(np.int64)
        program[kind].append(places * 16 + size)  # an address and how many bytes lie there

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note("loads", pointers, mask)
        return original_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("stores", pointers, mask)
        return original_store(self, pointers, value, mask, *rest)

    def size_of(places: list[np.ndarray[Any, Any]]) -> int:
        return int((np.unique(np.concatenate(places)) % 16).sum()) if places else 0

    def finish_program() -> None:
        for kind, places in program.items():
            if places:
                once = np.unique(np.concatenate(places))
                found.requested += int((once % 16).sum())
                touched[kind].append(once)
                places.clear()

    def place(self: Any, *index: int) -> Any:
        finish_program()
        return set_place(self, *index)

    def launched(name: str, *rest: Any, **constants: Any) -> None:
        found.launches.append(name)
        start(name, *rest, **constants)
        finish_program()
        for places in touched.values():
            found.moved += size_of(places)
            places.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(builder, "create_masked_store", store)
        patch.setattr(builder, "set_grid_idx", place)
        patch.setattr(where, "_launch", launched)
        yield found
