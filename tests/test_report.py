"""The expansion report: groups by block, what alike blocks share, JSON and Markdown."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from torch import Tensor, nn

import gpd_fx
from gpd_fx.fxtools.name_patterns import pattern, span
from gpd_fx.plan.frozen_axes import FrozenAxis
from gpd_fx.report.report_data import ChannelGroup


class Layer(nn.Module):
    """A residual block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.second = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.norm(self.first(x))))


class Net(nn.Module):
    """Alike blocks on one residual stream."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.body = nn.Sequential(*(Layer(6, 10) for _ in range(blocks)))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


IMAGE = (torch.randn(2, 3, 6, 5),)


@pytest.fixture(scope="module")
def report() -> gpd_fx.ExpansionReport:
    return gpd_fx.inspect_model(Net(3), 2.0, IMAGE)


# ------------------------------------------------------------------------------------------------------- blocks


def test_groups_stand_under_the_block_that_has_all_of_their_parameters(report: gpd_fx.ExpansionReport) -> None:
    blocks = {block.path: [group.name for group in block.groups] for block in report.blocks()}
    assert blocks == {"": ["stem.weight[0]"]} | {f"body.{k}": [f"body.{k}.first.weight[0]"] for k in range(3)}


def test_a_block_is_the_innermost_module_around_a_group() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a": nn.Sequential(Net(2), nn.ReLU()), "ab": Layer(5, 4)})
            self.last = nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.parts["ab"](self.parts["a"](x)[:, :, None, None]))

    made = gpd_fx.inspect_model(Both(), 2.0, IMAGE)
    paths = [path for path, _ in Both().named_modules()]
    for block in made.blocks():
        assert block.path in paths
        for group in block.groups:
            around = [
                path for path in paths if all(name.startswith(f"{path}." if path else "") for name in group.parameters)
            ]
            assert max(around, key=len) == block.path
    assert [block.path for block in made.blocks()] == [
        "parts.a.0",
        "parts.a.0.body.0",
        "parts.a.0.body.1",
        "",
        "parts.ab",
    ]


def test_blocks_share_out_all_groups_and_their_costs(report: gpd_fx.ExpansionReport) -> None:
    blocks = report.blocks()
    assert sorted(g.name for b in blocks for g in b.groups) == sorted(g.name for g in report.groups)
    assert sum(block.added_parameters for block in blocks) == sum(group.added_parameters for group in report.groups)
    assert sum(block.added_flops for block in blocks) == sum(group.added_flops for group in report.groups)
    inner = next(block for block in blocks if block.path == "body.1")
    assert inner.added_parameters == 10 * 12 * 9 + 3 * 10 + 10 * 12  # first's and its norm's, and second's


def test_a_hundred_alike_blocks_take_no_more_lines_than_three(report: gpd_fx.ExpansionReport) -> None:
    many = gpd_fx.inspect_model(Net(100), 2.0, IMAGE)
    assert len(many.blocks()) == 101
    assert len(str(many).splitlines()) == len(str(report).splitlines()) < 30
    assert len(many.to_markdown().splitlines()) == len(report.to_markdown().splitlines())
    assert "body.{0..99}, 100 blocks" in str(many)
    one = report.blocks()[1]
    row = re.search(r"10 -> 20 +100 +\+([\d,]+) +\+([\d,]+) +first\.weight\[0\]", str(many))
    assert row is not None
    assert [int(number.replace(",", "")) for number in row.groups()] == [
        100 * one.added_parameters,
        100 * one.added_flops,
    ]


def test_blocks_that_differ_in_width_have_lines_of_their_own() -> None:
    model = nn.Sequential(Layer(4, 6), Layer(4, 6), Layer(4, 7))
    text = str(gpd_fx.inspect_model(nn.Sequential(nn.Conv2d(3, 4, 1), model, nn.Conv2d(4, 2, 1)), 2.0, IMAGE))
    assert "1.{0,1}, 2 blocks" in text
    assert "6 -> 12       2" in text
    assert "7 -> 14       1" in text


# -------------------------------------------------------------------------------------------------------- spans

NAMES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=12, unique=True)


def written_out(name: str) -> list[str]:
    """What a shell would make of the braces."""
    pieces = re.split(r"\{([^}]*)\}", name)
    for k in range(1, len(pieces), 2):
        low, dots, high = pieces[k].partition("..")
        pieces[k] = ",".join(map(str, range(int(low), int(high) + 1))) if dots else pieces[k]
    choices = [piece.split(",") if k % 2 else [piece] for k, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]


@given(NAMES)
def test_a_span_names_those_and_no_others(numbers: list[tuple[int, int]]) -> None:
    names = [f"layer{i}.{j}.conv2.weight[0]" for i, j in numbers]
    made = span(names)
    if " and " in made:
        assert made == f"{names[0]} and {len(names) - 1} like it"
        assert len({i for i, _ in numbers}) * len({j for _, j in numbers}) > len(names)
    else:
        assert sorted(written_out(made)) == sorted(names)


def test_patterns_leave_dimensions_alone() -> None:
    assert pattern("blocks.11.conv2.weight[0]") == "blocks.*.conv*.weight[0]"
    assert span(["a.0.w[1]", "a.1.w[1]", "a.1.w[1]"]) == "a.{0,1}.w[1]"
    assert span(["a"]) == "a"


# --------------------------------------------------------------------------------------------- JSON and Markdown


def test_json_gives_the_same_back() -> None:
    made = gpd_fx.expand(Net(2), {"*": 2, "stem.*": 3}, IMAGE, exclude=["body.1.*"], verify=False).report()
    data = made.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["groups"][0]["name"] == made.groups[0].name
    assert {"added_parameters", "added_flops", "block", "channels", "parameters", "wide"} < set(data["groups"][0])
    assert data["blocks"] == [
        {
            "path": block.path,
            "groups": [group.name for group in block.groups],
            "added_parameters": block.added_parameters,
            "added_flops": block.added_flops,
        }
        for block in made.blocks()
    ]
    assert data["ratio"] == {"*": 2, "stem.*": 3}
    assert data["notes"] == list(made.notes)
    assert len(data["notes"]) > 0
    assert data["branches"].keys() == made.branches.keys()


def cells(page: str) -> list[list[str]]:
    """The rows of all tables, as a Markdown parser reads them."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(page):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level >= 4:
            assert token.children is not None
            assert {child.type for child in token.children} <= {"text", "code_inline", "text_special"}, token.content
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def test_markdown_holds_the_same_numbers(report: gpd_fx.ExpansionReport) -> None:
    rows = cells(report.to_markdown())
    small, big = report.student_parameters, report.teacher_parameters
    assert ["parameters", f"{small:,}", f"{big:,}", f"x{big / small:.2f}"] in rows
    stream, inner = report.groups[0], report.groups[1]
    cost = [f"+{stream.added_parameters:,}", f"+{stream.added_flops:,}"]
    assert ["the whole model", "6 -> 12", "1", *cost, "stem.weight[0]"] in rows
    cost = [f"+{3 * inner.added_parameters:,}", f"+{3 * inner.added_flops:,}"]
    assert ["body.{0..2}, 3 blocks", "10 -> 20", "3", *cost, "first.weight[0]"] in rows
    assert any(row[1:3] == ["output at linear", "it is an output of the model"] for row in rows)


HARD = ["a|b", "`", "``x`", "<b>&amp;", "**bold**_x_", "[a](b)", "\\", "~~x~~", "a\nb", "$x$", "#1", "ünï→"]


@pytest.mark.parametrize("word", HARD)
def test_markdown_shows_every_name_and_reason_as_it_is(report: gpd_fx.ExpansionReport, word: str) -> None:
    made = replace(
        report,
        model=word,
        groups=(ChannelGroup(f"{word}.w[0]", 2, 4, (f"{word}.w",)),),
        frozen=(FrozenAxis("op", "node", word, (f"{word}[0]",), 7),),
        skipped={word: {"kxk": word}},
        notes=(f"{word} end",),
    )
    page, plain = made.to_markdown(), word.replace("\n", " ")
    rows = cells(page)
    assert [plain, "2 -> 4", "1", "+0", "+0", "w[0]"] in rows
    assert ["7", "op at node", plain, f"{plain}[0]"] in rows
    assert ["kxk", plain, plain] in rows
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    inline = [token.children for token in tokens if token.type == "inline" and token.children]
    texts = ["".join(child.content for child in children) for children in inline]
    assert texts[0] == f"Expansion of {plain}"
    assert texts[-1] == f"{plain} end"
    assert not any(child.type.startswith(("html", "link", "strong", "em")) for children in inline for child in children)


def test_alike_notes_are_told_twice() -> None:
    made = gpd_fx.inspect_model(Net(8), 2.0, IMAGE, exclude=["body.*.second.weight"])
    assert len(made.notes) == 9  # the stream, and the inside of each block
    shown = [line for line in str(made).splitlines() if line.startswith("note: the 10 channels of body.")]
    assert [line.split(".")[1] for line in shown] == ["0", "1"]
    assert shown[1].endswith(" -- and 6 more notes like this one, for other blocks")
    assert made.to_markdown().count("\n- the 10 channels of body.") == 2
    assert made.to_dict()["notes"] == list(made.notes)


def test_an_empty_report() -> None:
    with pytest.warns(gpd_fx.GPDWarning, match="nothing in ReLU widens"):
        made: Any = gpd_fx.expand(nn.ReLU(), 2.0, (torch.randn(2, 3),)).report()
    assert made.blocks() == ()
    assert json.loads(json.dumps(made.to_dict()))["blocks"] == []
    assert "## Widened" not in made.to_markdown()
    assert cells(made.to_markdown())[1] == ["parameters", "0", "0", "-"]
