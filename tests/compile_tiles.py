"""Compile the tile kernels for one GPU without having it: `python tests/compile_tiles.py cuda 90`; prints JSON.

For each kernel, dtype and variant: bytes of shared memory, registers and bytes spilled to memory, and how many matrix
instructions there are.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpd_fx.kernels.compose import launch, tile_kernels

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false
# Triton gives its compiler no types.

POINTERS = {"tasks": "*i32", "dyn": "*i64", "geo": "*i32", "maps": "*i32"}
SCRATCH = {"scratch": "*fp32"}
TAPS = 64
"""Of a kernel of 7x7."""


def compiled(name: str, target: Any, dtype: Any, few: int) -> dict[str, Any]:
    """Compile one variant; with lines, and with layers of few and of many inputs, which takes the most registers."""
    hip = target.backend == "hip"
    blocks = launch.sizes_on(str(target.arch) if hip else f"sm_{target.arch}")[name != "compose_tiles"]
    kernel = getattr(tile_kernels, name)
    constants = launch.constants(blocks, few=few, taps=TAPS, small=True, large=True, lines=True, hip=hip, dtype=dtype)
    pointers = POINTERS if name == "compose_tiles" else POINTERS | SCRATCH
    found = {"kernel": name, "dtype": str(dtype), "few": few}
    return found | figures(kernel, pointers, constants, target, blocks.options())


def figures(
    kernel: Any, kinds: Mapping[str, str], constants: Mapping[str, Any], target: Any, options: dict[str, Any]
) -> dict[str, int]:
    """Compile a kernel; pointers among its arguments, whose kinds are given in order, are taken for aligned ones."""
    source = ASTSource(
        fn=kernel,
        signature={**kinds, **dict.fromkeys(constants, "constexpr")},
        constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
        attrs={(n,): [["tt.divisibility", 16]] for n, kind in enumerate(kinds.values()) if kind.startswith("*")},
    )
    made = triton.compile(source, target=target, options=options)
    told = amd(made.asm["amdgcn"]) if target.backend == "hip" else nvidia(made.asm["ptx"], target.arch)
    return {"shared": made.metadata.shared} | told


def asked() -> Any:
    """The target named on the command line."""
    backend, arch = sys.argv[1:]
    return GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)


def nvidia(ptx: str, arch: int) -> dict[str, int]:
    """What ptxas says of a kernel."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(file), "-o", str(Path(folder) / "out")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", told)
    matrix = len(re.findall(r"\b(?:mma|wgmma)[.\w]*sync|tcgen05\.mma", ptx))
    return {"registers": int(re.findall(r"Used (\d+) registers", told)[0]), "spilled": sum(map(int, spilled))} | {
        "matrix": matrix
    }


def amd(assembly: str) -> dict[str, int]:
    """What the assembly says of itself."""

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[0])

    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "matrix": assembly.count("v_mfma"),
    }


def main() -> None:
    """Compile all variants for the target named on the command line."""
    target = asked()
    names, dtypes = ("compose_tiles", "differentiate_tiles"), (tl.float32, tl.float16, tl.bfloat16)
    rows = [compiled(name, target, dtype, 16) for name, dtype in itertools.product(names, dtypes)]
    sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
