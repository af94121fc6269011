"""A depthwise conv with the batch norm behind it in train mode, `gpd_fx::depthwise_norm`, and its gradient.

    y = conv(x, w) + b      z = gamma (y - mean(y)) / sqrt(var(y) + eps) + beta

The bias cancels: only the running mean sees it. y is not kept and, by the kernels, not even written, so x is all that
is saved of the activations. Times that the activations are read or written, forward and backward:

    conv, then batch norm   5, 9     x y | y | y z                    y dz | y dz dy | dy dx | dy x
    kernels                 3, 7     x | x z                          x dz x̂ | x dz x̂ dx

Backward, dx at a place needs dy at as many places as the kernel has taps, and each takes a conv: it is cheaper to write
x̂ (or dy, or y) once. On CUDA both are Triton kernels; elsewhere the operator runs torch's own conv and norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gpd_fx.kernels.depthwise import launch as depthwise_launch
from gpd_fx.kernels.depthwise.launch import (
    MOST_SIDE,
    Conv,
    lies_last,
    lying,
)
from gpd_fx.kernels.triton_support import DTYPES, available

aten = torch.ops.aten
_LARGEST = 2**31 - 1  # offsets within an image are 32-bit
_TRITON = available()  # a constant, since a compiler goes through what asks for it


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """What `batch_norm` gives of `conv2d` with a group a channel; running statistics are updated likewise.

    Where the kernels do not run, these two are called. In eval mode the kernels have no part: the norm is folded into
    the conv's kernel.
    """
    device = x.device.type
    casts = x.dtype in DTYPES and torch.is_autocast_enabled(device)
    given = x.to(torch.get_autocast_dtype(device)) if casts else x
    if not usable(given, weight, casts):
        y = torch.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(y, gamma, beta, running_mean, running_var, training, momentum, eps, cudnn)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        scale = torch.rsqrt(running_var.float() + eps)
        scale = scale if gamma is None else scale * gamma
        shift = (-running_mean if bias is None else bias - running_mean) * scale
        shift = shift if beta is None else shift + beta
        kernel = (weight * scale[:, None, None, None]).to(given.dtype)
        return torch.conv2d(given, kernel, shift.to(given.dtype), stride, padding, dilation, x.shape[1])
    z, statistics = depthwise_norm_op(given, weight, bias, gamma, beta, stride, padding, dilation, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(statistics[2].to(running_mean.dtype), momentum)
            running_var.lerp_(statistics[3].to(running_var.dtype), momentum)
    return z


def usable(x: Tensor, weight: Tensor, mixed: bool = False) -> bool:
    """Whether such tensors are the kernels' business; `mixed`: the kernel may have another dtype than x."""
    return x.device.type == "cuda" and _TRITON and fitting(x, weight, mixed)


def fitting(x: Tensor, weight: Tensor, mixed: bool = False) -> bool:
    """Whether the kernels can take such tensors."""
    return (
        x.dim() == 4
        and x.dtype in DTYPES
        and (weight.dtype == x.dtype or (mixed and weight.dtype in DTYPES))
        and weight.device == x.device
        and x.shape[1] == weight.shape[0]
        and max(weight.shape[2:]) <= MOST_SIDE
        and x.numel() > 0
        and 4 * x[0].numel() <= _LARGEST
    )


@torch.library.custom_op("gpd_fx::depthwise_norm", mutates_args=())
def depthwise_norm_op(
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
    """z, and for each channel of y without bias the mean and 1 / standard deviation; the mean with it; the variance."""
    conv = Conv.of(weight, stride, padding, dilation)
    z, statistics = _blank(x, weight, conv)
    with torch.autocast(x.device.type, enabled=False):
        if usable(x, weight, True):
            depthwise_launch.forward(x, weight, bias, gamma, beta, conv, eps, z, statistics)
        else:
            y = functional.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])
            made, mean, rstd = torch.native_batch_norm(y, gamma, beta, None, None, True, 0.0, eps)
            z.copy_(made)
            rows = [mean, rstd, mean if bias is None else mean + bias, y.to(statistics.dtype).var((0, 2, 3))]
            torch.stack([row.to(statistics.dtype) for row in rows], out=statistics)
    return z, statistics


def _blank(x: Tensor, weight: Tensor, conv: Conv) -> tuple[Tensor, Tensor]:
    """Room for the results."""
    size = conv.out(x.shape[2:])
    lies = torch.channels_last if lies_last(x) else torch.contiguous_format
    z = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=lies)
    exact = torch.promote_types(x.dtype, torch.float32)
    return z, torch.empty((4, x.shape[1]), dtype=exact, device=x.device)


@depthwise_norm_op.register_fake
def _(
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
    del bias, gamma, beta, eps
    return _blank(x, weight, Conv.of(weight, stride, padding, dilation))


@torch.library.custom_op("gpd_fx::depthwise_norm_backward", mutates_args=())
def backward_op(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    statistics: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of the kernel, and those of beta and gamma as the rows of one tensor."""
    conv = Conv.of(weight, stride, padding, dilation)
    dx, dw, sums = _blank_gradients(x, weight, statistics)
    with torch.autocast(x.device.type, enabled=False):
        if usable(x, weight, True):
            depthwise_launch.backward(dz, x, weight, gamma, statistics, conv, dx, dw, sums)
        else:
            y = functional.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])
            args = (dz, y, gamma, None, None, statistics[0], statistics[1], True, eps, [True, True, True])
            dy, of_gamma, of_beta = aten.native_batch_norm_backward(*args)
            torch.stack([of_beta.to(sums.dtype), of_gamma.to(sums.dtype)], out=sums)
            args = (dy, x, weight, None, stride, padding, dilation, False, [0, 0], x.shape[1], [True, True, False])
            of_x, of_weight, _ = aten.convolution_backward(*args)
            dx.copy_(of_x)
            dw.copy_(of_weight)
    return dx, dw, sums


def _blank_gradients(x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(lying(x, lies_last(x)))
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format), torch.empty_like(statistics[:2])


@backward_op.register_fake
def _(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    statistics: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    del dz, gamma, stride, padding, dilation, eps
    return _blank_gradients(x, weight, statistics)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, gamma, beta, ctx.stride, ctx.padding, ctx.dilation, ctx.eps = inputs
    ctx.beta_dtype = None if beta is None else beta.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, gamma, output[1])


def _backward(ctx: Any, dz: Tensor | None, of_statistics: Tensor | None) -> tuple[Any, ...]:
    del of_statistics  # nothing but buffers is made of them
    if dz is None:
        return (None,) * 9
    x, weight, bias, gamma, statistics = ctx.saved_tensors
    conv = (ctx.stride, ctx.padding, ctx.dilation)
    dx, dw, sums = backward_op(dz, x, weight, gamma, statistics, *conv, ctx.eps)
    of_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
    of_gamma = None if gamma is None else sums[1].to(gamma.dtype)
    of_beta = None if ctx.beta_dtype is None else sums[0].to(ctx.beta_dtype)
    return dx, dw, of_bias, of_gamma, of_beta, None, None, None, None


depthwise_norm_op.register_autograd(_backward, setup_context=_setup_context)
