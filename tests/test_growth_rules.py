"""Rules under growth: an op of copies of what was widened, and then trained, gives copies of what it gave there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gpd_fx.axes.expressions import Expr
from gpd_fx.axes.widening import Widening, parents
from gpd_fx.passes.widen import GRAPH, widen_graph
from gpd_fx.plan.plan import Plan, make_plan
from gpd_fx.teacher.study import study_model
from tests.rule_harness import Checked, difference, values
from tests.test_rules import CASES, checked_case, contracts

STEPS = [(2.0, 4.0), (2.0, 3.0), (1.5, 2.0), (1.34, 2.67)]

pytestmark = pytest.mark.filterwarnings(
    "ignore:The use of `x.T` on tensors",  # numpy_T, which captures contain
    "ignore:.*degrees of freedom is <= 0",  # of one element, which must stay NaN
)


def test_shares_are_divided_exactly() -> None:
    """In every floating dtype, and unequally."""
    study = study_model(nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)), (torch.randn(2, 3),))
    plan = make_plan(study.analysis, 1.0)
    for ratio in (1.5, 2.0, 2.0, 3.0, 7.0, 30.0):
        base, plan = plan, make_plan(study.analysis, ratio, base=plan, seed=int(ratio))
        (atom,) = plan.widening.copies
        old, new = ((each.widening.gather((atom,)), each.widening.alpha((atom,))) for each in (base, plan))
        index = parents(new[0], old[0])
        assert old[0][index].equal(new[0])
        assert index[: len(old[0])].equal(torch.arange(len(old[0])))
        assert torch.zeros_like(old[1]).index_add(0, index, new[1]).equal(old[1])
        assert bool((new[1] > 0).all())
        assert all(new[1].to(dtype).double().equal(new[1]) for dtype in (torch.bfloat16, torch.float16, torch.float32))
        shares = new[1] / old[1][index]
        assert len(shares.unique()) > (len(shares) - len(old[1])) / 2


def trained(plan: Plan) -> dict[str, Tensor]:
    """Values of every wide parameter, no two copies alike; signs stay."""
    generator = torch.Generator().manual_seed(2)
    found: dict[str, Tensor] = {}
    for name, old in plan.analysis.parameters.items():
        wide = plan.tensors[name].widen(old.detach())
        found[name] = wide * (0.7 + 0.6 * torch.rand(wide.shape, generator=generator, dtype=torch.float64))
    return found


def again(tensor: Tensor, axes: list[Expr], old: Widening, new: Widening) -> Tensor:
    """Copies of what a tensor of the old widening holds."""
    for dim, axis in enumerate(axes):
        if new.widens(axis):
            tensor = tensor.index_select(dim, parents(new.gather(axis), old.gather(axis)))
    return tensor


def problems(checked: Checked, first: Plan, then: Plan) -> list[str]:
    """What differs between the graph grown further and copies of the results of the first."""

    def run(plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        def tensor(name: str, old: Tensor) -> Tensor:
            assert tensors[name].shape == plan.tensors[name].widen(old).shape
            return nn.Parameter(plan.tensors[name].scale(tensors[name]))

        return values(widen_graph(plan, GRAPH, tensor), checked.graph.inputs)

    known = trained(first)
    tensors = checked.analysis.tensors
    more = {name: again(value, tensors[name], first.widening, then.widening) for name, value in known.items()}
    expected, actual = run(first, known), run(then, more)
    found: list[str] = []
    for probe in checked.graph.probes:
        copied = again(expected[probe.name], checked.axes(probe), first.widening, then.widening)
        wrong = difference(copied, actual[probe.name])
        found += [f"{probe.name}: {wrong}"] if wrong else []
    return found


def plans(checked: Checked, ratio: float, then: float) -> tuple[Plan, Plan]:
    first = make_plan(checked.analysis, ratio, seed=1)
    return first, make_plan(checked.analysis, then, seed=2, base=first)


@pytest.mark.parametrize(("ratio", "then"), STEPS)
def test_what_grew_gives_copies_of_what_there_was(ratio: float, then: float) -> None:
    tried = 0
    for k in range(len(CASES)):
        checked = checked_case(k)
        first, second = plans(checked, ratio, then)
        tried += bool(second.widening.copies)
        assert problems(checked, first, second) == [], CASES[k]
    assert tried > 200


def test_shares_that_are_drawn_anew_are_noticed() -> None:
    """What parts in training must keep its share: a plan without a base is wrong wherever something is contracted."""
    tried = wrong = 0
    for k in range(len(CASES)):
        checked = checked_case(k)
        first = make_plan(checked.analysis, 2.0, seed=1)
        if contracts(first):
            tried += 1
            wrong += bool(problems(checked, first, make_plan(checked.analysis, 4.0, seed=2)))
    assert tried > 90
    assert wrong >= 0.9 * tried
