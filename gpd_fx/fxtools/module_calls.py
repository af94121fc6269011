"""Calls of a module with other tensors in the places of its own, after which it is as it was.

`torch.func.functional_call` leaves tensors behind where a module is there under two names (it puts them in twice and
takes the first ones for the module's own), and in recurrent layers, which keep a list of the weights they last saw.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gpd_fx.fxtools.torch_internals import forget_flat_weights, look_up_flat_weights


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, one name for each place; a module that is there twice counts once."""
    found: dict[str, Tensor] = {}
    for path, owner in module.named_modules():
        own = (
            *owner.named_parameters(recurse=False, remove_duplicate=False),
            *owner.named_buffers(recurse=False, remove_duplicate=False),
        )
        found |= {f"{path}.{name}" if path else name: tensor for name, tensor in own}
    return found


def places_of(module: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Of the names of tensors that `names` maps, the first for each place, which may be empty."""
    found: dict[tuple[int, str], str] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        found.setdefault((id(module.get_submodule(owner)), leaf), name)
    return {name: names[name] for name in found.values()}


def recurrent_layers(module: nn.Module) -> list[nn.RNNBase]:
    """The layers that keep a list of their weights."""
    return [layer for layer in module.modules() if isinstance(layer, nn.RNNBase)]


def call_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recurrent: Sequence[nn.RNNBase] | None = None,
) -> Any:
    """Call `module` with `tensors` in its places, one name a place.

    `recurrent` are its recurrent layers, for a caller that has found them before.
    """
    layers = recurrent_layers(module) if recurrent is None else recurrent
    for layer in layers:
        forget_flat_weights(layer)
    try:
        return torch.func.functional_call(module, dict(tensors), args, kwargs, tie_weights=False)
    finally:  # or what this call computed lives on in them
        for layer in layers:
            look_up_flat_weights(layer)


@contextmanager
def unchanged(module: nn.Module) -> Generator[None]:
    """Meanwhile a call may leave what it likes in a module's attributes; afterwards they are what they were.

    Models that keep tensors of their last call would otherwise keep fakes, which do not survive a copy of the model:
    a copied `FakeTensorMode` frees storages that it does not own.
    """
    before = [(part, dict(vars(part))) for part in module.modules()]
    held = [(value, copy.copy(value)) for _, own in before for value in own.values() if type(value) in _CONTAINERS]
    try:
        yield
    finally:
        for part, own in before:
            vars(part).clear()
            vars(part).update(own)
        for value, content in held:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


def detached_copies(module: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy` that lets a module be copied which keeps results of its last call.

    `copy.deepcopy` refuses tensors that autograd made: an auxiliary loss that `forward` keeps, activations that a hook
    collects, the weight that `torch.nn.utils.weight_norm` computes. Their copies are detached.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for leaf in pytree.tree_leaves(value):
                    if isinstance(leaf, Tensor) and not leaf.is_leaf:
                        memo[id(leaf)] = leaf.detach().clone()
        for buffer in part.buffers(recurse=False):
            if not buffer.is_leaf:
                memo[id(buffer)] = buffer.detach().clone()
    return memo


_CONTAINERS = (list, set, dict, OrderedDict)
