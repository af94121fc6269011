"""Branches that run apart: the same function and gradients as composed, and when the cost model picks which."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional

import gpd_fx
from gpd_fx.composition.two_layers import ApartKeys, ApartSet
from gpd_fx.errors import ArgumentError, InputError, PassError
from gpd_fx.passes import Apart, Merge
from gpd_fx.passes.apart import Beside
from gpd_fx.teacher.branch_cost import ProductSizes, Use
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.verify.verification import relative_error
from tests.test_composition import example

BRANCHES = ["1x1", "1x1-kxk", "dwsep", "lowrank"]
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Between(nn.Module):
    """A layer between two 1x1 convs, so that both of its sides widen."""

    def __init__(self, layer: nn.Module, dims: int, inputs: int, outputs: int) -> None:
        super().__init__()
        conv = CONV[dims]
        self.first, self.layer, self.last = conv(2, inputs, 1), layer, conv(outputs, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.first(x)))))


class Twice(nn.Module):
    """One weight at two places of different sizes, once with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 1), nn.Linear(4, 2)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.first(x), self.weight, self.bias, padding=1).relu()
        x = functional.max_pool2d(x, 2)
        return self.last(functional.conv2d(x, self.weight, None, 1, "same").mean((2, 3)))


class Mlp(nn.Module):
    """Linear layers on two and three dimensions, one of them tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.tanh(self.b(self.a(x))))
        return self.d(x.sin().sum(1))


def between(*args: Any, dims: int = 2, **kwargs: Any) -> Callable[[], nn.Module]:
    inputs, outputs, size = args
    return lambda: Between(CONV[dims](inputs, outputs, size, **kwargs), dims, inputs, outputs)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "padded": (between(4, 6, 3, padding=1), (2, 2, 7, 6)),
    "strided": (between(4, 6, (3, 2), stride=2, padding=(2, 0)), (2, 2, 9, 7)),
    "dilated": (between(4, 3, 3, dilation=(2, 1), padding=2, bias=False), (2, 2, 8, 7)),
    "grouped": (between(4, 6, 3, padding=1, groups=2), (2, 2, 6, 6)),
    "depthwise": (between(6, 6, 3, padding=1, groups=6), (2, 2, 6, 6)),
    "depthwise, many outputs": (between(4, 8, 3, padding=1, groups=4), (2, 2, 6, 6)),
    "same": (between(4, 6, (4, 3), padding="same", groups=2), (2, 2, 7, 6)),
    "valid": (between(4, 6, 3, padding="valid"), (2, 2, 7, 6)),
    "circular": (between(4, 6, 3, padding=1, padding_mode="circular"), (2, 2, 7, 6)),
    "one tap, strided and padded": (between(8, 9, 1, stride=2, padding=1), (2, 2, 7, 6)),
    "1d": (between(4, 6, 5, dims=1, stride=2, padding=3, dilation=2), (3, 2, 12)),
    "3d": (between(4, 4, (2, 3, 1), dims=3, padding=1, stride=(1, 2, 1)), (2, 2, 4, 5, 3)),
    "twice": (Twice, (2, 2, 8, 8)),
    "linear": (Mlp, (3, 5, 3)),
}


def awaken(teacher: DynamicTeacher) -> DynamicTeacher:
    """Give the branches' scales values: at zero, nothing would show an error in them."""
    with torch.no_grad():
        for name, parameter in teacher.composition.branches.named_parameters():
            if name.endswith(".v"):
                parameter.normal_()
    return teacher


def teacher_of(name: str, ratio: float = 2.0, branches: list[str] | None = None) -> tuple[DynamicTeacher, Tensor]:
    make, shape = MODELS[name]
    x = torch.randn(shape, dtype=torch.float64)
    model = make().double()
    return awaken(gpd_fx.expand(model, ratio, (x,), branches=branches or BRANCHES, verify=False)), x


def every(teacher: DynamicTeacher) -> ApartSet:
    """All branches that can run apart."""
    found: set[tuple[str, str]] = set()
    for key in teacher.composition.products():
        try:
            teacher.run_apart([key])
        except ArgumentError:
            continue
        found.add(key)
    teacher.run_apart([])
    return frozenset(found)


def results(teacher: DynamicTeacher, x: Tensor) -> dict[str, Tensor]:
    """Outputs of both networks, together and alone, and the gradient of every parameter."""
    teacher.zero_grad()
    outputs = dict(zip(("wide", "narrow"), teacher.both(x), strict=True))
    (outputs["wide"].sin().sum() + outputs["narrow"].cos().sum()).backward()
    found = {n: p.grad.clone() for n, p in teacher.named_parameters() if p.grad is not None}
    with torch.no_grad():
        alone = {"wide alone": teacher(x), "narrow alone": teacher.student(x)}
    return found | {n: t.detach() for n, t in (outputs | alone).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * max(1.0, tensor.abs().max().item()), name


@pytest.mark.parametrize("ratio", [2.0, 1.5])
@pytest.mark.parametrize("name", MODELS)
def test_apart_is_composed(name: str, ratio: float) -> None:
    teacher, x = teacher_of(name, ratio)
    keys, merged = list(teacher.state_dict()), teacher.composition.merged()
    for mode in (True, False):
        teacher.train(mode)
        teacher.run_apart([])
        expected = results(teacher, x)
        apart = every(teacher)
        assert any(parameter not in ("first.weight", "last.weight") for parameter, _ in apart)
        teacher.run_apart(apart)
        assert teacher.apart == apart
        same(results(teacher, x), expected)
    assert list(teacher.state_dict()) == keys
    same(teacher.composition.merged(), merged, 0.0)
    same({"fold": gpd_fx.fold(teacher).eval()(x).detach()}, {"fold": expected["narrow alone"]})


def test_any_slices_of_any_layer() -> None:
    """The student's tensors of plans whose originals lie anywhere, and what the teacher's kernel lacks."""
    composition, _ = example()
    with torch.no_grad():
        for parameter in composition.branches.parameters():
            parameter.normal_()
    products = composition.products()
    apart = frozenset(key for key, (_, refusal) in products.items() if refusal is None)
    assert {refusal for _, refusal in products.values()} == {None, "the conv is transposed"}
    groups = {plan.name: plan.kernel.groups for plan in composition.plans if plan.kernel is not None}

    def run(chosen: ApartSet) -> dict[str, Tensor]:
        composition.zero_grad()
        wide, narrow = composition(chosen)
        for name, branch in chosen:
            point, kernel, scale = (wide.pop(key) for key in ApartKeys.of(name, branch))
            first = point.flatten(1).unflatten(0, (groups[name], -1))
            second = kernel.reshape(groups[name], -1, first.shape[1], kernel[0, 0].numel())
            product = torch.einsum("gci,gocp->goip", first, second).reshape(wide[name].shape)
            wide[name] = wide[name] + product * scale.reshape(-1, *(1,) * (product.dim() - 1))
        found = {f"wide {n}": t for n, t in wide.items()} | {f"narrow {n}": t for n, t in narrow.items()}
        torch.stack([t.sin().sum() for t in found.values() if t.requires_grad]).sum().backward()
        gradients = {n: p.grad.clone() for n, p in composition.named_parameters() if p.grad is not None}
        return {n: t.detach() for n, t in found.items()} | gradients

    same(run(apart), run(frozenset()))
    with torch.no_grad():
        same(composition.student(apart), composition.student())


def test_whole_widths_and_many_branches_at_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 1), nn.Tanh(), nn.Conv2d(6, 2, 3)).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    teacher = awaken(gpd_fx.expand(net, 1.5, (x,), branches=["orepa", "1xk+kx1"], verify=False))
    wide = awaken(gpd_fx.expand(net, 2.0, (x,), branches=["1x1-kxk:full", "lowrank:full"], verify=False))
    for made in (teacher, wide):
        expected = results(made, x)
        made.run_apart(every(made))
        assert len(made.apart) == 3
        same(results(made, x), expected)


def resnet(size: int, branches: str | list[str] = "orepa") -> tuple[DynamicTeacher, Tensor]:
    x = torch.randn(3, 3, size, size)
    teacher = gpd_fx.expand(torchvision.models.resnet18(num_classes=5), 2.0, (x,), branches=branches, verify=False)
    return awaken(teacher), x


def test_resnet() -> None:
    teacher, x = resnet(32)
    teacher, x = teacher.double().eval(), x.double()
    with torch.no_grad():
        expected = teacher.both(x)
        teacher.run_apart(every(teacher))
        assert len(teacher.apart) == 17 + 3 + 1  # 3x3 and 7x7 convs; 1x1 convs; the linear layer
        found = teacher.both(x)
        graph = Merge()(teacher.as_graph()).graph_module
        assert relative_error(expected[0], graph(x)) < 1e-11  # as a graph of its own, all is composed
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(theirs, mine) < 1e-11


def test_what_is_made_of_a_scheduled_teacher(tmp_path: Path) -> None:
    teacher, x = teacher_of("grouped")
    expected = results(teacher, x)
    teacher.run_apart(every(teacher))
    twin = copy.deepcopy(teacher)
    same(results(twin, x), expected)
    assert twin.apart == teacher.apart
    twin.run_apart([])
    same(results(twin, x), expected)
    same(results(teacher, x), expected)
    single = copy.deepcopy(teacher).float()
    assert relative_error(expected["wide alone"], single(x.float()).double()) < 1e-5
    gpd_fx.save(teacher, tmp_path / "teacher.safetensors")
    loaded = gpd_fx.load(tmp_path / "teacher.safetensors", MODELS["grouped"][0]().double())
    assert loaded.apart == frozenset()
    same(results(loaded.train(teacher.training), x), expected)
    same(results(teacher, x), expected)
    teacher.load_state_dict(loaded.state_dict(), assign=True)
    same(results(teacher, x), expected)


def test_back_and_forth_leaves_the_graphs_as_they_were() -> None:
    teacher, _ = teacher_of("twice")
    before = [graph.code for graph in teacher.graphs.values() if isinstance(graph, fx.GraphModule)]
    apart = every(teacher)
    for _ in range(2):
        teacher.run_apart(apart)
        after = [graph.code for graph in teacher.graphs.values() if isinstance(graph, fx.GraphModule)]
        assert all("addcmul" in code for code in after)
    teacher.run_apart([])
    assert [graph.code for graph in teacher.graphs.values() if isinstance(graph, fx.GraphModule)] == before


def test_compiled_as_one_graph() -> None:
    teacher, x = teacher_of("padded")
    compiled = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    apart = every(teacher)
    for chosen in (apart, frozenset[tuple[str, str]](), apart):
        teacher.run_apart(chosen)
        expected = results(teacher, x)
        teacher.zero_grad()
        wide, narrow = compiled(x, role="both")
        (wide.sin().sum() + narrow.cos().sum()).backward()
        found = {n: p.grad.clone() for n, p in teacher.named_parameters() if p.grad is not None}
        same(found, {n: expected[n] for n in found})
        same({"wide": wide.detach(), "narrow": narrow.detach()}, {n: expected[n] for n in ("wide", "narrow")})


def test_autocast() -> None:
    teacher, x = teacher_of("padded")
    teacher, x = teacher.float(), x.float()
    with torch.no_grad():
        exact = teacher.both(x)
        teacher.run_apart(every(teacher))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = teacher.both(x)
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert relative_error(theirs, mine.float()) < 0.03


def test_the_pass_alone() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
            self.p = nn.Parameter(torch.randn(10, 2, 1, 1))
            self.k = nn.Parameter(torch.randn(6, 5, 3, 3))
            self.v = nn.Parameter(torch.randn(6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.p.sum() * self.k.sum() * self.v.sum() * 0

    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    graph = gpd_fx.capture(Conv().double(), (x,))
    result = Apart({"conv.weight": (Beside("p", "k", "v", 9),)})(graph)
    assert result.modified
    assert result.notes == ("conv.weight: 1 branches run apart at 1 uses",)
    p, k, v = (graph.get_parameter(name) for name in "pkv")
    kernel = torch.einsum("gci,gocyx->goiyx", p.view(2, 5, 2), k.view(2, 3, 5, 3, 3)).reshape(6, 2, 3, 3) * v[..., None]
    expected = graph(x) + functional.conv2d(x, kernel, padding=1, groups=2)
    assert relative_error(expected, result.graph_module(x)) < 1e-12
    for products, message in (
        ({"conv.bias": (Beside("p", "k", "v", 9),)}, "does not take it as the weight"),
        ({"conv.nothing": (Beside("p", "k", "v", 9),)}, "no op uses it"),
        ({"conv.weight": (Beside("q", "k", "v", 9),)}, "no attribute 'q'"),
    ):
        with pytest.raises(PassError, match=message):
            Apart(products)(graph)


def test_what_cannot_run_apart() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 2, 3)).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    teacher = gpd_fx.expand(net, 2.0, (x,), branches=BRANCHES, verify=False)
    report = teacher.schedule(x)
    (row,) = [choice for choice in report.choices if choice.parameter == "1.weight"]
    assert (row.runs, row.apart, row.reason) == ("composed", None, "the conv is transposed")
    for branch, message in (
        (("1.weight", "1x1-kxk"), "branch '1x1-kxk' of '1.weight' cannot run apart: the conv is transposed"),
        (("2.weight", "1x1"), "'2.weight' has no product branch '1x1'; there are "),
        (("2.bias", "1x1-kxk"), "'2.bias' has no product branch"),
    ):
        with pytest.raises(ArgumentError, match=r"^run_apart: ") as caught:
            teacher.run_apart([branch])
        assert message in str(caught.value)
    teacher.run_apart([("2.weight", "1x1-kxk")])
    with pytest.raises(ArgumentError, match=r"the tensors lack '2.weight/1x1-kxk/point'"):
        teacher.run_teacher(teacher.composition.teacher(), x)
    teacher.run_teacher(teacher.composition.teacher(teacher.apart), x)
    with pytest.raises(InputError, match="was made for"):
        teacher.schedule(torch.randn(2, 2, 9, 9))


def test_a_weight_that_the_graph_scales_stays_composed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(functional.linear(self.b(self.a(x)), self.b.weight.mT))

    x = torch.randn(2, 3)
    teacher = gpd_fx.expand(Scaled(), 2.0, (x,), branches=["lowrank"], verify=False)
    names = {choice.parameter for choice in teacher.schedule(x).choices}
    assert names == {"a.weight", "c.weight"}  # b.weight is not only a weight, so it has no branches at all


def test_schedule_follows_batch_and_resolution() -> None:
    late = ("layer4.1.conv2.weight", "1x1-kxk")
    early = ("layer1.0.conv1.weight", "1x1-kxk")
    teacher, x = resnet(64, ["1x1-kxk:full"])
    code = teacher.graphs["eval_mode"].code
    report = teacher.schedule(x)
    assert late in report.apart
    assert early not in report.apart
    assert teacher.apart == frozenset(report.apart)
    assert str(report).count("\n") == 1 + len(report.choices)
    assert json.loads(json.dumps(report.to_dict()))["choices"][0]["parameter"] == "conv1.weight"
    for choice in report.choices:
        assert choice.apart is not None
        assert (choice.apart < choice.composed) == (choice.runs == "apart")
        assert "times cheaper over" in choice.reason
    few = len(report.apart)
    big = teacher.schedule(torch.empty(4096, 3, 64, 64, device="meta"))
    assert not big.apart
    assert teacher.graphs["eval_mode"].code == code
    assert len(teacher.schedule(torch.empty(1, 3, 64, 64, device="meta")).apart) >= few
    large, _ = resnet(256, ["1x1-kxk:full"])
    meta = torch.empty(32, 3, 256, 256, device="meta")
    assert late not in large.schedule(meta).apart
    assert late in teacher.schedule(torch.empty(32, 3, 64, 64, device="meta")).apart


def test_costs_by_hand() -> None:
    sizes = ProductSizes(2, 8, 4, 6, 9, (2, 4, 3))
    assert sizes.composed() == 2 * 8 * 4 * 6 * 9
    use = Use.of((5, 12, 10, 10), (5, 16, 8, 8), sizes)
    assert use == Use(500, 320)
    once, twice = sizes.apart([use]), sizes.apart([use, use])
    assert twice - once > 0.4 * (500 * 2 * 4 * 6 + 320 * 2 * 8 * 4 * 9)
    assert ProductSizes(2, 8, 4, 6, 1, (2, 4, 3)).apart([Use(10**6, 1)]) < 10**7  # one tap: the stride comes first
