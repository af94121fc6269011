"""Models that cast to float32 by themselves, run in float64 throughout, so that errors are not hidden by rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


class Exact(TorchDispatchMode):
    """Inside, every cast to a floating dtype is one to float64."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = pytree.tree_map_only(torch.dtype, lambda dtype: _WIDE.get(dtype, dtype), (args, kwargs or {}))
        return func(*given[0], **given[1])
