"""What the module keeps between calls, and what its Python code decides by a size: followed or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gpd_fx


class KeepsResults(nn.Module):
    """Keeps an auxiliary loss, and a list of activations that a hook collects."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.auxiliary: Tensor | None = None
        self.collected: list[Tensor] = []
        self.first.register_forward_hook(self._collect)

    def _collect(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.collected.append(output)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        self.auxiliary = hidden.square().mean()
        return self.second(hidden)


def weight_norm() -> nn.Module:
    """The hooks, not the parametrizations: each keeps the weight that it computed as a plain attribute."""
    hooked = nn.utils.weight_norm(nn.Linear(5, 6)), nn.utils.spectral_norm(nn.Linear(6, 6))
    return nn.Sequential(hooked[0], nn.Tanh(), hooked[1], nn.Linear(6, 3))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [KeepsResults, weight_norm])
def test_what_a_call_leaves_behind_stops_nothing(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    model(x).sum().backward()  # a used model, not a fresh one
    teacher = gpd_fx.expand(model, 1.5, (x,)).train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wide, narrow = teacher.both(x)
        (wide.square().mean() + narrow.square().mean()).backward()
        optimizer.step()
    teacher.eval()
    twin, student = copy.deepcopy(teacher), gpd_fx.fold(teacher)
    assert type(student) is type(model)
    assert torch.equal(twin(x), teacher(x))
    assert torch.allclose(student(x), teacher.student(x), rtol=0, atol=1e-12)
    gpd_fx.save(teacher, tmp_path / "teacher.safetensors")
    assert torch.allclose(gpd_fx.grow(teacher, 3.0)(x), teacher(x), rtol=0, atol=1e-9)


class ByPieces(nn.Module):
    """Python code that decides by the size of the batch."""

    def __init__(self, decide: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.decide, self.net = decide, nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.decide(self.net, x)


DECISIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "split": lambda net, x: torch.cat([net(piece) for piece in x.split(4)]),
    "branch": lambda net, x: net(x) * (2.0 if x.shape[0] > 8 else 1.0),
}


@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_size_that_python_decides_by_is_refused_outside_of_its_range(name: str, mode: bool) -> None:
    model = ByPieces(DECISIONS[name]).double()
    teacher = gpd_fx.expand(model, 2.0, (torch.randn(4, 5, dtype=torch.float64),)).train(mode)
    within, beyond = (torch.randn(size, 5, dtype=torch.float64) for size in (3, 12))
    assert torch.allclose(teacher(within), model(within), rtol=0, atol=1e-12)
    with pytest.raises(gpd_fx.InputError, match=r"'x' has the size 12 along dimension 0.*captured for at most [48]"):
        teacher(beyond)


def normalised() -> nn.Sequential:
    """Two batch norms with statistics of their own, and dropout."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5)),
        *(nn.Flatten(), nn.Linear(5 * 2 * 3, 3)),
    )
    for norm in (model[1], model[4]):
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]  a batch norm that tracks statistics has them
        nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]  likewise
    return model.double().train()


def statistics(module: nn.Module) -> list[Tensor]:
    """The running statistics of the first batch norm, which is frozen, and of the second."""
    return [module.get_buffer(f"{at}.{name}").clone() for at in (1, 4) for name in ("running_mean", "running_var")]


def test_parts_in_eval_mode_stay_so_while_both_networks_train(tmp_path: Path) -> None:
    model = normalised()
    model[1].eval()
    model[5].eval()
    x = torch.randn(4, 3, 6, 7, dtype=torch.float64)
    before = statistics(model)
    made = gpd_fx.expand(model, 1.5, (x,))
    gpd_fx.save(made, tmp_path / "teacher.safetensors")
    for teacher in (
        made,
        copy.deepcopy(made).eval().train(),
        gpd_fx.load(tmp_path / "teacher.safetensors", normalised()).train(),
        gpd_fx.grow(made, 3.0).eval().train(),
    ):
        wide, narrow = teacher.both(x)
        expected = copy.deepcopy(model)(x)
        assert torch.allclose(wide, expected, rtol=0, atol=1e-12)
        assert torch.allclose(narrow, expected, rtol=0, atol=1e-12)
        after = statistics(gpd_fx.fold(teacher))
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1])
        assert not torch.equal(after[2], before[2])
        widened = dict(teacher.wide_buffers.named_buffers())
        assert torch.equal(widened["1.running_mean"][:4], before[0])
        assert not gpd_fx.fold(teacher)[1].training  # type: ignore[index]  a Sequential, as the model is


def test_parts_whose_mode_changes_after_expand_are_refused() -> None:
    x = torch.randn(4, 3, 6, 7, dtype=torch.float64)
    teacher = gpd_fx.expand(normalised(), 2.0, (x,))
    for part in teacher.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    for call in (teacher, teacher.student, teacher.both):
        with pytest.raises(gpd_fx.ArgumentError, match="submodule '1' is in eval mode, the wide graphs were captured"):
            call(x)
    teacher.eval()(x)  # the whole teacher's mode is as it was captured
    teacher.train()(x)


def test_parts_that_are_replaced_after_expand_are_refused() -> None:
    x = torch.randn(4, 3, 6, 7, dtype=torch.float64)
    teacher = nn.SyncBatchNorm.convert_sync_batchnorm(gpd_fx.expand(normalised(), 2.0, (x,)))
    with pytest.raises(gpd_fx.ArgumentError, match="added, removed or replaced after expand"):
        teacher(x)
