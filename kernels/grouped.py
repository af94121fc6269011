"""The composition of all layers as one operator, `gpd_fx::compose`, and its gradient, `gpd_fx::compose_backward`.

Both are opaque to autograd, `torch.compile` and `torch.export`, which see one call over flat lists of tensors. Saved
for the backward pass are the operands themselves and nothing else. Autocast does not reach inside: a sum rounded to
bf16 would lose what the branches learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gpd_fx.kernels import plain
from gpd_fx.kernels.recipe import Recipe, parse


@torch.library.custom_op("gpd_fx::compose", mutates_args=())
def compose_op(weights: Sequence[Tensor], operands: Sequence[Tensor], recipes: str) -> list[Tensor]:
    """For each layer the teacher's tensor, then the student's, where its recipe asks for them."""
    flat = iter(operands)
    found: list[Tensor] = []
    with torch.autocast(weights[0].device.type, enabled=False):
        for recipe, weight in zip(parse(recipes), weights, strict=True):
            pair = plain.forward(recipe, weight, recipe.operands(flat))
            found += [tensor for tensor in pair if tensor is not None]
    return found


@compose_op.register_fake
def _(weights: Sequence[Tensor], operands: Sequence[Tensor], recipes: str) -> list[Tensor]:
    del operands
    found: list[Tensor] = []
    for recipe, weight in zip(parse(recipes), weights, strict=True):
        found += [weight.new_empty(recipe.wide)] if recipe.teacher else []
        found += [weight.new_empty(recipe.shape)] if recipe.student else []
    return found


@torch.library.custom_op("gpd_fx::compose_backward", mutates_args=())
def backward_op(
    gradients: Sequence[Tensor | None], operands: Sequence[Tensor], recipes: str, needed: str
) -> list[Tensor]:
    """The gradients of each layer's weight and terms, from those of its outputs, where `needed` has a 1."""
    flat = iter(operands)
    found: list[Tensor] = []
    device = next(g.device for g in gradients if g is not None)
    with torch.autocast(device.type, enabled=False):
        for recipe, pair, flags in _layers(gradients, recipes, needed):
            layer = recipe.operands(flat)
            if any(flags):
                found += [t for t in plain.backward(recipe, layer, *pair, flags) if t is not None]
    return found


@backward_op.register_fake
def _(gradients: Sequence[Tensor | None], operands: Sequence[Tensor], recipes: str, needed: str) -> list[Tensor]:
    flat = iter(operands)
    found: list[Tensor] = []
    for recipe, pair, flags in _layers(gradients, recipes, needed):
        like = next((tensor for tensor in pair if tensor is not None), None)
        tensors = [t for term in recipe.operands(flat).terms for t in term.tensors]
        if like is not None and flags[0]:
            found.append(like.new_empty(recipe.wide))
        found += [t.new_empty(t.shape) for t, flag in zip(tensors, flags[1:], strict=True) if flag]
    return found


def _layers(
    gradients: Sequence[Tensor | None], recipes: str, needed: str
) -> Iterator[tuple[Recipe, tuple[Tensor | None, Tensor | None], list[bool]]]:
    """Each layer with the gradients of its outputs, and which gradients it is asked for."""
    given = iter(gradients)
    for recipe, flags in zip(parse(recipes), needed.split(" "), strict=True):
        pair = (next(given) if recipe.teacher else None, next(given) if recipe.student else None)
        yield recipe, pair, [flag == "1" for flag in flags]


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], str], output: list[Tensor]) -> None:
    del output
    _, operands, ctx.recipes = inputs
    ctx.set_materialize_grads(False)  # the gradient of what nobody used is None, not zeros
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None], None]:
    operands: tuple[Tensor, ...] = ctx.saved_tensors
    of_weights: list[bool]
    of_operands: list[bool]
    of_weights, of_operands, _ = ctx.needs_input_grad
    given, rest = iter(gradients), iter(of_operands)
    needed: list[list[bool]] = []
    for recipe, weight in zip(parse(ctx.recipes), of_weights, strict=True):
        pair = [next(given) for _ in range(recipe.teacher + recipe.student)]
        reached = any(gradient is not None for gradient in pair)
        for _ in range(recipe.constants):
            next(rest)
        count = sum(recipe.tensors)
        needed.append([reached and flag for flag in (weight, *(next(rest) for _ in range(count)))])
    text = " ".join("".join("01"[flag] for flag in flags) for flags in needed)
    made = iter(backward_op(gradients, operands, ctx.recipes, text) if "1" in text else ())
    weights: list[Tensor | None] = []
    others: list[Tensor | None] = []
    for recipe, flags in zip(parse(ctx.recipes), needed, strict=True):
        weights.append(next(made) if flags[0] else None)
        others += [None] * recipe.constants
        others += [next(made) if flag else None for flag in flags[1:]]
    return weights, others, None


compose_op.register_autograd(_backward, setup_context=_setup_context)
