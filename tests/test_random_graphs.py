"""Laws of expand and fold on random models.

These are a few dozen models, the same ones every time, and each op that models are drawn from. `python -m bench.fuzz`
takes as many as one likes, and prints each failure as the smallest model that shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import gpd_fx
from gpd_fx.axes.expressions import Expr
from gpd_fx.axes.widening import Widening
from gpd_fx.passes import (
    Branch,
    Fold,
    Merge,
    Pipeline,
    Widen,
)
from gpd_fx.rules.effects import Linear
from gpd_fx.verify.verification import relative_error
from tests import test_regressions
from tests.graph_check import RATIOS, Setting, WrongError, check, nudge, open_batch
from tests.graph_laws import check_growth, check_laws, check_outputs, check_step, close, expand, quiet, same_state
from tests.graph_parts import OPS, WEIGHTS
from tests.graph_shrink import as_code, shrink
from tests.graph_trials import draw_trial
from tests.graphs import NUMBERS, PICKS, SOURCES, Program, RandomNet, Step, example

FREEZING = {"channel_conv", "local_response_norm", "ordered", "pick", "pixel_shuffle", "rearrange"}
Test = TypeVar("Test", bound=Callable[..., None])
_NUMBERS = st.tuples(*[st.integers(0, NUMBERS - 1)] * PICKS)
_STEPS = st.builds(Step, st.sampled_from([name for name in OPS for _ in range(WEIGHTS[name])]), _NUMBERS)
_PROGRAMS = st.builds(
    Program,
    st.sampled_from(SOURCES),
    _NUMBERS,
    st.lists(_STEPS, min_size=1, max_size=10).map(tuple),
    _NUMBERS,
    st.integers(0, 3),
)


def amount(examples: int) -> Callable[[Test], Test]:
    """So many models, the same ones every time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@amount(40)
@given(_PROGRAMS, st.sampled_from(RATIOS))
def test_laws(program: Program, ratio: float) -> None:
    check_laws(program, ratio)


@amount(8)
@given(_PROGRAMS, st.sampled_from(RATIOS))
def test_laws_of_saving(tmp_path_factory: pytest.TempPathFactory, program: Program, ratio: float) -> None:
    with quiet():
        teacher = check_step(program, expand(program, ratio)[1])
        path = tmp_path_factory.mktemp("saved") / "teacher"
        gpd_fx.save(teacher, path)
        fresh = RandomNet(program)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.add_(1)
        loaded = gpd_fx.load(path, fresh).eval()
        same_state(teacher.state_dict(), loaded.state_dict())
        inputs = example(program, 3, 6)
        with torch.no_grad():
            for ours, theirs in zip(teacher.both(*inputs), loaded.both(*inputs), strict=True):
                assert relative_error(ours, theirs) == 0


@amount(12)
@given(_PROGRAMS, st.sampled_from([(2.0, 4.0), (2.0, 3.0), (1.5, 2.0), (1.3, 2.6)]))
def test_laws_of_growth(program: Program, ratios: tuple[float, float]) -> None:
    with quiet():
        teacher = check_step(program, expand(program, ratios[0])[1])
        if all(open_batch(graph) for graph in teacher.graphs.values() if isinstance(graph, fx.GraphModule)):
            check_growth(program, teacher, ratios[1])


@amount(8)
@given(_PROGRAMS, st.sampled_from(RATIOS))
def test_laws_of_passes(program: Program, ratio: float) -> None:
    """Widening, branching, merging and folding a captured graph gives the graph."""
    with quiet():
        model = RandomNet(program).eval()
        graph = gpd_fx.capture(model, example(program, 2, 0))
        wide = Widen(ratio)(graph).graph_module
        folded = Pipeline((Branch(), Merge(), Fold()))(wide).graph_module
        assert folded.code == graph.code
        for name, tensor in graph.state_dict().items():
            assert relative_error(tensor, folded.state_dict()[name]) <= 1e-12, name
        inputs = example(program, 3, 7)
        with torch.no_grad():
            close(graph(*inputs), wide(*inputs), lambda: graph(*nudge(inputs)), "the wide graph")


@pytest.mark.parametrize("name", OPS)
def test_every_op(name: str) -> None:
    """Each op of the generator does apply, is exact, and lets channels widen unless it is known not to."""
    zeros = (0,) * PICKS
    for source in ("image", "line", "tokens", "vector"):
        program = Program(source, zeros, (Step(name, zeros),), zeros)
        if name in RandomNet(program).names:
            with quiet():
                model, teacher = expand(program, 1.5)
                check_outputs(model, teacher, program)
            assert (teacher.report().coverage == 0) == (name in FREEZING), str(teacher.report())
            return
    raise AssertionError("it applies to no input")


def test_programs_build_the_same_model_twice() -> None:
    program = Program("image", (3,) * PICKS, tuple(Step(name, (5,) * PICKS) for name in OPS), (1,) * PICKS)
    first, second = RandomNet(program), RandomNet(program)
    assert len(first.names) > 30
    assert first.names == second.names
    same_state(first.state_dict(), second.state_dict())


def test_trials_are_the_same_ones_each_time() -> None:
    assert draw_trial(3, 5) == draw_trial(3, 5)
    assert draw_trial(3, 5) != draw_trial(3, 6)
    assert draw_trial(4, 5) != draw_trial(3, 5)


@pytest.mark.parametrize("number", [0, 1, 2, 24])
def test_trials_pass(number: int) -> None:
    trial = draw_trial(0, number)
    assert trial.modes == (("eval", "train") if number % 4 == 0 else ("eval",))
    assert trial.laws == (number == 24)
    found = trial.run()
    assert found.nodes > 2
    assert found.ops


def test_a_wrong_share_is_found_made_small_and_written_down() -> None:
    """With all shares alpha one, every contraction of widened channels is wrong."""

    def ones(widening: Widening, expr: Expr) -> Tensor:
        return torch.ones(widening.size(expr), dtype=torch.float64)

    trial = next(t for t in (draw_trial(0, k) for k in range(50)) if len(t.program.steps) > 5)
    trial.run()
    with mock.patch.object(Widening, "alpha", ones):
        with pytest.raises(WrongError, match="wrong in eval mode"):
            trial.run()
        small = shrink(trial)
    assert small.program.steps == ()
    assert small.settings == (Setting(2.0),)
    assert small.modes == ("eval",)
    small.run()
    text = as_code(small, "shares")
    found: dict[str, Any] = {}
    exec(text, vars(test_regressions) | found, found)
    found["test_shares"]()
    with mock.patch.object(Widening, "alpha", ones), pytest.raises(WrongError):
        found["test_shares"]()


def test_conditioning_does_not_hide_a_wrong_ratio() -> None:
    """A sum over channels that is not divided by the number of copies."""
    program = Program("image", (0,) * PICKS, (Step("reduce", (0, 0, 0, 1, 0, 0, 0, 0)),), (0,) * PICKS)
    model = RandomNet(program).eval()
    with mock.patch.object(Linear, "apply"), pytest.raises(WrongError):
        check(model, lambda batch: example(program, batch, batch))
    check(model, lambda batch: example(program, batch, batch))
