"""The composition by autograd, layer by layer in plain torch operations: what `compose` must agree with."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gpd_fx.kernels.compose.layout import along, take
from gpd_fx.kernels.compose.terms import (
    InputFilter,
    Layer,
    Line,
    OutputFilter,
    Product,
    tap,
)


def compose_reference(
    layers: Sequence[Layer], teacher: bool = True, student: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's and the student's tensor of every layer; a list that was not asked for is empty.

    The student's tensors are contiguous. A tensor that needs no arithmetic may share the weight's memory.
    """
    wide: list[Tensor] = []
    narrow: list[Tensor] = []
    if not layers:
        return wide, narrow
    # a sum rounded to bf16 would lose what the branches learn: autocast may round what comes out, not what goes in
    device = layers[0].weight.device.type
    with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # meta has none
        for layer in layers:
            kernel = merge(layer)
            if student:
                narrow.append(take(kernel, layer.slices, layer.shape).contiguous())
            if teacher:
                for dim, alpha in enumerate(layer.alpha):
                    if alpha is not None:
                        kernel = kernel * along(alpha, dim, kernel.dim())
                wide.append(kernel)
    return wide, narrow


def merge(layer: Layer) -> Tensor:
    """The layer's kernel M in storage order."""
    if not layer.terms or layer.layout is None:
        return layer.weight
    kernel = layer.layout.canonical(layer.weight)
    filters = [term for term in layer.terms if isinstance(term, OutputFilter)]
    if filters:
        kernel = _add_output_filters(kernel, filters)
    for term in layer.terms:
        if isinstance(term, InputFilter):
            kernel = _add_input_filter(kernel, term)
        elif isinstance(term, Product):
            kernel = _add_product(kernel, term)
        elif isinstance(term, Line):
            kernel = _add_line(kernel, term)
    return layer.layout.stored(kernel)


def _add_output_filters(kernel: Tensor, terms: Sequence[OutputFilter]) -> Tensor:
    rows = kernel.shape[0] * kernel.shape[1]
    points = torch.stack([t.point * t.scale[..., None] for t in terms], dim=-1)  # (g, o, i, term)
    filters = torch.stack([t.filters.flatten(2) for t in terms], dim=2)  # (g, o, term, k)
    summed = torch.baddbmm(  # (g o) times: (i, term) @ (term, k)
        kernel.reshape(rows, kernel.shape[2], -1), points.flatten(0, 1), filters.flatten(0, 1)
    )
    return summed.reshape(kernel.shape)


def _add_input_filter(kernel: Tensor, term: InputFilter) -> Tensor:
    point = term.point * term.scale[..., None]
    return torch.addcmul(kernel, point.reshape(*point.shape, *(1,) * (kernel.dim() - 3)), term.filters[:, None])


def _add_product(kernel: Tensor, term: Product) -> Tensor:
    if kernel.dim() == 3:  # a linear layer: one product that accumulates
        return torch.baddbmm(kernel, term.kernel * term.scale[..., None], term.point)
    scaled = term.kernel.flatten(3) * term.scale[..., None, None]
    return kernel + torch.einsum("gock,gci->goik", scaled, term.point).reshape(kernel.shape)


def _add_line(kernel: Tensor, term: Line) -> Tensor:
    sizes = kernel.shape[3:]
    shape = [n if axis == term.axis else 1 for axis, n in enumerate(sizes)]
    values = (term.values * term.scale[..., None, None]).reshape(*kernel.shape[:3], *shape)
    pad: list[int] = []
    for axis, n in reversed(list(enumerate(sizes))):  # `pad` starts with the last dimension
        pad += [0, 0] if axis == term.axis else [tap(n), n - 1 - tap(n)]
    return kernel + functional.pad(values, pad)
