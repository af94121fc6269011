"""A training step of teacher and student, forward, loss and backward: `python -m bench step [MODEL]`.

    plain       two plain networks of the same widths, without branches: the bound
    gpd_fx      the dynamic teacher
    einsum      the dynamic teacher, its kernels composed by per-layer einsum
    convs       each branch of the wide network as convs of its own with a batch norm of its own, and a plain student

All start from the same values, branches included. The optimizer's step is left out. Checked are both networks' outputs
against those of plain modules with the merged kernels, in train mode; for gpd_fx also the gradient of all parameters
together against that of einsum, in float64; for `convs` the wide network's output while its branches' batch norms are
at the identity, which is when it is the same function.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx, nn
from torch.nn import functional

import gpd_fx
from bench.compose import awaken
from bench.einsum import compose_by_einsum
from bench.measure import Case, measure, save, show
from gpd_fx.kernels.compose import InputFilter, Layer, OutputFilter, Product
from gpd_fx.models import resolve
from gpd_fx.passes import Merge
from gpd_fx.teacher import DynamicTeacher
from gpd_fx.verify import relative_error

aten = torch.ops.aten
TOLERANCE = 1e-4
"""Of the outputs of a whole float32 network with batch norm in train mode."""
Pair = tuple[Tensor, Tensor]


class Sequence2d(nn.Module):
    """One branch as convs, run one after another, and a batch norm; conv number `main` has the layer's stride."""

    def __init__(self, convs: list[tuple[Tensor, int, bool]], outputs: int, main: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w.detach().clone(), trained) for w, _, trained in convs])
        self.groups = [groups for _, groups, _ in convs]
        self.main = main
        self.norm = nn.BatchNorm2d(outputs, device=convs[0][0].device)

    def forward(self, x: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
        for number, (weight, groups) in enumerate(zip(self.weights, self.groups, strict=True)):
            if number == self.main:
                x = functional.conv2d(x, weight, None, stride, padding, dilation, groups)
            else:
                x = functional.conv2d(x, weight, groups=groups)
        return self.norm(x)


class Branches(nn.Module):
    """A conv as the sum of its branches."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        weight, layout = layer.weight, layer.layout
        assert layout is not None
        groups, outputs = layout.groups, weight.shape[0]
        alpha = layer.alpha[1] if len(layer.alpha) > 1 else None
        factor = weight.new_ones(weight.shape[1]) if alpha is None else alpha

        def point(tensor: Tensor) -> Tensor:  # the 1x1 conv that comes first takes alpha of its inputs
            return (tensor.flatten(0, 1) * factor)[..., None, None]

        branches = [Sequence2d([(weight * factor[:, None, None], groups, True)], outputs, 0)]
        for term in layer.terms:
            if isinstance(term, OutputFilter):
                scaled = (term.filters * term.scale[..., None, None]).flatten(0, 1)[:, None]
                trained = term.filters.requires_grad
                convs = [(point(term.point), groups, True), (scaled, outputs, trained)]
            elif isinstance(term, InputFilter):
                scaled = (term.point * term.scale[..., None]).flatten(0, 1)[..., None, None]
                filters = (term.filters * factor[:, None, None]).flatten(0, 1)[:, None]
                convs = [(filters, len(filters), True), (scaled, groups, True)]
            elif isinstance(term, Product):
                scaled = (term.kernel * term.scale[..., None, None, None]).flatten(0, 1)
                convs = [(point(term.point), groups, True), (scaled, groups, True)]
            else:
                raise TypeError(f"no convs are written down for {type(term).__name__}")
            branches.append(Sequence2d(convs, outputs, 0 if isinstance(term, InputFilter) else 1))
        self.branches = nn.ModuleList(branches)

    def forward(
        self, x: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
    ) -> Tensor:
        total = self.branches[0](x, stride, padding, dilation)
        for branch in self.branches[1:]:
            total = total + branch(x, stride, padding, dilation)
        return total if bias is None else total + bias[:, None, None]


def with_convs(wide: fx.GraphModule, layers: Mapping[str, Layer]) -> fx.GraphModule:
    """The wide network with a `Branches` in the place of each conv that has terms."""
    wide = copy.deepcopy(wide)
    number = 0
    for node in list(wide.graph.find_nodes(op="call_function", target=aten.conv2d.default)):
        weight = node.args[1]
        layer = layers.get(str(weight.target)) if isinstance(weight, fx.Node) else None
        if layer is None or not layer.terms:
            continue
        x, _, bias, stride, padding, dilation, *_ = [*node.args, *(None, [1, 1], [0, 0], [1, 1])[len(node.args) - 2 :]]
        wide.add_submodule(f"branches{number}", Branches(layer))
        with wide.graph.inserting_before(node):
            new = wide.graph.call_module(f"branches{number}", (x, bias, stride, padding, dilation))
        node.replace_all_uses_with(new)
        wide.graph.erase_node(node)
        number += 1
    wide.delete_all_unused_submodules()
    wide.recompile()
    return wide


def set_identity(module: nn.Module) -> None:
    """Make the branches' batch norms in eval mode the identity."""
    for part in module.modules():
        if isinstance(part, Sequence2d):
            part.eval()
            torch.nn.init.constant_(part.norm.weight, (1 + part.norm.eps) ** 0.5)


def distance(found: Pair, expected: Pair) -> float:
    """The larger relative error of the two networks."""
    return max(relative_error(a, b) for a, b in zip(expected, found, strict=True))


def main(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or package.module:factory.")] = (
        "torchvision:resnet18"
    ),
    ratio: Annotated[float, typer.Option(help="Expansion ratio.")] = 2.0,
    branches: Annotated[str, typer.Option(help="Names, separated by commas.")] = "orepa",
    batch: Annotated[int, typer.Option(help="Images a step.")] = 32,
    resolution: Annotated[int, typer.Option(help="Side of the images.")] = 128,
    cases: Annotated[str, typer.Option(help="Names, separated by commas; ratios are to the first.")] = (
        "plain,gpd_fx,einsum,convs"
    ),
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads that torch uses on the CPU.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time a training step of both networks."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    place = torch.device(device)
    image, target = torch.randn(batch, 3, resolution, resolution, device=place), torch.arange(batch, device=place) % 10
    teacher = gpd_fx.expand(resolve(model), ratio, (image.cpu(),), branches=branches.split(","), verify=False)
    awaken(teacher.composition)
    teacher = teacher.to(place).train()
    wide = Merge()(teacher.as_graph("train")).module
    student = gpd_fx.fold(teacher).train()
    layers = dict(zip((plan.name for plan in teacher.composition.plans), teacher.composition.layers(), strict=True))
    convs = with_convs(wide, layers)

    def by_einsum() -> Pair:
        return through(teacher, *compose_by_einsum(teacher.composition.layers()), image)

    def plain() -> Pair:
        return wide(image), student(image)

    runs: dict[str, tuple[Callable[[], Pair], tuple[nn.Module, ...]]] = {
        "plain": (plain, (wide, student)),
        "gpd_fx": (lambda: teacher.both(image), (teacher,)),
        "einsum": (by_einsum, (teacher,)),
        "convs": (lambda: (convs(image), student(image)), (convs, student)),
    }
    loss = gpd_fx.GPDLoss()

    def step(name: str) -> None:
        run, modules = runs[name]
        first, second = run()
        loss(second, first, target).total.backward()
        for module in modules:
            module.zero_grad()

    def error(name: str) -> float:
        run, _ = runs[name]
        with torch.no_grad():
            if name == "convs":
                same = copy.deepcopy(convs)
                set_identity(same)
                return relative_error(wide(image), same(image))
            outputs = distance(run(), plain())
        return outputs if name != "gpd_fx" else max(outputs, gradient_error(teacher, image[:4].double(), target[:4]))

    names = cases.split(",")
    unknown = [name for name in names if name not in runs]
    if unknown:
        raise typer.BadParameter(f"there is no case {unknown[0]!r}; there are {', '.join(runs)}")
    rows = measure([Case(n, lambda n=n: step(n), lambda n=n: error(n), TOLERANCE) for n in names], rounds, place)
    options: dict[str, Any] = {"model": model, "ratio": ratio, "branches": branches}
    options |= {"batch": batch, "resolution": resolution}
    copies = 4 * sum(p.numel() for p in teacher.composition.weights.parameters()) / 1e6
    show(
        f"training step, {model} at ratio {ratio:g}, branches {branches}, batch {batch}, {resolution}x{resolution}, "
        f"float32, ratios to {names[0]}; the teacher's plain parameters are {copies:.0f} MB",
        rows,
    )
    if out is not None:
        save(out, rows, place, options)


def gradient_error(teacher: DynamicTeacher, image: Tensor, target: Tensor) -> float:
    """How far the gradient of all parameters is from that with kernels by einsum, relative to its length.

    In float64: in float32 a single activation on the other side of zero would change it by a thousandth.
    """
    teacher = copy.deepcopy(teacher).double()
    found: list[Tensor] = []
    for grouped in (True, False):
        first, second = (
            teacher.both(image)
            if grouped
            else through(teacher, *compose_by_einsum(teacher.composition.layers()), image)
        )
        gpd_fx.GPDLoss()(second, first, target).total.backward()
        found.append(torch.cat([p.grad.flatten() for p in teacher.parameters() if isinstance(p.grad, Tensor)]))
        teacher.zero_grad()
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


def through(teacher: DynamicTeacher, wide: list[Tensor], narrow: list[Tensor], image: Tensor) -> Pair:
    """Both networks with composed tensors."""
    names = [plan.name for plan in teacher.composition.plans]
    first = teacher.run_teacher(dict(zip(names, wide, strict=True)), image)
    return first, teacher.run_student(dict(zip(names, narrow, strict=True)), image)
