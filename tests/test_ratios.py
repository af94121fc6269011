"""Per-glob ratios, exclusion, and what must give way to what is tied together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gpd_fx


class Residual(nn.Module):
    """Two convs into one residual stream, and a layer norm over it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.inner = nn.Conv2d(6, 10, 3, padding=1)
        self.outer = nn.Conv2d(10, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(self.norm(x.mean((2, 3))))


EXAMPLE = (torch.randn(2, 3, 7, 5),)


def widths(report: gpd_fx.ExpansionReport) -> dict[str, int]:
    return {group.name: group.wide for group in report.groups}


def test_globs_widen_only_what_they_match() -> None:
    report = gpd_fx.inspect_model(Residual(), {"inner.*": 1.5}, EXAMPLE)
    assert widths(report) == {"inner.weight[0]": 15}
    assert not report.notes


def test_the_last_matching_glob_counts() -> None:
    assert widths(gpd_fx.inspect_model(Residual(), {"*": 3, "stem.*": 1, "outer.*": 1, "norm.*": 1}, EXAMPLE)) == {
        "inner.weight[0]": 30
    }


def test_channels_that_are_added_have_the_larger_ratio_and_the_report_says_so() -> None:
    report = gpd_fx.inspect_model(Residual(), {"stem.*": 3}, EXAMPLE)
    assert widths(report) == {"stem.weight[0]": 18}
    (note,) = report.notes
    assert note == (
        "the 6 channels of outer.weight[0] get ratio 3, because aten.add.Tensor at node add makes them the same as "
        "those of stem.weight[0], of which 'stem.*' asks 3; no glob matches outer.weight[0] (likewise outer.bias[0], "
        "norm.weight[0], norm.bias[0])"
    )


def test_every_glob_that_gives_way_is_named() -> None:
    report = gpd_fx.inspect_model(Residual(), {"*": 2, "outer.*": 4, "norm.bias": 3}, EXAMPLE)
    assert widths(report) == {"stem.weight[0]": 24, "inner.weight[0]": 20}
    assert report.notes == (
        "the 6 channels of stem.weight[0] get ratio 4, because aten.add.Tensor at node add makes them the same as "
        "those of outer.weight[0], of which 'outer.*' asks 4; '*' asks 2 of stem.weight[0] (likewise stem.bias[0], "
        "norm.weight[0])",
        "the 6 channels of norm.bias[0] get ratio 4, because aten.layer_norm.default at node layer_norm makes them the "
        "same as those of outer.weight[0], of which 'outer.*' asks 4; 'norm.bias' asks 3 of norm.bias[0]",
    )


def test_a_glob_that_changes_nothing_is_named() -> None:
    report = gpd_fx.inspect_model(Residual(), {"inner.*": 3, "*": 1.5, "head.*": 2}, EXAMPLE)
    assert (
        "the ratio 3 of 'inner.*' is never used: of the globs that match a name the last counts, and '*' behind it "
        in (report.notes[-2])
    )
    assert report.notes[-1] == (
        "the ratio 2 of 'head.*' widens nothing: head.weight[0] stays as it is, because it is an output of the model "
        "(output at linear)"
    )


def test_a_ratio_too_small_to_add_a_channel_is_named() -> None:
    report = gpd_fx.inspect_model(Residual(), {"inner.*": 1.04}, EXAMPLE)
    assert widths(report) == {}
    assert report.notes == (
        "the ratio 1.04 of 'inner.*' widens nothing: inner.weight[0] stays as it is, because its expansion ratio is "
        "1.04: 10 channels stay 10 (ratio at inner.weight[0])",
    )


def test_a_normalised_stream_gets_a_whole_ratio_and_the_report_says_why() -> None:
    report = gpd_fx.inspect_model(Residual(), 1.5, EXAMPLE)
    assert widths(report) == {"stem.weight[0]": 12, "inner.weight[0]": 15}
    assert report.notes == (
        "the 6 channels of stem.weight[0] get ratio 2 instead of 1.5, because aten.layer_norm.default at node "
        "layer_norm takes statistics over them: it needs one whole ratio",
    )


class Joined(nn.Module):
    """Two convs side by side under one layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 6)
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.cat([self.left(x), self.right(x)], -1)))


def test_statistics_over_two_groups_give_both_the_larger_ratio() -> None:
    report = gpd_fx.inspect_model(Joined(), {"left.*": 1.5, "right.*": 2.5}, (torch.randn(2, 3),))
    assert widths(report) == {"left.weight[0]": 12, "right.weight[0]": 18}
    assert (
        "the 4 channels of left.weight[0] get ratio 3 instead of 1.5, because aten.layer_norm.default at node "
        "layer_norm takes statistics over them and those of right.weight[0], which have ratio 2.5: it needs one "
        "whole ratio"
    ) in report.notes


def test_statistics_over_a_part_that_stays_hold_the_rest() -> None:
    report = gpd_fx.inspect_model(Joined(), 2, (torch.randn(2, 3),), exclude=["left.*"])
    assert widths(report) == {}
    (entry,) = (entry for entry in report.frozen if entry.op == "aten.layer_norm.default")
    assert entry.reason == (
        "aten.layer_norm.default takes statistics over it, and part of that axis cannot widen (left.weight[0]: the "
        "glob 'left.*' excludes these channels)"
    )
    assert "right.weight[0]" in entry.channels


def test_excluded_parameters_keep_their_shapes() -> None:
    model = Residual()
    with pytest.warns(gpd_fx.GPDWarning, match="nothing in Residual widens"):  # outer holds both channel groups
        teacher = gpd_fx.expand(model, 2.0, EXAMPLE, exclude=["outer.*"])
    shapes = {plan.name: plan.wide_shape for plan in teacher.composition.plans}
    assert shapes["outer.weight"] == tuple(model.outer.weight.shape)
    assert widths(teacher.report()) == {}
    assert teacher.report().notes[:2] == (
        "the 6 channels of stem.weight[0] stay as they are, because aten.add.Tensor at node add makes them the same as "
        "those of outer.weight[0], which 'outer.*' excludes (likewise stem.bias[0], norm.weight[0], norm.bias[0])",
        "the 10 channels of inner.weight[0] stay as they are, because aten.conv2d.default at node conv2d_2 makes them "
        "the same as those of outer.weight[1], which 'outer.*' excludes (likewise inner.bias[0])",
    )
    teacher = gpd_fx.expand(model, 2.0, EXAMPLE, exclude=["stem.weight"])
    assert widths(teacher.report()) == {"inner.weight[0]": 20}
    assert any(entry.op == "exclude" and "stem.weight" in entry.reason for entry in teacher.report().frozen)


def test_exclusion_survives_save_and_load(tmp_path: object) -> None:
    model, path = Residual(), f"{tmp_path}/teacher.safetensors"
    teacher = gpd_fx.expand(model, 2.0, EXAMPLE, exclude=["stem.*"])
    gpd_fx.save(teacher, path)
    assert widths(gpd_fx.load(path, Residual()).report()) == widths(teacher.report())


def test_a_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(gpd_fx.ArgumentError, match=r"exclude glob 'stm\.\*' matches no parameter.*stem\.weight"):
        gpd_fx.inspect_model(Residual(), 2.0, EXAMPLE, exclude=["stm.*"])
    with pytest.raises(gpd_fx.ArgumentError, match=r"exclude is the string 'stem\.\*'; pass a list"):
        gpd_fx.inspect_model(Residual(), 2.0, EXAMPLE, exclude="stem.*")
