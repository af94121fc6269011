"""A plan as a file: a wide graph that was trained, saved and loaded in another process is folded by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gpd_fx
from gpd_fx.passes import Branch, Fold, Merge, Normalize, Widen, WideningPlan, plan_of

OTHER_PROCESS = """
import sys, torch, gpd_fx
from gpd_fx.passes import Fold, Normalize, WideningPlan
from tests.test_widening_plan import EXAMPLE, Net
wide = Normalize()(torch.export.load(sys.argv[1])).graph_module
source = gpd_fx.capture(Net().double(), EXAMPLE)
folded = Fold(WideningPlan.load(sys.argv[2]), source)(wide).graph_module
torch.save({name: p.detach() for name, p in folded.named_parameters()}, sys.argv[3])
"""
EXAMPLE = (torch.ones(2, 3, 7, 6, dtype=torch.float64),)


class Net(nn.Module):
    """A residual block with grouped channels, and a linear layer whose weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.twice, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        pooled = (x + self.grouped(x)).mean((2, 3))
        return self.head(self.twice(self.twice(pooled).tanh()))


def trained_wide(model: nn.Module) -> torch.fx.GraphModule:
    """Widened by an uneven ratio, with branches, parameters moved as training would, merged again."""
    wide = Widen(1.5)(gpd_fx.capture(model, EXAMPLE)).graph_module
    branched = Branch()(wide).graph_module
    with torch.no_grad():
        for parameter in branched.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Merge()(branched).graph_module


def test_another_process_folds_by_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().double()
    wide = trained_wide(model)
    expected = Fold()(wide).graph_module
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    torch.export.save(torch.export.export(wide, EXAMPLE, dynamic_shapes=batch), tmp_path / "wide.pt2")
    plan_of(wide).save(tmp_path / "plan.safetensors")
    files = [str(tmp_path / name) for name in ("wide.pt2", "plan.safetensors", "folded.pt")]
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, *files], check=True, cwd=Path(__file__).parent.parent)
    folded = torch.load(files[2], weights_only=True)
    assert folded.keys() == dict(model.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(folded[name], parameter), name
        assert not torch.equal(parameter, model.get_parameter(name)), name


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    plan = plan_of(Widen({"*": 1.5, "stem.*": 3.0})(gpd_fx.capture(Net(), (torch.ones(2, 3, 5, 5),))).graph_module)
    plan.save(tmp_path / "plan.safetensors")
    again = WideningPlan.load(tmp_path / "plan.safetensors")
    assert again.names == plan.names
    assert again.widens
    for name, one in plan.tensors.items():
        other = again.tensors[name]
        assert (other.shape, other.wide_shape) == (one.shape, one.wide_shape)
        for field in ("gather", "keep", "alpha"):
            for mine, theirs in zip(getattr(one, field), getattr(other, field), strict=True):
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs)


def test_files_that_are_no_plan_are_refused(tmp_path: Path) -> None:
    missing, text, foreign, damaged = (tmp_path / name for name in ("missing", "text", "foreign", "damaged"))
    text.write_text("a plan")
    save_file({"a": torch.ones(1)}, foreign)
    plan_of(Widen()(gpd_fx.capture(Net(), (torch.ones(2, 3, 5, 5),))).graph_module).save(damaged)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-40])
    for path, message in (
        (missing, "can be read"),
        (text, "can be read"),
        (foreign, "no plan"),
        (damaged, "can be read"),
    ):
        with pytest.raises(gpd_fx.CheckpointError, match=message):
            WideningPlan.load(path)


def test_a_graph_that_is_not_the_plans_is_refused() -> None:
    graph = gpd_fx.capture(Net().double(), EXAMPLE)
    wide = Widen(2.0)(graph).graph_module
    plan = plan_of(wide)
    with pytest.raises(gpd_fx.PassError, match=r"Fold\(plan, source\)"):
        Fold()(graph)
    with pytest.raises(gpd_fx.PassError, match="both plan and source"):
        Fold(plan)(wide)
    with pytest.raises(gpd_fx.PassError, match=r"'stem\.weight' is of shape \[6, 3, 3, 3\]"):
        Fold(plan, graph)(graph)
    with pytest.raises(gpd_fx.PassError, match=r"knows no tensor '0\.weight'"):
        Fold(plan, gpd_fx.capture(nn.Sequential(nn.Conv2d(3, 4, 1)), (torch.ones(2, 3, 5, 5),)))(wide)
    with pytest.raises(gpd_fx.PassError, match="run the pass Merge first"):
        Fold(plan, graph)(Branch()(wide).graph_module)
    normal = Normalize()(graph).graph_module
    assert torch.equal(Fold(plan, normal)(wide).graph_module(*EXAMPLE), graph(*EXAMPLE))
