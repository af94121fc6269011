"""Composing the kernels of all layers, in one call, for both networks.

A layer's kernel, in canonical order (g, o, i, *k), is its weight plus the terms that the branches are lowered to:

    M = W + sum of terms;   the teacher's kernel is alpha[i] M, the student's is M[slice]

`terms.py` says what the terms are, `reference.py` computes the same by autograd, `grouped.py` is the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gpd_fx.kernels.compose.grouped import composed
from gpd_fx.kernels.compose.recipe import Part as Part
from gpd_fx.kernels.compose.recipe import Recipe as Recipe
from gpd_fx.kernels.compose.recipe import encode, flatten
from gpd_fx.kernels.compose.terms import InputFilter as InputFilter
from gpd_fx.kernels.compose.terms import Layer as Layer
from gpd_fx.kernels.compose.terms import Line as Line
from gpd_fx.kernels.compose.terms import OutputFilter as OutputFilter
from gpd_fx.kernels.compose.terms import Product as Product
from gpd_fx.kernels.compose.terms import Term as Term
from gpd_fx.kernels.compose.terms import tap as tap


@dataclass(frozen=True)
class Network:
    """Some layers without their tensors: what is worked out once, and done every step.

    Attributes:
        recipes: what the operator is told of the layers that it takes.
        taken: these, by number.
        wide: for each layer which of the operator's results is the teacher's tensor; None for the weight itself.
        narrow: likewise the student's.
        last: which weights have their channels last.
    """

    recipes: str
    taken: tuple[int, ...]
    wide: tuple[int | None, ...]
    narrow: tuple[int | None, ...]
    last: tuple[bool, ...]

    @staticmethod
    def of(recipes: Sequence[Recipe], teacher: bool = True, student: bool = True) -> Network:
        """What is to be done for layers of which these tensors are asked for."""
        text: list[str] = []
        taken: list[int] = []
        wide: list[int | None] = []
        narrow: list[int | None] = []
        made = 0
        for number, recipe in enumerate(recipes):
            scaled = any(recipe.alpha)
            sliced = any(part is not None for part in recipe.slices)
            merged = len(recipe.terms) > 0
            same = teacher and not scaled and not sliced
            first = teacher and (scaled or merged)
            second = student and not same and (sliced or merged)
            if first or second:
                text.append(encode(recipe, first, second))
                taken.append(number)
            of_teacher = made if first else None
            made += first
            if teacher:
                wide.append(of_teacher)
            if student:
                narrow.append(made if second else of_teacher if same else None)
            made += second
        last = tuple([recipe.last for recipe in recipes])
        return Network("\n".join(text), tuple(taken), tuple(wide), tuple(narrow), last)

    def run(self, weights: Sequence[Tensor], operands: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's and the student's tensors, from all weights and the operands of the layers `taken`."""
        made = composed([weights[n] for n in self.taken], operands, self.recipes) if self.taken else ()
        wide = [weights[n] if place is None else made[place] for n, place in enumerate(self.wide)]
        narrow = [
            (weights[n] if self.last[n] else weights[n].contiguous()) if place is None else made[place]
            for n, place in enumerate(self.narrow)
        ]
        return wide, narrow


def compose(layers: Sequence[Layer], teacher: bool = True, student: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's and the student's tensor of every layer; a list that was not asked for is empty.

    The student's tensors are contiguous, or lie as the weights do on a device where these have their channels last. A
    tensor that needs no arithmetic is the weight itself, and where both networks have the same tensor, both lists hold
    it.
    """
    network = Network.of([Recipe.of(layer) for layer in layers], teacher, student)
    operands = [tensor for n in network.taken for tensor in flatten(layers[n])]
    return network.run([layer.weight for layer in layers], operands)
