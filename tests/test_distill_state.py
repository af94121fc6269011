"""What a run keeps: its states, its random numbers, the order of its data, its weights over time."""

from __future__ import annotations

import math
import random
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from gpd_fx.distill.data.images import Keyed, Order
from gpd_fx.distill.data.seeds import derive, set_all
from gpd_fx.distill.losses.weights import check_weight, parse_weight, weight_at
from gpd_fx.distill.state.snapshot import checkpoint_path, checkpoints, prune, read_state, write_state
from gpd_fx.errors import ArgumentError, CheckpointError


def same(first: Any, second: Any) -> bool:
    """Equal in value, type and bits."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and first.equal(second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    tree: dict[str, Any] = {
        "numbers": [1, 2**60, 0.1, 1e-300, -math.inf, math.nan, True, None, "text/with/slashes"],
        "nested": {0: {0.5: 1, "a.b": (1, (2.5, [])), "": {}}, "0": shared, 7: shared.t()},
        "tensors": [torch.tensor(3), torch.zeros(0, 2), torch.randn(2).bfloat16(), torch.arange(4).bool()],
    }
    write_state(tmp_path / "state.safetensors", tree)
    back = read_state(tmp_path / "state.safetensors")
    assert same(back, {**tree, "nested": {**tree["nested"], 7: shared.t().contiguous()}})
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion", "adafactor", "nadamw", "lookahead_adamw", "muon"])
def test_the_states_of_timms_optimizers_come_back(name: str, tmp_path: Path) -> None:
    optim = pytest.importorskip("timm.optim")

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))

    def step(net: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        net(torch.ones(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()

    first, second = model(), model()
    one, two = (optim.create_optimizer_v2(net, name, lr=0.01, weight_decay=0.1) for net in (first, second))
    for _ in range(3):
        step(first, one)
    write_state(tmp_path / "s", {"model": first.state_dict(), "optimizer": one.state_dict()})
    state = read_state(tmp_path / "s")
    second.load_state_dict(state["model"])
    two.load_state_dict(state["optimizer"])
    for _ in range(7):
        step(first, one)
        step(second, two)
    assert same(dict(first.state_dict()), dict(second.state_dict()))


def test_files_that_are_no_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path / "missing")
    write_state(tmp_path / "whole", {"a": torch.zeros(100)})
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path / "cut")
    torch.save({"a": 1}, tmp_path / "pickle")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path / "pickle")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_state(tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"/a/1 .* is a object"):
        write_state(tmp_path / "new", {"a": [1, object()]})
    assert not (tmp_path / "new").exists()


def test_old_checkpoints_and_leftovers_go(tmp_path: Path) -> None:
    for update in (5, 20, 100):
        write_state(checkpoint_path(tmp_path, update), {"update": update})
    (tmp_path / ".update-000000101.safetensors.abc").mkdir()
    (tmp_path / "other.safetensors").touch()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.safetensors",
        "update-000000020.safetensors",
        "update-000000100.safetensors",
    ]
    assert [read_state(path)["update"] for path in checkpoints(tmp_path)] == [20, 100]
    assert checkpoints(tmp_path / "nowhere") == []


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()  # noqa: NPY002  timm draws from it
    return state[1].tolist()


class Noise(Dataset[Any]):
    """Items that draw from all three sources."""

    def __getitem__(self, number: int) -> Any:
        return number, random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002

    def __len__(self) -> int:
        return 23


def test_an_item_depends_on_seed_epoch_and_number_alone() -> None:
    keyed = Keyed(Noise(), 3)
    set_all(1)
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    first = keyed.__getitems__([(0, 1), (0, 2), (1, 1)])
    assert random.getstate() == states[0]
    assert numpy_state() == states[1]
    assert torch.get_rng_state().equal(states[2])
    assert keyed.__getitems__([(1, 1), (0, 1)]) == [first[2], first[0]]
    assert keyed[0, 2] == first[1]
    assert len({item[1:] for item in (*first, Keyed(Noise(), 4)[0, 1])}) == 4
    assert derive(0, "order", 1) != derive(0, "image", 1) != derive(1, "image", 0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_of_all_processes_are_those_of_one(world: int) -> None:
    def batches(rank: int, world: int, epoch: int, start: int = 0) -> list[list[int]]:
        return [[number for _, number in batch] for batch in Order(23, 8, 5, rank, world, epoch, start)]

    whole = batches(0, 1, 2)
    parts = [batches(rank, world, 2) for rank in range(world)]
    assert [list(chain(*part)) for part in zip(*parts, strict=True)] == whole
    assert len(whole) == len(Order(23, 8, 5, 0, 1, 2)) == 2
    assert len(set(chain(*whole))) == 16
    assert batches(0, 1, 3) != whole
    assert batches(0, 1, 2, start=1) == whole[1:]


def test_weights_follow_lines_through_their_points() -> None:
    assert weight_at(3, 17.0) == 3.0
    weight = parse_weight("2:1,0:0,10:5")
    assert [weight_at(weight, epoch) for epoch in (-1, 0, 1, 2, 6, 10, 99)] == [0, 0, 0.5, 1, 3, 5, 5]
    assert parse_weight("0.5") == 0.5
    for text in ("", "a", "1:2:3", "1:"):
        with pytest.raises(ArgumentError, match="EPOCH:VALUE"):
            parse_weight(text)
    for bad in (-1.0, math.nan, {}, {0: -1}, "3", True):
        with pytest.raises(ArgumentError, match=r"weights\.distill"):
            check_weight("distill", bad)
