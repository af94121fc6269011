"""Two processes train as one with the joined batch would."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from gpd_fx import GPDLoss, expand
from gpd_fx.distill import Images, distill
from gpd_fx.distill.data.seeds import permutation
from gpd_fx.distill.loop.optimizers import make_accelerator
from gpd_fx.distill.loop.sync_batch_norm import SyncedBatchNorm
from gpd_fx.distill.loop.training_loop import Engine
from gpd_fx.distill.show.callbacks import Watcher
from gpd_fx.distill.show.metrics import read_metrics
from gpd_fx.errors import ArgumentError
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from tests.distill_data import CLASSES, Net, config, tensors
from tests.forked import distributed, needs_fork

pytest.importorskip("accelerate")
pytest.importorskip("timm")
pytestmark = needs_fork


def dynamic(norm: bool) -> DynamicTeacher:
    torch.manual_seed(0)
    student = Net(dropout=0.0, norm=norm)
    if norm:
        nn.init.uniform_(student.norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
    return expand(student, 2.0, (torch.randn(2, 3, 6, 6),), verify=False).double()


def data() -> Images:
    test = tensors(6, 1, torch.float64)
    return Images(tensors(16, 0, torch.float64), test, CLASSES, (3, 6, 6))


def trained(model: nn.Module, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of the last of two updates, and the state afterwards."""
    setup = config(
        **{"epochs": 1, "batch_size": 8, "learning_rate": 0.1, "optimizer": "momentum", **options}
    ).complete()
    Engine(setup, model, data(), None, make_accelerator(setup)).run(Watcher())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"unused: {missing}"
    return {name: g for name, g in gradients.items() if g is not None}, model.state_dict()


def compare(folder: Path, norm: bool) -> None:
    torch.manual_seed(0)
    loaded = torch.load(folder / "one.pt")
    again = dynamic(norm)
    again.load_state_dict(loaded["start"])
    theirs = trained(again, sync_batch_norm=norm)
    for mine, other in zip((loaded["gradients"], loaded["state"]), theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("norm", [False, True])
def test_two_processes_train_as_one(norm: bool, tmp_path: Path) -> None:
    model = dynamic(norm)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    gradients, state = trained(model)
    torch.save({"start": start, "gradients": gradients, "state": state}, tmp_path / "one.pt")
    distributed(tmp_path, compare, tmp_path, norm)


def update_once(folder: Path) -> None:
    loaded = torch.load(folder / "wanted.pt")
    again = dynamic(True)
    again.load_state_dict(loaded["start"])
    setup = config(epochs=1, batch_size=8, ema_decay=0.0).complete()
    engine = Engine(setup, again, data(), None, make_accelerator(setup))
    engine.learner.wrapped.train()
    engine.update(*next(iter(engine.training_batches(0, 0))))
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter.grad, loaded["gradients"][name], rtol=1e-9, atol=1e-12)


def test_without_synchronisation_each_process_has_its_own_statistics(tmp_path: Path) -> None:
    """The gradient is then the mean of those of both halves, each normalised by itself."""
    model = dynamic(True)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    order, wanted = permutation(0, 0, 16)[:8], {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for half in (order[:4], order[4:]):
        model.load_state_dict(start)
        model.zero_grad()
        items = [data().train[number] for number in half]
        x, y = torch.stack([image for image, _ in items]), torch.stack([label for _, label in items])
        teacher_out, student_out = model.train().both(x)
        GPDLoss()(student_out, teacher_out, y).total.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            wanted[name] += parameter.grad / 2
    torch.save({"start": start, "gradients": wanted}, tmp_path / "wanted.pt")
    distributed(tmp_path, update_once, tmp_path)


def normalised(x: Tensor, weigh: Tensor, op: Any) -> list[Tensor]:
    """Output, gradients and statistics of a batch norm in train mode."""
    generator = torch.Generator().manual_seed(9)
    weight, bias = (torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    x = x.clone().requires_grad_()
    y = op(x, weight, bias, mean, var, True, 0.3, 1e-3, False)
    (y * weigh).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return [y.detach(), x.grad, mean, var, weight.grad, bias.grad]


def called(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, training: bool, *rest: Any) -> Tensor:
    """As modules call it."""
    return functional.batch_norm(x, mean, var, w, b, training, rest[0], rest[1])


def compare_norms() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    rows = slice(3 * rank, 3 * rank + 3)
    for shape in ((6, 5), (6, 5, 7), (6, 5, 3, 2)):
        generator = torch.Generator().manual_seed(len(shape))
        x, weigh = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1 for _ in range(2))
        whole = normalised(x, weigh, torch.batch_norm)
        for op in (torch.batch_norm, torch.ops.aten.batch_norm.default, called):
            with SyncedBatchNorm():
                mine = normalised(x[rows], weigh[rows], op)
            for gradient in mine[4:]:
                torch.distributed.all_reduce(gradient)
            wanted = [whole[0][rows], whole[1][rows], *whole[2:]]
            for name, value, goal in zip(("y", "dx", "mean", "var", "dw", "db"), mine, wanted, strict=True):
                torch.testing.assert_close(value, goal, msg=lambda m, n=name: f"{n}: {m}")
    with SyncedBatchNorm():
        x, norm = torch.randn(3, 5, 2, 2, dtype=torch.float64), nn.BatchNorm2d(5).double().eval()
        torch.testing.assert_close(norm(x), x / (1 + 1e-5) ** 0.5)


def test_synchronised_batch_norm_is_batch_norm_of_all(tmp_path: Path) -> None:
    """Values, statistics and every gradient, of the module's function and of the op in a graph, for several shapes."""
    distributed(tmp_path, compare_norms)


class Idle(Net):
    """Has a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, norm=False)
        self.idle = nn.Conv2d(4, 4, 3)


def train_with_idle_layer(folder: Path) -> None:
    torch.manual_seed(0)
    student, output = Idle(), io.StringIO()
    images = Images(tensors(24), tensors(7, 1), CLASSES, (3, 6, 6))
    setup = config(epochs=1, batch_size=8, weight_decay=0.1)
    results = distill(setup, folder / "run", student=student, images=images, console=Console(file=output, width=300))
    trained = results.student.state_dict()
    assert trained["idle.weight"].equal(student.idle.weight)
    assert not trained["head.weight"].equal(student.head.weight)
    if torch.distributed.get_rank() == 0:
        assert "no output depends on" in output.getvalue()
        assert "idle.weight" in output.getvalue()


def test_layers_that_are_not_called_hold_nobody_up(tmp_path: Path) -> None:
    distributed(tmp_path, train_with_idle_layer, tmp_path)


def whole_run(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    student = Net(dropout=0.0, norm=False)
    images = Images(tensors(24), tensors(7, 1), CLASSES, (3, 6, 6))
    setup = config(epochs=2, batch_size=8, log_every=0)
    results = distill(setup, folder / name, student=student, images=images, console=Console(file=io.StringIO()))
    assert {each.images for each in results.scores.values()} == {7}


def test_a_whole_run_of_two_processes(tmp_path: Path) -> None:
    distributed(tmp_path, whole_run, tmp_path, "two")
    whole_run(tmp_path, "one")
    for first, second in zip(*(read_metrics(tmp_path / name) for name in ("one", "two")), strict=True):
        assert second["losses"] == pytest.approx(first["losses"], rel=1e-5)
        assert second["test_loss"] == pytest.approx(first["test_loss"], rel=1e-5)


def odd_batch() -> None:
    with pytest.raises(ArgumentError, match="batch_size 7 must be a multiple of the 2 processes"):
        trained(dynamic(False), batch_size=7)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    distributed(tmp_path, odd_batch)
