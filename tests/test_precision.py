"""Large models: checked in float32 against their own rounding error, with no more memory than both networks take."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import gpd_fx
from bench.zoo.check import randomise
from gpd_fx.api.expansion import make_teacher
from gpd_fx.axes.widening import Widening
from gpd_fx.errors import VerificationError
from gpd_fx.numerics import precision
from gpd_fx.numerics.precision import DOUBLE, LARGE, SINGLE, precision_for
from gpd_fx.rules.effects import Contract
from gpd_fx.teacher.study import make_draft, study_model
from gpd_fx.verify.verification import check_expansion, elements


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, those made before it apart."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]  the identity of a storage
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.alive -= self._seen.pop(key)


def wide_net() -> nn.Module:
    """Mostly parameters: activations weigh next to nothing."""
    layers: list[nn.Module] = [nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()]
    layers += [layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.Tanh())]
    return randomise(nn.Sequential(*layers, nn.LayerNorm(256), nn.Linear(256, 9)), 0)


def test_large_networks_are_told_by_the_bytes_of_both() -> None:
    plan = make_draft(study_model(nn.Linear(4, 3), (torch.randn(2, 4),)), 2.0).plan
    assert elements(plan) == 15 + 15  # input and output stay
    assert precision_for(LARGE // 8) is DOUBLE
    assert precision_for(LARGE // 8 + 1) is SINGLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_error_in_single_precision_is_the_models_own(dtype: torch.dtype) -> None:
    model = wide_net().to(dtype)
    draft = make_draft(study_model(model, (torch.randn(5, 64, dtype=dtype),)), 2.0)
    error = check_expansion(draft.plan, draft.study.captures, draft.graphs, draft, SINGLE)
    assert 1e-9 < error < 1e-5  # it was float32, and no more than rounding


@pytest.mark.parametrize("shift", [1e-3, -1e-2])
def test_an_error_just_beyond_rounding_is_found_in_single_precision(
    shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide_net()
    study = study_model(model, (torch.randn(5, 64),))
    plain = Contract.vectors

    def off(self: Contract, widening: Widening) -> list[Tensor | None]:
        vectors = plain(self, widening)
        return [None if v is None else v * (1 + shift) if len(v) == 512 else v for v in vectors]

    monkeypatch.setattr(Contract, "vectors", off)
    draft = make_draft(study, 2.0)
    with pytest.raises(VerificationError, match="first node that differs is 'linear_1'"):
        check_expansion(draft.plan, study.captures, draft.graphs, draft, SINGLE)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_expand_takes_little_more_than_both_networks(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "LARGE", 0)
    model = wide_net()
    with Ledger() as ledger:
        teacher = gpd_fx.expand(model, ratio, (torch.randn(2, 64),), branches=None)
    student = sum(p.nbytes for p in model.parameters())  # the ledger holds it too, from where it was first looked at
    wide = sum(p.nbytes for p in teacher.parameters())
    assert wide > 1.4 * student
    assert teacher.report().max_error is not None
    assert student + wide <= ledger.peak <= 1.2 * (student + wide)


def test_parameters_are_what_they_were_after_the_check() -> None:
    model = wide_net().to(torch.bfloat16)  # where alpha does not divide out
    study = study_model(model, (torch.randn(5, 64, dtype=torch.bfloat16),))
    teacher = make_teacher(make_draft(study, 2.0), verify=True)
    values = dict(model.named_parameters())
    for plan, wide in teacher.composition.wide_parameters():
        assert torch.equal(wide, plan.widen(values[plan.name]))
