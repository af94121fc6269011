"""Batch-norm statistics over all processes, for any graph and any module, on every backend.

With x of N values a channel over all processes, mean and variance are sums over the processes divided by N. Such a sum
is linear, so its gradient is the sum of all processes' gradients. torch's own SyncBatchNorm does this as a module, on
accelerators only; here the op is replaced where it is called, which reaches captured graphs as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten


class SyncedBatchNorm(TorchFunctionMode):
    """Meanwhile batch norm in train mode takes its statistics over all processes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.batch_norm, _aten.batch_norm.default, _aten.batch_norm):
            return _batch_norm(*args, **(kwargs or {}))
        if func is functional.batch_norm:  # what it calls inside would not come here
            return _by_name(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _by_name(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """With the arguments of `torch.nn.functional.batch_norm`."""
    return _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, True)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    if not training:
        return torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    count = wide.new_tensor(x.numel() // x.shape[1])
    dist.all_reduce(count)
    mean = _Total.apply(wide.sum(dims)) / count
    centred = wide - mean.view(shape)
    var = _Total.apply(centred.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    y = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)


class _Total(torch.autograd.Function):
    """The sum over all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total
