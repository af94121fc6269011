"""Branches that run apart: as two convs (or linear ops) one after the other, not as a part of the composed kernel.

A product branch adds v[o] sum_c K[o,c,k] P[c,i] to a kernel. Composing it takes o·c·i·k² multiply-adds whatever the
batch. A conv with P and then one with K give the same output in (c·i + o·c·k²) for each position: a bias-free 1x1 conv
maps zeros to zeros, so the zeros around an image are where they would be, and both ways are exact.

    teacher    conv(x, alpha W) + v · conv(conv(x, alpha[i] P), K)        v scales outputs, which are fewer than weights
    student    W[slice] + v[o_s] K[o_s] P[:, i_s]                         whole all the same, at the student's size
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from gpd_fx.kernels.compose.compose import Layer, Product
from gpd_fx.kernels.compose.layout import Cut, Slice, take
from gpd_fx.plan.parameter_plan import ParamPlan

ApartSet: TypeAlias = frozenset[tuple[str, str]]
"""Branches that run apart, each as (name of the parameter, name of the branch)."""
TOGETHER: ApartSet = frozenset()


class ApartKeys(NamedTuple):
    """Under which keys the teacher's tensors hold what a branch that runs apart needs."""

    point: str
    kernel: str
    scale: str

    @staticmethod
    def of(name: str, branch: str) -> ApartKeys:
        """The keys of one branch of the parameter `name`."""
        return ApartKeys(*(f"{name}/{branch}/{part}" for part in ApartKeys._fields))


def refusal(plan: ParamPlan) -> str | None:
    """Why no product branch of a parameter can run apart; None where they can."""
    if plan.kernel is None or plan.kernel.transposed:
        return "the conv is transposed"
    if any(alpha is not None for alpha in plan.alpha[2:]):
        return "alpha varies along an axis of the kernel"
    if plan.keep[0] is not None and not _regular(_group_index(plan, plan.keep[0])):
        return "a group of the student takes its outputs from several groups of the teacher"
    return None


def group_slice(plan: ParamPlan) -> Slice:
    """Which groups of the wide layer are the student's."""
    rows = plan.keep[0] if plan.shape else None
    if plan.kernel is None or plan.kernel.transposed or rows is None:
        return None
    index = _group_index(plan, rows)[:, 0]
    if torch.equal(index, torch.arange(plan.kernel.groups)):
        return None
    return Cut.of_index(index, plan.kernel.groups) or index


def _group_index(plan: ParamPlan, rows: Tensor) -> Tensor:
    """The wide group of each of the student's outputs, as (group, output of the group)."""
    assert plan.kernel is not None
    outputs = plan.wide_shape[0] // plan.kernel.groups
    return (rows // outputs).view(plan.kernel.student_groups, -1)


def _regular(groups: Tensor) -> bool:
    return bool((groups == groups[:, :1]).all())


def beside(term: Product, alpha: Sequence[Tensor | None], keys: ApartKeys) -> dict[str, Tensor]:
    """What the teacher's graph runs a branch with, stored as a conv takes it; `alpha` is that of the layer's weight."""
    rows, columns, *_ = alpha
    point, kernel, scale = (tensor.flatten(0, 1) for tensor in (term.point, term.kernel, term.scale[..., None]))
    ones = (1,) * (kernel.dim() - 2)
    point = point if columns is None else point * columns
    scale = scale if rows is None else scale * rows[:, None]
    return {
        keys.point: point.reshape(*point.shape, *ones),
        keys.kernel: kernel,
        keys.scale: scale.reshape(-1, *ones),
    }


def add_products(layer: Layer, narrow: Tensor, products: Sequence[Product], groups: Slice) -> Tensor:
    """The student's tensor, given what the layer composes to without the products; `groups` is its `group_slice`."""
    assert layer.layout is not None
    rows, columns, *_ = layer.slices
    outputs, inputs, *kernel = layer.shape
    count = layer.layout.student_groups
    with torch.autocast(narrow.device.type, enabled=False):  # a sum rounded to bf16 would lose what the branches learn
        for term in products:
            inner = term.point.shape[1]
            scale = take(term.scale.flatten(), (rows,), (outputs,))
            point = take(term.point, (groups, None, columns), (count, inner, inputs))
            whole = take(term.kernel.flatten(0, 1), (rows,), (outputs, inner, *kernel))
            made = multiply(point, whole.reshape(count, -1, inner, prod(kernel)))
            narrow = torch.addcmul(narrow, made.reshape(layer.shape), scale.reshape(-1, *(1,) * (narrow.dim() - 1)))
    return narrow


def multiply(point: Tensor, kernel: Tensor) -> Tensor:
    """sum_c K[g,o,c,k] P[g,c,i], as (g, o, i, k)."""
    g, o, c, taps = kernel.shape
    if taps == 1 or kernel.device.type != "cpu":
        return torch.matmul(kernel.mT.reshape(g, o * taps, c), point).view(g, o, taps, -1).mT
    # a conv over images of a pixel a tap: on many processors its library is faster than the one behind `matmul`
    images = kernel.transpose(0, 1).reshape(o, g * c, taps, 1).contiguous(memory_format=torch.channels_last)
    made = functional.conv2d(images, point.mT.reshape(-1, c, 1, 1), groups=g)
    return made.reshape(o, g, -1, taps).transpose(0, 1)
