"""Calls on fake tensors, which cost no memory and no arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from gpd_fx.calls import call_with, tensors_of, unchanged


def fake_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module on fakes of its parameters, buffers and inputs; nothing of it changes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with unchanged(module), mode, torch.no_grad():
        state = {name: mode.from_tensor(tensor) for name, tensor in tensors_of(module).items()}
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        return call_with(module, state, args, kwargs)
