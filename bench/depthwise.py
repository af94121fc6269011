"""Depthwise convs with batch norm in train mode, forward and backward: `python -m bench depthwise`.

The operator of `teacher.fuse()` against torch's conv and batch norm, eager and compiled, for layers of MobileNetV2. A
case is checked on a few images against float64, output and every gradient. *MB* is what the passes over the
activations move, counted from shapes; the compiled case counts as the eager one. On a CPU the operator is torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional

from bench.compose import worst
from bench.machine import prepare
from bench.measure import Case, Check, Row, measure
from bench.section import Section, report
from gpd_fx.kernels.depthwise.launch import Conv
from gpd_fx.kernels.depthwise.op import depthwise_norm

Layer = tuple[int, int, int]
MOBILENET: tuple[Layer, ...] = (
    (32, 112, 1),
    (96, 112, 2),
    (144, 56, 1),
    (192, 28, 1),
    (384, 14, 1),
    (576, 14, 1),
    (960, 7, 1),
)
"""Channels, height and width, stride of its kinds of layers, at 224x224; of those with stride 2 the largest."""
TINY: tuple[Layer, ...] = ((5, 6, 1), (3, 7, 2))
TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of each tensor's largest element."""
CHECKED = 4
"""Images that a check takes."""
Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """How the layers are run."""

    batch: int = 64
    dtype: str = "float32"
    channels_last: bool = False
    backend: str | None = None

    @property
    def title(self) -> str:
        """As sections are called."""
        lies = ", channels last" if self.channels_last else ""
        return f"depthwise conv and batch norm, batch {self.batch}, {self.dtype}{lies}"


def arguments(layer: Layer, setting: Setting, device: torch.device) -> list[Tensor]:
    """x, kernel, gamma and beta."""
    channels, side, _ = layer
    generator = torch.Generator().manual_seed(0)
    shapes = ((setting.batch, channels, side, side), (channels, 1, 3, 3), (channels,), (channels,))
    x, weight, gamma, beta = (torch.randn(shape, generator=generator) for shape in shapes)
    dtype = getattr(torch, setting.dtype)
    lies = torch.channels_last if setting.channels_last else torch.contiguous_format
    x, weight = x.to(device, dtype, memory_format=lies), weight.to(device, dtype)
    return [t.requires_grad_() for t in (x, weight, gamma.to(device), beta.to(device))]


def separate(stride: int) -> Run:
    """Torch's own conv and batch norm."""

    def run(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = functional.conv2d(x, weight, None, stride, 1, groups=x.shape[1])
        return functional.batch_norm(y, None, None, gamma, beta, True)

    return run


def fused(stride: int) -> Run:
    """The operator."""

    def run(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        pair = (stride, stride)
        return depthwise_norm(x, weight, None, gamma, beta, None, None, pair, (1, 1), (1, 1), True, 0.1, 1e-5)

    return run


def results(run: Run, given: list[Tensor]) -> list[Tensor]:
    """The output and every gradient."""
    z = run(*given)
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
    return [z.detach(), *torch.autograd.grad(z, given, upstream)]


def case(name: str, run: Run, stride: int, given: list[Tensor], base: str) -> Case:
    """One way to run a layer."""
    few = [t.detach().requires_grad_() for t in (given[0][:CHECKED], *given[1:])]
    exact = [t.detach().double().requires_grad_() for t in few]
    with torch.no_grad():
        upstream = torch.randn_like(run(*given))

    def checks() -> list[Check]:
        error = worst(results(run, few), results(separate(stride), exact))
        return [Check("values and gradients", error, TOLERANCES[given[0].dtype])]

    return Case(name, lambda: torch.autograd.grad(run(*given), given, upstream), checks, base=base, warm=True)


def run(
    layers: tuple[Layer, ...], setting: Setting, rounds: int, device: torch.device, until: float = math.inf
) -> Section:
    """Measure each layer in turn."""
    rows: list[Row] = []
    for layer in layers:
        channels, side, stride = layer
        given = arguments(layer, setting, device)
        label = f"{channels} channels, {side}x{side}, stride {stride}"
        base = f"{label}, torch"
        ways: dict[str, Run] = {"torch": separate(stride)}
        if setting.backend is not None:
            ways["compiled"] = torch.compile(separate(stride), backend=setting.backend)
        ways["fused"] = fused(stride)
        cases = [case(f"{label}, {name}", way, stride, given, base) for name, way in ways.items()]
        found = measure(cases, rounds, device, until)
        for row, name in zip(found, ways, strict=True):
            if row.correct:
                row.figures["MB"] = moved(given[0], stride, name == "fused") / 1e6
        rows += found
        torch.compiler.reset()
    options = {"layers": [list(layer) for layer in layers], **vars(setting)}
    return Section.of("depthwise", setting.title, options, rows, device)


def moved(x: Tensor, stride: int, by_kernels: bool) -> int:
    """Bytes of activations read and written, forward and backward, each pass counted once."""
    high, wide = Conv((3, 3), (stride, stride), (1, 1), (1, 1)).out(x.shape[2:])
    inputs, outputs = x.numel(), x.shape[0] * x.shape[1] * high * wide
    passes = 5 * inputs + 5 * outputs if by_kernels else 3 * inputs + 11 * outputs
    return passes * x.element_size()


def main(
    batch: Annotated[int, typer.Option(help="Images.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    channels_last: Annotated[bool, typer.Option(help="Channels last.")] = False,
    backend: Annotated[str | None, typer.Option(help="Also compile torch's own, by inductor say.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Two tiny layers.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads that torch uses on the CPU.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time depthwise convs with batch norm, as one op and as two."""
    if dtype not in {str(known).removeprefix("torch.") for known in TOLERANCES}:
        raise typer.BadParameter(f"there is no {dtype!r} here; choose float32, float16 or bfloat16")
    setting = Setting(batch, dtype, channels_last, backend)
    report([run(TINY if tiny else MOBILENET, setting, rounds, prepare(device, threads))], out)
