"""A training step of teacher and student, forward, loss and backward: `python -m bench step [MODEL]`.

    plain       two plain networks of the same widths, without branches: the bound
    gpd_fx      the dynamic teacher
    convs       each branch of the wide network as layers of its own, a conv's with a batch norm, and a plain student
    einsum      the dynamic teacher, its kernels composed by per-layer einsum

`plain-compiled`, `gpd_fx-compiled` and `einsum-compiled` are the same forward passes under
`torch.compile(fullgraph=True)`; their ratios are to `plain-compiled`. All start from the same values, branches
included; dropout and stochastic depth have probability zero. The optimizer's step is left out.

Checked on the batch that is timed, in train mode, are both networks' outputs against those of kernels composed by the
reference in float64. Rounding grows with depth, so a case may be three times as far from them as `plain` is; how far
`plain` may be is fixed. Under autocast outputs are checked twice, without autocast and with it. For gpd_fx the gradient
of all parameters together is checked against that of einsum in float64, and for `convs` the wide network's output while
its branches' batch norms are at the identity, which is when it is the same function.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import gpd_fx
from bench.compose import awaken
from bench.convs import Unwritten, set_identity, with_branches
from bench.einsum import compose_by_einsum
from bench.machine import prepare, untuned
from bench.measure import Case, Check, Row, measure
from bench.section import Section, report
from bench.zoo.check import switch_off_randomness
from gpd_fx.io.models import resolve
from gpd_fx.kernels.compose.reference import compose_reference
from gpd_fx.passes import Merge
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.verify.verification import relative_error

Pair = tuple[Tensor, Tensor]
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPILED = "-compiled"
EAGER = ("plain", "gpd_fx", "convs", "einsum")
NAMES = (*EAGER, *(name + COMPILED for name in EAGER if name != "convs"))
EXACT, ROUGH = 1e-3, 0.5
"""How far `plain` may be from float64, of its largest output, in float32 and under autocast."""
FLOOR, FACTOR = 1e-4, 3.0
"""A case may be this many times as far off as `plain`, or `FLOOR`."""
GRADIENT = 1e-4


@dataclass(frozen=True)
class Setting:
    """What a step is measured with."""

    model: str = "torchvision:resnet18"
    ratio: float = 2.0
    branches: str = "orepa"
    batch: int = 32
    resolution: int = 128
    channels_last: bool = False
    amp: str | None = None
    schedule: bool = True
    backend: str = "inductor"
    mode: str | None = None

    @property
    def title(self) -> str:
        """One line."""
        parts = [f"step of {self.model}", f"ratio {self.ratio:g}", f"branches {self.branches}"]
        parts += [f"batch {self.batch}", f"{self.resolution}x{self.resolution}", self.amp or "float32"]
        return ", ".join(parts + ["channels-last"] * self.channels_last + ["no schedule"] * (not self.schedule))


class Step:
    """All networks of a setting, on one device."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting = setting
        self.device = device
        self.layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        size = setting.resolution
        image = torch.randn(setting.batch, 3, size, size)
        model = switch_off_randomness(resolve(setting.model))
        few = image[:2].clone()
        teacher = gpd_fx.expand(model, setting.ratio, (few,), branches=setting.branches.split(","), verify=False)
        awaken(teacher.composition)
        self.reference = self._place(teacher)
        self.wide = self._place(Merge()(teacher.as_graph("train")).graph_module)
        self.student = self._place(gpd_fx.fold(teacher))
        self.image = image.to(device).contiguous(memory_format=self.layout)
        self.target = torch.arange(setting.batch, device=device) % 10
        self.teacher = self.reference
        self.apart = 0
        if setting.schedule:
            self.teacher = copy.deepcopy(teacher)
            self.apart = len(self.teacher.schedule(self.image).apart)
        self.loss = gpd_fx.GPDLoss()

    def _place(self, module: Any) -> Any:
        return module.to(self.device).to(memory_format=self.layout).train()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """What the step runs under."""
        amp = self.setting.amp
        return contextlib.nullcontext() if amp is None else torch.autocast(self.device.type, AMP[amp])

    def plain(self, image: Tensor) -> Pair:
        """The bound."""
        return self.wide(image), self.student(image)

    def gpd_fx(self, image: Tensor) -> Pair:
        """The library."""
        return self.teacher.both(image)

    def einsum(self, image: Tensor) -> Pair:
        """Kernels as they are usually composed."""
        return through(self.reference, *compose_by_einsum(self.reference.composition.layers()), image)

    def truth(self) -> Pair:
        """Outputs in float64, with kernels by the reference."""
        exact = copy.deepcopy(self.reference).double()
        with torch.no_grad(), untuned():
            return through(exact, *compose_reference(exact.composition.layers()), self.image.double())

    def weights(self) -> int:
        """Bytes of the teacher's parameters without those of branches."""
        return sum(p.numel() * p.element_size() for p in self.reference.composition.weights.parameters())


class Cases:
    """The cases of a step, by name; truth and the bound's rounding are computed once."""

    def __init__(self, step: Step, names: Sequence[str]) -> None:
        self.step = step
        self.names = names
        self.expected = step.truth()
        self.rounding = [distance(pair, self.expected) for pair in self._both(step.plain)]
        self.convs: nn.Module | None = None

    def make(self, name: str) -> Case:
        """The case called `name`."""
        if name == "convs":
            return self._convs()
        base, compiled, _ = name.partition(COMPILED)
        step, setting = self.step, self.step.setting
        forward: Callable[[Tensor], Pair] = getattr(step, base)
        module = step.teacher if base == "gpd_fx" else step.reference
        modules = (step.wide, step.student) if base == "plain" else (module,)
        if compiled:
            eager = forward
            forward = torch.compile(eager, fullgraph=True, backend=setting.backend, mode=setting.mode)
            first = f"plain{COMPILED}"
            others = first if first in self.names else None
            return Case(
                name, lambda: self._run(forward, modules), lambda: self._outputs(forward, True), base=others, warm=True
            )
        return Case(name, lambda: self._run(forward, modules), lambda: self._checks(name, forward))

    def _run(self, forward: Callable[[Tensor], Pair], modules: Sequence[nn.Module]) -> None:
        step = self.step
        with step.autocast():
            first, second = forward(step.image)
            total = step.loss(second, first, step.target).total
        total.backward()
        for module in modules:
            module.zero_grad()

    def _both(self, forward: Callable[[Tensor], Pair]) -> list[Pair]:
        """Outputs without autocast, and where there is one those with it."""
        with torch.no_grad():
            with untuned() if self.step.setting.amp else contextlib.nullcontext():
                found = [forward(self.step.image)]
            if self.step.setting.amp is not None:
                with self.step.autocast():
                    found.append(forward(self.step.image))
        return found

    def _outputs(self, forward: Callable[[Tensor], Pair], compiled: bool = False) -> list[Check]:
        amp = self.step.setting.amp
        what = ["outputs"] + [f"outputs in {amp}"] * (amp is not None)
        if compiled:  # with gradients and autocast as in the step: anything else would be compiled once more
            with self.step.autocast():
                first, second = forward(self.step.image)
            pairs, what, rounding = [(first.detach(), second.detach())], what[-1:], self.rounding[-1:]
        else:
            pairs, rounding = self._both(forward), self.rounding
        return [
            Check(w, distance(pair, self.expected), max(FLOOR, FACTOR * own))
            for w, pair, own in zip(what, pairs, rounding, strict=True)
        ]

    def _checks(self, name: str, forward: Callable[[Tensor], Pair]) -> list[Check]:
        found = self._outputs(forward)
        if name == "plain":
            return [replace(c, tolerance=t) for c, t in zip(found, (EXACT, ROUGH), strict=False)]
        if name == "gpd_fx":
            few = min(4, len(self.step.image))
            image, target = self.step.image[:few].double(), self.step.target[:few]
            with untuned():
                error = gradient_error(self.step.teacher, self.step.reference, image, target)
            found.append(Check("gradients in float64", error, GRADIENT))
        return found

    def _convs(self) -> Case:
        step = self.step
        plans = step.reference.composition.plans
        layers = dict(zip((plan.name for plan in plans), step.reference.composition.layers(), strict=True))
        try:
            module = with_branches(step.wide, layers).to(memory_format=step.layout)
        except Unwritten as reason:
            return Case.missing("convs", str(reason))

        def checks() -> list[Check]:
            same = copy.deepcopy(module)
            set_identity(same)
            with torch.no_grad():
                error = distance((same(step.image), step.student(step.image)), self.expected)
            return [Check("outputs", error, max(FLOOR, FACTOR * self.rounding[0]))]

        modules = (module, step.student)
        return Case("convs", lambda: self._run(lambda image: (module(image), step.student(image)), modules), checks)


def distance(found: Pair, expected: Pair) -> float:
    """The larger relative error of the two networks."""
    return max(relative_error(a, b) for a, b in zip(expected, found, strict=True))


def gradient_error(teacher: DynamicTeacher, reference: DynamicTeacher, image: Tensor, target: Tensor) -> float:
    """How far the gradient of all parameters is from that with kernels by einsum, relative to its length.

    In float64: in float32 a single activation on the other side of zero would change it by a thousandth.
    """
    found: list[Tensor] = []
    for grouped, network in ((True, teacher), (False, reference)):
        exact = copy.deepcopy(network).double()
        first, second = (
            exact.both(image) if grouped else through(exact, *compose_by_einsum(exact.composition.layers()), image)
        )
        gpd_fx.GPDLoss()(second, first, target).total.backward()
        found.append(torch.cat([p.grad.flatten() for p in exact.parameters() if isinstance(p.grad, Tensor)]))
    if found[0].shape != found[1].shape:
        return math.inf
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


def through(teacher: DynamicTeacher, wide: list[Tensor], narrow: list[Tensor], image: Tensor) -> Pair:
    """Both networks with composed tensors."""
    names = [plan.name for plan in teacher.composition.plans]
    first = teacher.run_teacher(dict(zip(names, wide, strict=True)), image)
    return first, teacher.run_student(dict(zip(names, narrow, strict=True)), image)


def run(setting: Setting, names: Sequence[str], rounds: int, device: torch.device, until: float = math.inf) -> Section:
    """Measure the named cases."""
    step = Step(setting, device)
    cases = Cases(step, names)
    rows = measure([cases.make(name) for name in names], rounds, device, until)
    _count_copies(rows, step.weights())
    options = asdict(setting) | {"branches apart": step.apart, "parameter bytes": step.weights()}
    return Section.of("step", setting.title, options, rows, device)


def _count_copies(rows: Sequence[Row], weights: int) -> None:
    """How many copies of the teacher's parameters a case takes more than its bound."""
    memory = {row.name: row.memory for row in rows if row.correct}
    for row in rows:
        base = memory.get(f"plain{COMPILED}" if row.name.endswith(COMPILED) else "plain")
        if row.correct and row.memory is not None and base is not None:
            row.figures["copies over plain"] = max(0.0, (row.memory - base) / weights)


def main(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or package.module:factory.")] = (
        Setting.model
    ),
    ratio: Annotated[float, typer.Option(help="Expansion ratio.")] = Setting.ratio,
    branches: Annotated[str, typer.Option(help="Names, separated by commas.")] = Setting.branches,
    batch: Annotated[int, typer.Option(help="Images a step.")] = Setting.batch,
    resolution: Annotated[int, typer.Option(help="Side of the images.")] = Setting.resolution,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory format of images and kernels.")] = (
        False
    ),
    amp: Annotated[str | None, typer.Option(help="Autocast to bf16 or fp16.")] = None,
    schedule: Annotated[bool, typer.Option(help="Let the teacher choose how each branch runs.")] = True,
    cases: Annotated[str, typer.Option(help="Names, separated by commas; ratios are to the first.")] = ",".join(EAGER),
    compiled: Annotated[bool, typer.Option("--compile", help="Also the cases under torch.compile.")] = False,
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = Setting.backend,
    mode: Annotated[str | None, typer.Option(help="Of torch.compile, such as reduce-overhead.")] = Setting.mode,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads that torch uses on the CPU.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time a training step of both networks."""
    if amp is not None and amp not in AMP:
        raise typer.BadParameter(f"there is no autocast to {amp!r}; there is {' and '.join(AMP)}")
    names = cases.split(",")
    if compiled:
        names += [name for name in NAMES if name.endswith(COMPILED) and name not in names]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"there is no case {unknown[0]!r}; there are {', '.join(NAMES)}")
    setting = Setting(model, ratio, branches, batch, resolution, channels_last, amp, schedule, backend, mode)
    report([run(setting, names, rounds, prepare(device, threads))], out)
