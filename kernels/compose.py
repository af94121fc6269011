"""Composing the kernels of all layers, in one call, for both networks.

A layer's kernel, in canonical order (g, o, i, *k), is its weight plus the terms that the branches are lowered to:

    M = W + sum of terms;   the teacher's kernel is alpha[i] M, the student's is M[slice]

`terms.py` says what the terms are, `reference.py` computes the same by autograd, `grouped.py` is the operator.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gpd_fx.kernels.grouped import compose_op
from gpd_fx.kernels.recipe import encode, flatten
from gpd_fx.kernels.terms import InputFilter as InputFilter
from gpd_fx.kernels.terms import Layer as Layer
from gpd_fx.kernels.terms import Line as Line
from gpd_fx.kernels.terms import OutputFilter as OutputFilter
from gpd_fx.kernels.terms import Product as Product
from gpd_fx.kernels.terms import Term as Term
from gpd_fx.kernels.terms import tap as tap


def compose(layers: Sequence[Layer], teacher: bool = True, student: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's and the student's tensor of every layer; a list that was not asked for is empty.

    The student's tensors are contiguous. A tensor that needs no arithmetic is the weight itself, and where both
    networks have the same tensor, both lists hold it.
    """
    weights: list[Tensor] = []
    operands: list[Tensor] = []
    recipes: list[str] = []
    wanted: list[tuple[bool, bool, bool]] = []
    for layer in layers:
        scaled = any(alpha is not None for alpha in layer.alpha)
        sliced = any(part is not None for part in layer.slices)
        merged = len(layer.terms) > 0
        same = teacher and not scaled and not sliced
        first = teacher and (scaled or merged)
        second = student and not same and (sliced or merged)
        wanted.append((first, second, same))
        if first or second:
            weights.append(layer.weight)
            operands += flatten(layer)
            recipes.append(encode(layer, first, second))
    made = iter(compose_op(weights, operands, "\n".join(recipes)) if weights else [])
    wide: list[Tensor] = []
    narrow: list[Tensor] = []
    for layer, (first, second, same) in zip(layers, wanted, strict=True):
        of_teacher = next(made) if first else layer.weight
        of_student = next(made) if second else of_teacher if same else layer.weight
        wide += [of_teacher] if teacher else []
        narrow += [of_student.contiguous()] if student else []
    return wide, narrow
