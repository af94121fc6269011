"""The composition as it is usually written: one einsum or product a branch, summed up, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gpd_fx.kernels.compose.compose import (
    InputFilter,
    Layer,
    OutputFilter,
    Product,
    Term,
    tap,
)
from gpd_fx.kernels.compose.layout import along, take

AXES = "xyz"


def compose_by_einsum(layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's and the student's tensors; every branch becomes a whole kernel first."""
    wide: list[Tensor] = []
    narrow: list[Tensor] = []
    for layer in layers:
        kernel = layer.weight
        if layer.terms:
            assert layer.layout is not None
            total = layer.layout.canonical(layer.weight)
            for term in layer.terms:
                total = total + expand_term(term, tuple(total.shape[3:]))
            kernel = layer.layout.stored(total)
        narrow.append(take(kernel, layer.slices, layer.shape).contiguous())
        for dim, alpha in enumerate(layer.alpha):
            if alpha is not None:
                kernel = kernel * along(alpha, dim, kernel.dim())
        wide.append(kernel)
    return wide, narrow


def expand_term(term: Term, sizes: tuple[int, ...]) -> Tensor:
    """The kernel (g, o, i, *k) that a term adds."""
    k = AXES[: len(sizes)]
    if isinstance(term, OutputFilter):
        branch = torch.einsum(f"goi,go{k}->goi{k}", term.point, term.filters)
    elif isinstance(term, InputFilter):
        branch = torch.einsum(f"goi,gi{k}->goi{k}", term.point, term.filters)
    elif isinstance(term, Product):
        branch = torch.einsum(f"goc{k},gci->goi{k}", term.kernel, term.point)
    else:
        shape = [n if axis == term.axis else 1 for axis, n in enumerate(sizes)]
        pad: list[int] = []
        for axis, n in reversed(list(enumerate(sizes))):
            pad += [0, 0] if axis == term.axis else [tap(n), n - 1 - tap(n)]
        branch = functional.pad(term.values.reshape(*term.values.shape[:3], *shape), pad)
    return torch.einsum(f"go,goi{k}->goi{k}", term.scale, branch)
