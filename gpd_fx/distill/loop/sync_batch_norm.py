"""Batch-norm statistics over all processes, for any graph and any module, on every backend.

With x of N values a channel over all processes, mean and variance are sums over the processes divided by N. Such a sum
is linear, so its gradient is the sum of all processes' gradients. torch's own SyncBatchNorm does this as a module, on
accelerators only; here the op is replaced where it is called, which reaches captured graphs as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gpd_fx.kernels.depthwise.op import depthwise_norm_op as depthwise_norm_op  # which registers it

_aten, _gpd_fx = torch.ops.aten, torch.ops.gpd_fx


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
        if func in (_gpd_fx.depthwise_norm.default, _gpd_fx.depthwise_norm):
            return _behind_conv(*args, **(kwargs or {}))
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


def _behind_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """With the arguments and results of `gpd_fx::depthwise_norm`, whose conv is then one of its own."""
    mean, var = (weight.new_zeros(len(weight), dtype=torch.float32) for _ in range(2))
    conv = None if bias is None else bias.to(x.dtype)
    y = torch.conv2d(x, weight.to(x.dtype), conv, stride, padding, dilation, x.shape[1])
    z = _batch_norm(y, gamma, beta, mean, var, True, 1.0, eps, True)
    return z, torch.stack([mean, var, mean, var])


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
