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
    assert any("outer.weight asks for 1" in note and "the same 6 channels" in note for note in report.notes), (
        report.notes
    )


def test_a_normalised_stream_gets_a_whole_ratio_and_the_report_says_why() -> None:
    report = gpd_fx.inspect_model(Residual(), 1.5, EXAMPLE)
    assert widths(report) == {"stem.weight[0]": 12, "inner.weight[0]": 15}
    assert any("ratio 2 instead of 1.5" in note and "layer_norm" in note for note in report.notes), report.notes


def test_excluded_parameters_keep_their_shapes() -> None:
    model = Residual()
    with pytest.warns(gpd_fx.GPDWarning, match="nothing in Residual widens"):  # outer holds both channel groups
        teacher = gpd_fx.expand(model, 2.0, EXAMPLE, exclude=["outer.*"])
    shapes = {plan.name: plan.wide_shape for plan in teacher.composition.plans}
    assert shapes["outer.weight"] == tuple(model.outer.weight.shape)
    assert widths(teacher.report()) == {}
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
