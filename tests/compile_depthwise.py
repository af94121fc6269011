"""Compile the depthwise kernels for one GPU without having it: `python tests/compile_depthwise.py cuda 90`.

Prints JSON as `compile_tiles.py` does, for several convs, layouts and dtypes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from gpd_fx.kernels.depthwise import launch as depthwise_launch
from gpd_fx.kernels.depthwise import triton_kernels as depthwise_kernels
from gpd_fx.kernels.depthwise.launch import Conv
from tests.compile_tiles import asked, figures

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false
# Triton gives its compiler no types.

PLAIN = Conv((3, 3), (1, 1), (1, 1), (1, 1))
CASES = {
    "3x3": (PLAIN, (64, 96, 56, 56), torch.float16, True),
    "3x3, stride 2": (replace(PLAIN, stride=(2, 2)), (64, 96, 112, 112), torch.float32, False),
    "5x5, small": (Conv((5, 5), (1, 1), (2, 2), (1, 1)), (64, 96, 7, 7), torch.bfloat16, False),
    "7x7": (Conv((7, 7), (1, 1), (3, 3), (1, 1)), (64, 96, 56, 56), torch.float16, True),
}
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
launches: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []


def note(name: str, grid: tuple[int, int], *args: Any, **constants: Any) -> None:
    """In the place of a launch."""
    del grid
    launches.append((name, args, constants))


def call(conv: Conv, shape: tuple[int, int, int, int], dtype: torch.dtype, last: bool) -> None:
    """Both directions on tensors without memory."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    channels = shape[1]
    weight = x.new_empty((channels, 1, *conv.kernel))
    bias, gamma = (torch.empty(channels, device="meta") for _ in range(2))
    statistics, sums = (torch.empty((n, channels), device="meta") for n in (4, 2))
    z = x.new_empty((*shape[:2], *conv.out(shape[2:])))
    depthwise_launch.forward(x, weight, bias, gamma, gamma, conv, 1e-5, z, statistics)
    depthwise_launch.backward(z, x, weight, gamma, statistics, conv, torch.empty_like(x), weight, sums)


def compiled(name: str, args: tuple[Any, ...], constants: dict[str, Any], target: Any) -> dict[str, Any]:
    """Compile one launch; pointers are aligned, sizes are not taken for multiples of anything."""
    kernel = getattr(depthwise_kernels, name)
    options = {"num_warps": constants.pop("num_warps"), "num_stages": 1, "enable_fp_fusion": True}

    def kind(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32"

    kinds = dict(zip(kernel.arg_names, map(kind, args), strict=False))
    return {"kernel": name} | figures(kernel, kinds, constants, target, options)


def main() -> None:
    """Compile all variants for the target named on the command line."""
    target = asked()
    depthwise_launch._launch = note  # pyright: ignore[reportPrivateUsage]  to see what would be started
    rows: list[dict[str, Any]] = []
    for label, case in CASES.items():
        launches.clear()
        call(*case)
        for name, args, constants in launches:
            if label == next(iter(CASES)) or name not in (
                "merge_statistics",
                "add_up",
            ):  # these know nothing of the conv
                rows.append({"case": label} | compiled(name, args, constants, target))
    sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
