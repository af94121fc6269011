"""FLOPs from axis expressions against torch's own counter, and the costs of channel groups against whole expansions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import gpd_fx
from bench.zoo.check import randomise, switch_off_randomness
from bench.zoo.handwritten import MODELS
from gpd_fx.axes.expressions import Expr
from gpd_fx.axes.widening import Widening
from gpd_fx.passes.widen import GRAPH
from gpd_fx.plan.analysis import PRIMES, analyse
from gpd_fx.plan.costs import contractions, network_flops
from gpd_fx.plan.plan import make_plan
from gpd_fx.teacher.study import make_draft, study_model


class Convs(nn.Module):
    """Grouped, depthwise, transposed and strided convs, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.grouped = nn.Conv2d(6, 9, 3, groups=3, padding=1)
        self.depthwise = nn.Conv2d(9, 9, (1, 5), groups=9, padding=(0, 2))
        self.up = nn.ConvTranspose2d(9, 6, 2, stride=2, groups=3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.depthwise(self.grouped(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    """One attention by its op, one by matmul, one by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(10, 3 * 2 * 4)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        a = functional.scaled_dot_product_attention(q, k, v)
        b = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        c = torch.einsum("bhmn,bhnd->bhmd", torch.einsum("bhmd,bhnd->bhmn", q, k), v)
        return self.out((a + b + c).transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    """Two layers in both directions, with a projection, and one of each other kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=4, batch_first=True)
        self.gru, self.rnn = nn.GRU(8, 7, batch_first=True), nn.RNN(7, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.gru(self.lstm(x)[0])[0])[0]


CASES = [(Convs(), (2, 3, 17, 13)), (Attention(), (2, 7, 10)), (Recurrent(), (2, 9, 5))]


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def counted(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> int:
    """What torch counts in one call."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    older = {} if fused in flop_registry else {fused: _attention}  # which do not know the fused attention of the CPU
    with FlopCounterMode(display=False, custom_mapping=older) as counter, torch.no_grad():
        graph(*args, **kwargs)
    return counter.get_total_flops()


def ours(work: Sequence[Sequence[Expr]], widening: Widening, batch: int) -> int:
    """The same from axes; what does not depend on the batch is computed once a call."""
    whole = [2 * prod(map(widening.size, axes)) for axes in work]
    return sum(n // PRIMES[0] * batch if n % PRIMES[0] == 0 else n for n in whole)


@pytest.mark.parametrize(("model", "shape"), CASES, ids=["convs", "attention", "recurrent"])
@pytest.mark.parametrize("ratio", [2.0, 1.5])
def test_flops_are_those_that_torch_counts(model: nn.Module, shape: tuple[int, ...], ratio: float) -> None:
    image = torch.randn(shape)
    graph = gpd_fx.capture(model.eval(), (image,))
    plan = make_plan(analyse({GRAPH: graph}), ratio)
    wide = gpd_fx.passes.Widen(ratio)(graph).graph_module
    assert network_flops(plan) == (counted(graph, image) // 2, counted(wide, image) // 2)


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_whole_models_are_those_that_torch_counts(name: str) -> None:
    model = switch_off_randomness(randomise(MODELS[name].build().double())).eval()
    args, kwargs = MODELS[name].inputs()
    draft = make_draft(study_model(model, args, kwargs), 2.0)
    facts = draft.plan.analysis.graphs["eval"]
    work = contractions(draft.plan, facts)
    assert ours(work, Widening(draft.plan.analysis.solver, {}), 2) == counted(facts.module, *args, **kwargs)


def test_a_group_costs_what_holding_it_back_saves() -> None:
    image = torch.randn(2, 3, 17, 13)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.ReLU(), nn.Conv2d(7, 4, 3))
    whole = gpd_fx.inspect_model(model, 2.0, (image,))
    held = gpd_fx.inspect_model(model, {"*": 2.0, "2.*": 1.0}, (image,))
    groups = {group.name: group for group in whole.groups}
    (lost,) = groups.keys() - {group.name for group in held.groups}
    assert groups[lost].added_parameters == whole.teacher_parameters - held.teacher_parameters
    assert groups[lost].added_flops == whole.teacher_flops - held.teacher_flops
