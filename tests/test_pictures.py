"""Pictures of the graph: what each op's colour says, what is collapsed, where boxes lie, and the SVG itself."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import gpd_fx
from gpd_fx.passes.widen import GRAPH
from gpd_fx.plan.analysis import analyse
from gpd_fx.plan.frozen_axes import frozen_axes
from gpd_fx.plan.plan import make_plan
from gpd_fx.report.graph_picture import (
    BOXES,
    STATES,
    Op,
    boxes,
    trace,
)
from gpd_fx.report.layered_layout import arrange
from gpd_fx.report.svg import draw

SVG = "{http://www.w3.org/2000/svg}"


class Branchy(nn.Module):
    """Every state: a residual sum, channels of the input joined to wide ones, an op without a rule, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.join = nn.Conv2d(7, 8, 1)
        self.odd, self.after = nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scaled = (x - 0.5) * 2
        h = self.stem(scaled)
        h = h + self.body(h)
        h = self.join(torch.cat([h, scaled], 1)).mean((2, 3))
        left, right = self.odd(h).chunk(2, 1)
        q = torch.linalg.matrix_exp((left[:, :, None] * right[:, None]) * 0.1)
        return self.after(torch.cat([q.sum(1), q.sum(2)], 1))


IMAGE = torch.randn(2, 3, 6, 5)


def traced(model: nn.Module, *inputs: Tensor, ratio: float = 2.0) -> tuple[fx.GraphModule, tuple[Op, ...]]:
    graph = gpd_fx.capture(model.eval(), inputs)
    plan = make_plan(analyse({GRAPH: graph}), ratio)
    return graph, trace(plan, frozen_axes(plan))


class Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n.name] = tuple(result.shape)
        return result


# -------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("ratio", [2.0, 1.5])
def test_states_and_shapes_are_those_of_the_wide_graph(ratio: float) -> None:
    graph, ops = traced(Branchy(), IMAGE, ratio=ratio)
    wide = gpd_fx.passes.Widen(ratio)(graph).graph_module
    small, big = Shapes(graph), Shapes(wide)
    small.run(IMAGE)
    big.run(IMAGE)
    for op in ops:
        if op.name in small.found:
            pairs = list(zip(small.found[op.name], big.found[op.name], strict=True))
            assert op.shape == " × ".join(["N", *(str(a) if a == b else f"{a}→{b}" for a, b in pairs[1:])])
            assert (op.state in ("widened", "partly")) == any(a != b for a, b in pairs), op


def test_states() -> None:
    _, ops = traced(Branchy(), IMAGE)
    states = {op.name: op.state for op in ops}
    assert states["x"] == states["sub"] == states["mul"] == states["output"] == "plain"
    assert states["conv2d"] == states["batch_norm"] == states["relu"] == states["add"] == states["mean"] == "widened"
    assert states["cat"] == "partly"  # with the image's own channels
    assert states["conv2d_2"] == "widened"
    assert states["linear"] == "closes"
    assert states["linalg_matrix_exp"] == states["linear_1"] == "frozen"


def test_frozen_ops_say_why() -> None:
    _, ops = traced(Branchy(), IMAGE)
    found = {op.name: op for op in ops}
    text = draw(boxes(ops), "t", "s")
    assert ("it is an output of the model", "linear_1") in found["linear_1"].reasons
    reason = next(reason for reason, where in found["linear"].reasons if "matrix_exp" in where or "mul" in where)
    assert reason in text


def test_an_op_without_a_rule_is_named_and_marked() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.linalg.matrix_exp(torch.diag_embed(self.first(x))).sum(1))

    made = gpd_fx.inspect_model(Odd(), 2.0, (torch.randn(2, 3),))
    stop = max(made.frozen, key=lambda entry: entry.cost if entry.op.startswith("aten") else -1)
    marked = [op for op in made.graph if op.stops]
    assert [op.name for op in marked] == [stop.node]
    assert stop.reason in made.to_svg()
    first = next(op for op in made.graph if op.module == "first")
    assert first.reasons == ((stop.reason, f"{stop.op} at {stop.node}"),)


def test_excluded_parameters_are_frozen_in_the_picture() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1))
    made = gpd_fx.inspect_model(model, 2.0, (IMAGE,), exclude=["0.*"])
    first, second = (op for op in made.graph if op.module in ("0", "1"))
    assert (first.state, second.state) == ("frozen", "widened")
    assert first.reasons == (("the glob '0.*' excludes these channels", ""),)
    assert "the glob &#x27;0.*&#x27; excludes these channels" in made.to_svg()


def test_edges_are_those_of_the_graph() -> None:
    graph, ops = traced(Branchy(), IMAGE)

    def source(node: fx.Node) -> fx.Node:
        return source(node.args[0]) if node.target is operator.getitem else node  # pyright: ignore[reportArgumentType]  a node

    wanted = {
        (source(operand).name, node.name)
        for node in graph.graph.nodes
        for operand in node.all_input_nodes
        if node.target is not operator.getitem and operand.op != "get_attr"
    }
    assert {(ops[k].name, op.name) for op in ops for k in op.inputs} == wanted
    drawn = boxes(ops)
    assert len(drawn) == len(ops)
    assert {(ops[k].name, op.name) for op, box in zip(ops, drawn, strict=True) for k in box.edges} == wanted


def test_parameters_are_counted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.layer(x).relu()))

    model = Twice()
    _, ops = traced(model, torch.randn(2, 4))
    assert sum(op.parameters for op in ops) == sum(parameter.numel() for parameter in model.parameters())
    assert [op.parameters for op in ops if op.module == "layer"] == [20, 0]


# ----------------------------------------------------------------------------------------------------- collapsing


def test_modules_are_opened_as_deep_as_asked() -> None:
    _, ops = traced(Branchy(), IMAGE)
    top = boxes(ops, 1)
    assert [box.title for box in top if box.title in ("stem", "body", "join", "odd", "after")] == [
        "stem",
        "body",
        "join",
        "odd",
        "after",
    ]
    stem = next(box for box in top if box.title == "stem")
    assert stem.lines == ("3 ops, 24 parameters", "N × 4→8 × 6 × 5")
    assert {box.title for box in boxes(ops, 2)} >= {"stem.0", "stem.1", "stem.2"}
    (whole,) = (box for box in boxes(ops, 0) if box.title not in ("x", "output"))
    assert whole.state == "mixed"


@pytest.mark.parametrize("depth", [None, 0, 1, 2, 3, 9])
def test_every_op_is_in_one_box_and_edges_go_forward(depth: int | None) -> None:
    _, ops = traced(Branchy(), IMAGE)
    drawn = boxes(ops, depth)
    counts = [int(line.split(" ops")[0]) for box in drawn for line in box.lines if " ops" in line]
    assert sum(counts) <= len(ops)
    assert all(other < k for k, box in enumerate(drawn) for other in box.edges)
    assert all(box.state in STATES for box in drawn)


def test_a_module_that_is_called_twice_is_two_boxes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.layer(x) + 1.0))

    _, ops = traced(Twice(), torch.randn(2, 4))
    drawn = boxes(ops, 1)
    assert [box.title for box in drawn] == ["x", "layer", "add", "layer", "last", "output"]


def test_a_module_of_widened_and_frozen_ops_is_mixed() -> None:
    ops = (Op("a", "op", "m.a", "widened", "", ()), Op("b", "op", "m.b", "frozen", "", (0,)))
    (box,) = boxes(ops, 1)
    assert box.state == "mixed"
    assert "url(#mixed)" in draw((box,), "t", "s")
    for states, whole in [
        (("widened", "plain"), "widened"),
        (("closes", "plain"), "closes"),
        (("widened", "closes"), "widened"),
        (("widened", "partly"), "partly"),
        (("partly", "frozen"), "mixed"),
        (("frozen", "plain"), "frozen"),
    ]:
        (box,) = boxes(tuple(replace(op, state=state) for op, state in zip(ops, states, strict=True)), 1)
        assert box.state == whole


@pytest.mark.parametrize(
    "path",
    [
        lambda k: f"blocks.{k // 12}.{'attn' if k % 12 < 6 else 'mlp'}.{k % 6}",
        lambda k: "",
        lambda k: f"{k}",
        lambda k: f"a.{k}.b",
        lambda k: "deep." * (k % 9) + "m",
        lambda k: f"{'x' if k % 2 else 'y'}",
    ],
    ids=["transformer", "no modules", "flat", "flat inside", "nested", "alternating"],
)  # fmt: skip
def test_a_thousand_ops_are_few_boxes(path: Any) -> None:
    ops = tuple(Op(f"n{k}", "op", path(k), "widened", "", (k - 1,) if k else (), 1) for k in range(1000))
    drawn = boxes(ops)
    assert 10 < len(drawn) <= BOXES
    assert all(other < k for k, box in enumerate(drawn) for other in box.edges)
    found = sum(int(line.split()[-2].replace(",", "")) for box in drawn for line in box.lines if "parameters" in line)
    assert found == 1000
    if path(0).startswith("blocks"):
        assert [box.title for box in drawn] == [f"blocks.{{{k},{k + 1}}}" for k in range(0, 84, 2)]


# --------------------------------------------------------------------------------------------------------- layout


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[tuple[float, float]], list[tuple[int, int]]]:
    count = draw(st.integers(1, 14))
    sizes = [(draw(st.sampled_from([60.0, 300.0])), draw(st.sampled_from([20.0, 50.0]))) for _ in range(count)]
    pairs = [(a, b) for b in range(count) for a in range(b)]
    edges = [pair for pair in pairs if draw(st.booleans())] if len(pairs) < 20 else draw(
        st.lists(st.sampled_from(pairs), max_size=24, unique=True)
    )  # fmt: skip
    return sizes, edges


@given(dags())
@settings(max_examples=200)
def test_nothing_overlaps_and_edges_go_down(graph: tuple[list[tuple[float, float]], list[tuple[int, int]]]) -> None:
    sizes, edges = graph
    layout = arrange(sizes, edges)
    rects = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in zip(layout.centres, sizes, strict=True)]
    for k, (left, top, right, bottom) in enumerate(rects):
        assert left >= -1e-6
        assert top >= -1e-6
        assert right <= layout.width + 1e-6
        assert bottom <= layout.height + 1e-6
        for other in rects[:k]:
            assert left >= other[2] - 1e-6 or right <= other[0] + 1e-6 or top >= other[3] or bottom <= other[1]
    for a, b in edges:
        way = layout.lanes[a, b]
        heights = [rects[a][3], *(y for _, y in way), rects[b][1]]
        assert heights == sorted(heights)
        for (x, y), (x1, y1) in zip(way[::2], way[1::2], strict=True):  # straight through each layer between
            assert x == x1
            assert not any(left < x < right and top < y1 and bottom > y for left, top, right, bottom in rects)


def test_a_chain_stands_straight_and_what_passes_it_runs_beside_it() -> None:
    layout = arrange([(100.0, 20.0)] * 6, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (1, 4)])
    assert len({x for x, _ in layout.centres}) == 1
    (lane,) = {x for x, _ in layout.lanes[1, 4]}
    assert lane > layout.centres[0][0] + 50


def test_no_boxes() -> None:
    assert arrange([], []).height == 0
    ElementTree.fromstring(draw((), "nothing", ""))


# ------------------------------------------------------------------------------------------------------------ SVG


def test_the_svg_has_each_box_edge_and_colour_that_there_is() -> None:
    _, ops = traced(Branchy(), IMAGE)
    drawn = boxes(ops)
    root = ElementTree.fromstring(draw(drawn, "a title", "a line below"))
    words = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert words[:2] == ["a title", "a line below"]
    assert Counter(words) >= Counter(box.title for box in drawn)
    assert len([path for path in root.iter(f"{SVG}path") if path.get("class") == "e"]) == sum(
        len(box.edges) for box in drawn
    )
    states = {box.state for box in drawn}
    assert [state for state in STATES if STATES[state] in words] == [state for state in STATES if state in states]


def test_the_same_model_gives_the_same_picture() -> None:
    first, again = (gpd_fx.inspect_model(Branchy(), 2.0, (IMAGE,)) for _ in range(2))
    assert first.to_svg() == again.to_svg()
    assert first.graph == again.graph
    assert gpd_fx.expand(Branchy(), 2.0, (IMAGE,), verify=False).report().to_svg() == first.to_svg()
    assert "graph" not in first.to_dict()


@given(st.text(max_size=80))
@settings(max_examples=200)
def test_any_text_is_escaped(word: str) -> None:
    op = Op(word, word, word, "frozen", word, (), 1, True, ((word, word),))
    root = ElementTree.fromstring(draw(boxes((op,)), word, word))
    shown = next(root.iter(f"{SVG}text")).text or ""
    for mine, theirs in zip(word.replace("\r\n", "\n").replace("\r", "\n"), shown, strict=True):
        assert theirs in (mine, "\ufffd")


@pytest.mark.zoo
def test_pictures_of_real_models() -> None:
    models = pytest.importorskip("torchvision").models
    image = (torch.randn(2, 3, 64, 64),)
    made = gpd_fx.inspect_model(models.resnet18(), 2.0, image)
    drawn = boxes(made.graph)
    assert len(drawn) == len(made.graph) == 71
    assert Counter(box.state for box in drawn) == {"widened": 68, "closes": 1, "plain": 2}
    joins = [box for box in drawn if len(box.edges) == 2]
    assert [box.title for box in joins] == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    made = gpd_fx.inspect_model(models.densenet121(), 2.0, image)
    assert len(made.graph) > 400
    assert 10 < len(boxes(made.graph)) <= BOXES
    ElementTree.fromstring(made.to_svg(3))
