"""Forward passes on fake tensors, which cost no memory and no arithmetic, and the FLOPs that torch counts in one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from gpd_fx.calls import call_with, tensors_of

Spec = tuple[tuple[int, ...], torch.dtype, torch.device]


def spec(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Spec:
    """What is needed to make a fake of `tensor`, of another shape if one is given."""
    return (tuple(tensor.shape) if shape is None else shape, tensor.dtype, tensor.device)


def fake_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module on fakes of its parameters, buffers and inputs; nothing of it changes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        state = {name: mode.from_tensor(tensor) for name, tensor in tensors_of(module).items()}
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        return call_with(module, state, args, kwargs)


def count_flops(module: nn.Module, tensors: Mapping[str, Spec], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """FLOPs of one sample's forward pass of `module` with parameters and buffers of the given shapes, one a place."""
    batch = next((x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()), 1)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    counter = FlopCounterMode(display=False)
    with mode, torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        fakes = {name: torch.empty(shape, dtype=d, device=v) for name, (shape, d, v) in tensors.items()}
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        with counter:
            call_with(module, fakes, args, kwargs)
    return counter.get_total_flops() // max(batch, 1)
