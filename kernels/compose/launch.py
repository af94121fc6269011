"""Running the tile kernels: which layers they take, and the tensors that come out.

Everything but addresses is known from the operator's text: it is worked out once and kept as a `Plan`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpd_fx.kernels.compose.addresses import Rows, backward_rows, forward_rows
from gpd_fx.kernels.compose.forms import form_of
from gpd_fx.kernels.compose.recipe import (
    OUTPUT_FILTER,
    Recipe,
    parse,
    starts_of,
)
from gpd_fx.kernels.compose.tables import (
    SUMMED_AT_ONCE,
    Blocks,
    Tables,
    tables_of,
)
from gpd_fx.kernels.compose.transfer import Sent, refuse_capture
from gpd_fx.kernels.triton_support import DTYPES, available

if available():
    from gpd_fx.kernels.compose import tile_kernels
else:
    tile_kernels = None

BLOCKS = Blocks(lines=32, outputs=16, inputs=64, inner=32, chunk=32, part=1024, warps=8, stages=1)
LARGE = replace(BLOCKS, lines=64, inner=64)
"""Larger tiles, which ask for fewer bytes; registers spill elsewhere than on the architectures below."""
SIZES: dict[str, tuple[Blocks, Blocks]] = dict.fromkeys(("sm_90", "sm_100", "gfx942"), (LARGE, LARGE))
"""Sizes of tiles forward and backward, by `architecture`; `python -m bench tune` finds those that a device likes."""
_tried: list[tuple[Blocks, Blocks]] = []


def architecture(device: torch.device) -> str:
    """What a device's kernels are compiled for, such as `sm_90`; empty where there is no such device."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def blocks_of(kernel: str, device: torch.device) -> Blocks:
    """The sizes of tiles of a kernel on a device."""
    pair = _tried[-1] if _tried else sizes_on(architecture(device))
    return pair[kernel != "compose_tiles"]


def sizes_on(name: str) -> tuple[Blocks, Blocks]:
    """The sizes of tiles forward and backward, on an architecture."""
    return SIZES.get(name, (BLOCKS, BLOCKS))


@contextlib.contextmanager
def trying(forward: Blocks, backward: Blocks) -> Generator[None]:
    """Meanwhile tiles have these sizes, on every device, and the kernels are used on the CPU too (interpreted)."""
    _forget()
    _tried.append((forward, backward))
    try:
        yield
    finally:
        _tried.pop()
        _forget()


def _forget() -> None:
    forward_plan.cache_clear()
    backward_plan.cache_clear()


class Plan:
    """One launch for the layers that the kernels know.

    Attributes:
        rest: the layers that it leaves to plain torch, by number.
        rows: how their tensors are found.
    """

    def __init__(
        self,
        kernel: str,
        layers: Sequence[Recipe],
        taken: Sequence[int],
        needed: Sequence[str] | None,
        rows: Rows,
    ) -> None:
        self.rest = tuple(n for n in range(len(layers)) if n not in {*taken})
        self.rows = rows
        self._kernel = kernel
        self._layers = [layers[n] for n in taken]
        self._needed = None if needed is None else [needed[n] for n in taken]
        self._tables: dict[torch.device, tuple[Tables, Blocks]] = {}
        self._sent = Sent()

    def run(self, tensors: Sequence[Tensor | None], like: Tensor, results: list[Tensor | None]) -> bool:
        """Put what the kernels make of the operator's tensors into its results; False where these are a mixture."""
        read = self.rows.read(tensors)  # copies among them must live until the kernel was started
        if {t.dtype for t in read} != {like.dtype}:
            return False
        device = like.device
        if device not in self._tables:
            refuse_capture(device)
            blocks = blocks_of(self._kernel, device)
            self._tables[device] = tables_of(self._layers, self._needed, blocks, device), blocks
        tables, blocks = self._tables[device]
        made = self.rows.blanks(like)
        addresses = [t.data_ptr() for t in read]
        addresses += [t.data_ptr() for t in made]
        _run(self._kernel, tables, self._sent.send(self.rows, addresses, device), blocks, like)
        for result, tensor in zip(self.rows.results, made, strict=True):
            results[result.place] = tensor
        return True


@functools.lru_cache(maxsize=64)
def forward_plan(text: str) -> Plan:
    """What composes the layers of a text."""
    recipes = parse(text)
    taken = [n for n, recipe in enumerate(recipes) if supported(recipe)]
    return Plan("compose_tiles", recipes, taken, None, forward_rows(recipes, starts_of(text), taken))


@functools.lru_cache(maxsize=64)
def backward_plan(text: str, needed: str, given: tuple[bool, ...]) -> Plan:
    """What differentiates them: the gradients that are `needed`, from those of the results that there are."""
    recipes, flags = parse(text), needed.split(" ")
    asked = [n for n, flag in enumerate(flags) if "1" in flag]
    taken = [n for n in asked if differentiable(recipes[n], [flag == "1" for flag in flags[n]])]
    rows = backward_rows(recipes, starts_of(text), taken, flags, given)
    return Plan("differentiate_tiles", recipes, taken, flags, rows)


def usable(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of this kind are the kernels' business."""
    first = tensors[0]
    return (
        (first.device.type == "cuda" or len(_tried) > 0)
        and first.dtype in DTYPES
        and {t.dtype for t in tensors} == {first.dtype}
        and available()
    )


def supported(recipe: Recipe) -> bool:
    """Whether the kernels can compose a layer."""
    return form_of(recipe) is not None


def differentiable(recipe: Recipe, needed: Sequence[bool]) -> bool:
    """Whether the kernels can also give the gradients that are needed: those of an output filter they cannot."""
    place = 1
    for part in recipe.terms:
        if part.kind == OUTPUT_FILTER and needed[place + 2]:
            return False
        place += part.tensors
    return supported(recipe)


def _run(name: str, tables: Tables, addresses: Tensor, blocks: Blocks, like: Tensor) -> None:
    """Start a kernel, and after it the one that adds the parts of sums where it leaves some."""
    import triton.language as tl  # triton is an extra, and there is none for every system

    dtype = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[like.dtype]
    told = constants(
        blocks,
        few=tables.few,
        taps=tables.taps,
        small=tables.small,
        large=tables.large,
        lines=tables.lines,
        hip=torch.version.hip is not None,
        dtype=dtype,
    )
    told |= blocks.options()
    layers = [addresses, tables.geometry]
    with torch.cuda.device_of(like):
        if name == "compose_tiles":
            _launch(name, tables.tasks, *layers, tables.maps, **told)
            return
        scratch = torch.empty(tables.scratch, dtype=torch.float32, device=like.device)
        _launch(name, tables.tasks, *layers, tables.maps, scratch, **told)
        if len(tables.sums):
            _launch("add_parts", tables.sums, *layers, scratch, block=SUMMED_AT_ONCE, dtype=dtype)


def _launch(name: str, tasks: Tensor, *tensors: Tensor, **told: Any) -> None:
    """Start a kernel, one program a task."""
    getattr(tile_kernels, name)[(len(tasks),)](tasks, *tensors, **told)


def constants(
    blocks: Blocks, *, few: int, taps: int, small: bool, large: bool, lines: bool, hip: bool, dtype: object
) -> dict[str, Any]:
    """What a kernel is compiled for: the sizes of tiles, the variant, AMD's devices or NVIDIA's, and triton's dtype."""
    return {
        "outputs_block": blocks.outputs,
        "inputs_block": blocks.inputs,
        "inner": blocks.inner,
        "chunk": blocks.chunk,
        "lines_block": blocks.lines,
        "few": few,
        "most_taps": taps,
        "has_small": small,
        "has_large": large,
        "has_lines": lines,
        "precision": "ieee" if hip else "tf32x3",
        "dtype": dtype,
    }
