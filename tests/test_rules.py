"""Every rule against torch: an op applied to copies must give copies of what it gave.

`rule_cases*.py` and `rule_chains.py` hold the cases, `rule_harness.py` says how one is checked. The tests at the end
break the machinery on purpose, to see that the cases would notice.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_fx.axes.expressions import Atom
from gpd_fx.capture.capture import capture
from gpd_fx.fxtools.torch_internals import schema
from gpd_fx.passes.widen import GRAPH, widen_graph
from gpd_fx.plan.analysis import analyse
from gpd_fx.plan.plan import Plan, make_plan
from gpd_fx.rules import RULES, effects, rule_of
from gpd_fx.rules.effects import Contract
from gpd_fx.rules.entry import Entry
from gpd_fx.rules.index import pointwise
from gpd_fx.rules.notation import Einsum
from tests import rule_cases, rule_cases_recurrent, rule_cases_shapes, rule_chains
from tests.rule_harness import A, B, Case, Checked, Leaf, N, aten, build, case, difference, overload, plans

SINGLE: list[Case] = [
    *rule_cases.CONTRACTIONS,
    *rule_cases_recurrent.RECURRENT,
    *rule_cases_recurrent.POINTS,
    *rule_cases.NORMS,
    *rule_cases.POOLS,
    *rule_cases.REDUCTIONS,
    *rule_cases_shapes.SHAPES,
    *rule_cases_shapes.CONCATENATIONS,
    *rule_cases_shapes.INDEXING,
    *rule_cases_shapes.ELEMENTWISE,
    *rule_cases_shapes.FROZEN,
    *rule_chains.CREATED,
    *rule_chains.SIZES,
]
CHAINS: list[Case] = [*rule_chains.IN_PLACE, *rule_chains.STRUCTURE, *rule_chains.WHOLE]
CASES: list[Case] = [*SINGLE, *CHAINS]

pytestmark = pytest.mark.filterwarnings(
    "ignore:The use of `x.T` on tensors",  # numpy_T, which captures contain
    "ignore:.*degrees of freedom is <= 0",  # of one element, which must stay NaN
)


def named(cases: Iterable[Case]) -> list[Any]:
    return [pytest.param(one, id=f"{one.name}-{k}") for k, one in enumerate(cases)]


def problems(checked: Checked, plan: Plan) -> list[str]:
    """As `Checked.problems`, for plans that are broken on purpose and may make ops raise."""
    try:
        return checked.problems(plan)
    except Exception as error:  # noqa: BLE001  whatever torch raises
        return [str(error)]


@cache
def checked_case(k: int) -> Checked:
    """A case that is only looked at, for tests that go through all of them."""
    return Checked.of(CASES[k])


@pytest.mark.parametrize("one", named(CASES))
def test_copies_go_in_and_copies_come_out(one: Case) -> None:
    checked = Checked.of(one)
    assert not checked.analysis.faults
    for label, plan, full in plans(checked.analysis):
        assert checked.problems(plan) == [], label
        if full:
            assert checked.widths(plan) == one.widens.replace(" ", ""), label


def test_every_rule_is_exercised() -> None:
    named_and_called = {one.name for one in SINGLE if one.name in build(one).ops()}
    assert sorted(set(RULES) - named_and_called) == []


def test_every_case_of_one_op_calls_it_under_its_rule() -> None:
    without_rule = {one.name for one in rule_cases_shapes.FROZEN} - set(RULES)
    for one in SINGLE:
        assert one.name in build(one).ops(), one.name
        assert (rule_of(overload(one.name)) is None) == (one.name in without_rule), one.name


def test_no_rule_repeats_what_a_tag_says_in_every_version() -> None:
    newest = {"leaky_relu.default"}  # tagged since torch 2.12 or so
    plain = {name for name, rule in RULES.items() if not isinstance(rule, Entry)}
    assert {name for name in plain if torch.Tag.pointwise in overload(name).tags} <= {*newest, "clone.default"}


# Elementwise ops

ZOO_POINTWISE = """
    add.Tensor add_.Tensor addcmul.default bitwise_not.default clamp.default clamp_min.default clone.default cos.default
    div.Tensor div_.Tensor div.Tensor_mode eq.Scalar exp.default gelu.default hardsigmoid.default hardtanh.default
    hardtanh_.default leaky_relu_.default masked_fill.Scalar mul.Tensor ne.Scalar neg.default pow.Scalar
    pow.Tensor_Scalar relu.default relu_.default rsqrt.default rsub.Scalar sigmoid.default silu.default silu_.default
    sin.default square.default sub.Tensor tanh.default
"""  # among the ops of 245 captured torchvision and timm models


def elementwise_ops() -> Iterator[str]:
    """What has the rule of elementwise ops, nearly all by torch's tag."""
    for packet in dir(aten):
        for kind in getattr(getattr(aten, packet), "overloads", list[str])():
            op = overload(f"{packet}.{kind}")
            random = torch.Tag.nondeterministic_seeded in op.tags
            if (
                rule_of(op) is pointwise
                and not random
                and not any(argument.is_out for argument in schema(op).arguments)
            ):
                yield f"{packet}.{kind}"


def arguments(name: str, tensor: Leaf) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for an elementwise op: the same kind of tensor everywhere, numbers where they are asked for."""
    filled = {"Tensor": tensor, "number": 2, "float": 2.0, "int": 1, "bool": False, "str": "none"}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for k, argument in enumerate(schema(overload(name)).arguments):
        kind = str(argument.type)
        clamped = name.startswith(("clamp", "clip")) and k == 1
        if argument.has_default_value() and not clamped:
            continue
        value = filled.get(kind.removeprefix("Optional[").removesuffix("]") if clamped else kind)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def elementwise(name: str) -> Checked | None:
    for tensor in (A(2, 3, low=0.2), B(2, 3), N(2, 3)):
        args, kwargs = arguments(name, tensor)
        try:
            return Checked.of(case(name, "", *args, **kwargs))
        except (RuntimeError, TypeError):
            continue  # not for tensors of this type
    return None


@pytest.mark.filterwarnings("ignore")  # among 300 ops some are deprecated
def test_elementwise_ops_are_elementwise() -> None:
    seen: set[str] = set()
    for name in elementwise_ops():
        checked = elementwise(name)
        if checked is not None:
            seen.add(name)
            plan = make_plan(checked.analysis, 1.5)
            results = [axis for node in checked.graph.probes for axis in checked.axes(node)]
            assert not checked.analysis.faults, name
            assert checked.problems(plan) == [], name
            assert all(map(plan.widening.widens, results)), name
    assert set(ZOO_POINTWISE.split()) <= seen
    assert len(seen) > 300


# Whole modules, captured: sizes that are known only when the graph runs


class Body(nn.Module):
    """A linear layer, a function of its result, a linear layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.bias = nn.Linear(4, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(6))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.first(x))


class Windows(nn.Module):
    """Attention of three heads in windows of four positions, whose number depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.out, self.last = nn.Linear(4, 6), nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, h, w, c = x.shape
        windows = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(windows).reshape(-1, 4, 3, 3, 2).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        mixed = torch.bmm((q @ k.transpose(1, 2) * 0.7).softmax(-1), v)
        windows = self.out(mixed.view(-1, 3, 4, 2).transpose(1, 2).reshape(-1, 4, c))
        back = windows.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.last(x + back)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.mixed = nn.MultiheadAttention(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.mixed(x, x, x)[0])


def rows(x: Tensor) -> Tensor:
    """[B, L, C] -> [B*C, L]: the channels, which widen, become a part of the axis whose size is not known."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])


WIDE, NONE = {"first.weight": "w.", "first.bias": "w"}, {"first.weight": "..", "first.bias": "."}
ENDS = WIDE | {"last.weight": ".w", "last.bias": "."}
ATTENTION = {"in_proj_weight": "ww", "in_proj_bias": "w", "out_proj.weight": "ww", "out_proj.bias": "w"}
CAPTURED: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, str]]] = {
    "windows": (
        Windows(),
        (2, 4, 4, 4),
        ENDS | {"qkv.weight": "ww", "qkv.bias": "w", "out.weight": "ww", "out.bias": "w"},
    ),
    "heads": (Heads(), (2, 5, 4), ENDS | {f"mixed.{name}": mask for name, mask in ATTENTION.items()}),
    "mean": (Body(lambda m, x: rows(x).mean(0)), (2, 5, 4), WIDE),
    "sum": (Body(lambda m, x: rows(x).sum(0)), (2, 5, 4), WIDE),
    "norm": (Body(lambda m, x: rows(x).norm(dim=0)), (2, 5, 4), WIDE),
    "logsumexp": (Body(lambda m, x: rows(x).logsumexp(0)), (2, 5, 4), WIDE),
    "softmax": (Body(lambda m, x: (rows(x).softmax(0) * rows(x)).mean()), (2, 5, 4), WIDE),
    "std": (Body(lambda m, x: m.last(x / (x.std() + 1))), (2, 5, 4), ENDS),
    "var": (Body(lambda m, x: (rows(x).var(0), x.var((0, 2), unbiased=True))), (2, 5, 4), WIDE),
    "product": (Body(lambda m, x: rows(x).T @ rows(x)), (2, 5, 4), NONE),
    "cosine": (Body(lambda m, x: F.cosine_similarity(rows(x), rows(x) + 1, dim=0)), (2, 5, 4), NONE),
    "cdist": (Body(lambda m, x: torch.cdist(rows(x).T, rows(x).T)), (2, 5, 4), NONE),
    "slice": (Body(lambda m, x: rows(x)[3:].sum()), (2, 5, 4), NONE),
    "chunk": (Body(lambda m, x: rows(x).chunk(2)[0].sum()), (2, 5, 4), NONE),
    "groups": (
        Body(
            lambda m, x: F.conv1d(rows(x)[None], m.bias.repeat(x.shape[0])[:, None, None], groups=6 * x.shape[0]).mean()
        ),
        (2, 5, 4),
        NONE | {"bias": "."},
    ),
    "size": (Body(lambda m, x: rows(x).sum() / rows(x).shape[0]), (2, 5, 4), WIDE),
    "view": (Body(lambda m, x: rows(x).view(x.shape[0], 6, 5).sum((1, 2))), (2, 5, 4), WIDE),
    "ravel": (Body(lambda m, x: x.reshape(-1).view(x.shape[0], 5, 6).sum(2)), (2, 5, 4), WIDE),
    "unflatten": (Body(lambda m, x: rows(x).unflatten(0, (x.shape[0], 6)).sum(1)), (2, 5, 4), WIDE),
    "tokens": (
        Body(lambda m, x: m.last(torch.cat([m.bias.expand(x.shape[0], 1, -1), x, x.new_zeros(x.shape[0], 1, 6)], 1))),
        (2, 5, 4),
        ENDS | {"bias": "w"},
    ),
    "repeated token": (
        Body(lambda m, x: m.last(torch.cat([m.bias[None, None].repeat(x.shape[0], 1, 1), x], 1))),
        (2, 5, 4),
        ENDS | {"bias": "w"},
    ),
    "batch norm over heads": (
        Body(lambda m, x: F.batch_norm(rows(x), None, None, training=True).abs().mean(0)),
        (2, 5, 4),
        WIDE,
    ),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_with_a_dynamic_batch(name: str) -> None:
    module, shape, widens = CAPTURED[name]
    module = module.double()
    graph = capture(module, (torch.randn(shape, dtype=torch.float64),), mode="eval")
    analysis = analyse({GRAPH: graph})
    assert not analysis.faults
    x = torch.randn(3, *shape[1:], dtype=torch.float64)
    expected = graph(x)
    for label, plan, full in plans(analysis):

        def tensor(name: str, old: Tensor, plan: Plan = plan) -> Tensor:
            shaped = plan.tensors[name]
            return nn.Parameter(shaped.scale(shaped.widen(old.detach())))

        actual = widen_graph(plan, GRAPH, tensor)(x)
        pairs = zip(expected, actual, strict=True) if isinstance(expected, tuple) else [(expected, actual)]
        assert [difference(a, b) for a, b in pairs if difference(a, b)] == [], label
        if full:
            found = {n: "".join("." if g is None else "w" for g in plan.tensors[n].gather) for n in analysis.parameters}
            assert found == {n: mask for n, mask in widens.items() if n in found}, label


# The cases notice when something is wrong


def ones(index: Tensor, of: Tensor, generator: torch.Generator, *, equal: bool) -> Tensor:
    del of, generator, equal
    return torch.ones(len(index), dtype=torch.float64)


def contracts(plan: Plan) -> bool:
    """Whether some operand is multiplied by alpha."""
    stated = [e for node in plan.analysis.graphs[GRAPH].effects.values() for e in node if isinstance(e, Contract)]
    return any(vector is not None for effect in stated for vector in effect.vectors(plan.widening))


def test_alpha_of_ones_is_noticed_in_every_contraction() -> None:
    tried = 0
    for checked in map(checked_case, range(len(CASES))):
        with patch("gpd_fx.plan.plan._shares", ones):
            plan = make_plan(checked.analysis, 2.0)
        if contracts(plan):
            tried += 1
            assert problems(checked, plan), checked.case
    assert tried > 90


def widths(plan: Plan) -> dict[Atom, int]:
    return {atom: len(copies.gather) for atom, copies in plan.widening.copies.items()}


def test_dropping_equal_multiplicities_is_noticed_in_every_statistic() -> None:
    tried = 0
    for checked in map(checked_case, range(len(CASES))):
        right = make_plan(checked.analysis, 1.5)
        wrong = make_plan(replace(checked.analysis, equal=[]), 1.5)
        if widths(wrong) != widths(right):
            tried += 1
            assert problems(checked, wrong), checked.case
    assert tried > 40


EFFECTS = [kind for _, kind in inspect.getmembers(effects, inspect.isclass) if "apply" in vars(kind)]


@pytest.mark.parametrize("effect", [kind for kind in EFFECTS if kind.__name__ != "Effect"])
def test_each_effect_is_needed(effect: type) -> None:
    with patch.object(effect, "apply", lambda *_: None):
        for checked in map(checked_case, range(len(CASES))):
            stated = [e for node in checked.analysis.graphs[GRAPH].effects.values() for e in node]
            if any(isinstance(e, effect) for e in stated) and problems(checked, make_plan(checked.analysis, 1.5)):
                return
    pytest.fail("no case fails without it")


# Reading rules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n c, c -> n", "loses nothing"),
        ("n c -> n", "loses c: mark it"),
        ("n -> n c", "makes c out of nothing"),
        ("n c! -> n c", "cannot read"),
    ],
)
def test_a_faulty_rule_is_refused_when_it_is_read(text: str, message: str) -> None:
    if message == "loses nothing":
        Einsum(text)
        return
    with pytest.raises(ValueError, match=message):
        Einsum(text)


def test_ops_of_other_namespaces_and_functions_have_no_rule() -> None:
    assert rule_of(len) is None
    assert rule_of(torch.ops.prim.device.default) is None


def test_a_rule_that_raises_costs_width_and_is_reported() -> None:
    def broken(site: object) -> None:
        raise ValueError("broken on purpose")

    with patch("gpd_fx.plan.analysis.rule_of", lambda _: broken):
        checked = Checked.of(case("matmul.default", "", A(2, 3), A(3, 4)))
    assert "broken on purpose" in checked.analysis.faults[0].text
    for _, plan, _ in plans(checked.analysis):
        assert not plan.widening.copies
        assert checked.problems(plan) == []
