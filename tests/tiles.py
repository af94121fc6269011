"""The tile kernels under triton's interpreter, which runs them on CPU tensors, and what they read and write there."""

from __future__ import annotations

import importlib.util
import os
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import pytest

from gpd_fx.kernels.compose import launch


def interpreted() -> None:
    """Skip where there is no triton; triton decides when a kernel is defined whether the interpreter runs it."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this run, for a device")
    if not _interpreter_counts():
        pytest.skip("the interpreter of this triton cannot count a loop with this numpy; it needs numpy below 2.4")
    from gpd_fx.kernels.compose import tile_kernels

    assert type(tile_kernels.compose_tiles).__name__ == "InterpretedFunction"


def _interpreter_counts() -> bool:
    """Older ones make a number of an array of one element, which numpy forbids from 2.4 on."""
    numpy, triton = (tuple(map(int, version(name).split(".")[:2])) for name in ("numpy", "triton"))
    return triton >= (3, 7) or numpy < (2, 4)


Places: TypeAlias = np.ndarray[Any, Any]
"""Addresses times 16, plus how many bytes lie there."""
SECTOR = 32


@dataclass
class Traffic:
    """What some launches read and wrote.

    Attributes:
        launches: the names of the kernels that were started.
        moved: bytes, each address of a launch once.
        requested: bytes, each address once for every program that asks for it.
        programs: for each launch, what each of its programs loads and stores: addresses, and how many bytes lie there.
    """

    launches: list[str] = field(default_factory=list[str])
    moved: int = 0
    requested: int = 0
    programs: list[list[tuple[Places, Places]]] = field(default_factory=list[list[tuple[Places, Places]]])

    def from_memory(self, capacity: int) -> int:
        """Bytes from and to the memory behind a cache of that size, of sectors of which the oldest makes room."""
        moved = 0
        for programs in self.programs:
            held: OrderedDict[int, bool] = OrderedDict()  # sectors, and whether they were written
            for loads, stores in programs:
                for places, written in ((loads, False), (stores, True)):
                    for sector in np.unique(places // 16 // SECTOR).tolist():
                        before = held.pop(sector, None)
                        moved += SECTOR * (before is None or (written and not before))
                        held[sector] = written or bool(before)
                        if len(held) * SECTOR > capacity:
                            held.popitem(last=False)
        return moved


@contextmanager
def traffic(where: ModuleType = launch) -> Generator[Traffic]:
    """Count the launches of a module, and the bytes of every load and store within them."""
    from triton.runtime import interpreter

    found, builder = Traffic(), interpreter.InterpreterBuilder
    original_load, original_store, start = builder.create_masked_load, builder.create_masked_store, where._launch
    set_place = builder.set_grid_idx
    program: dict[str, list[Places]] = {"loads": [], "stores": []}

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

    def once(parts: list[Places]) -> Places:
        return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)

    def size_of(places: Places) -> int:
        return int((places % 16).sum())

    def finish_program() -> None:
        if any(program.values()):
            loads, stores = (once(places) for places in program.values())
            found.requested += size_of(loads) + size_of(stores)
            found.programs[-1].append((loads, stores))
            for places in program.values():
                places.clear()

    def place(self: Any, *index: int) -> Any:
        finish_program()
        return set_place(self, *index)

    def launched(name: str, *rest: Any, **constants: Any) -> None:
        found.launches.append(name)
        found.programs.append([])
        start(name, *rest, **constants)
        finish_program()
        found.moved += sum(size_of(once([*side])) for side in zip(*found.programs[-1], strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(builder, "create_masked_store", store)
        patch.setattr(builder, "set_grid_idx", place)
        patch.setattr(where, "_launch", launched)
        yield found
