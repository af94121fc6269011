"""The composition of all layers as one operator, `gpd_fx::compose`, and its gradient, `gpd_fx::compose_backward`.

Both are opaque to autograd, `torch.compile` and `torch.export`, which see one call over flat lists of tensors. Saved
for the backward pass are the operands themselves and nothing else. Autocast does not reach inside: a sum rounded to
bf16 would lose what the branches learn. On CUDA the layers whose form the tile kernels know go through these, all in
one launch; everything else is plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gpd_fx.kernels import launch, plain
from gpd_fx.kernels.forms import blank, memory_format, twin
from gpd_fx.kernels.recipe import Operands, Recipe, parse


@torch.library.custom_op("gpd_fx::compose", mutates_args=())
def compose_op(weights: Sequence[Tensor], operands: Sequence[Tensor], recipes: str) -> list[Tensor]:
    """For each layer the teacher's tensor, then the student's, where its recipe asks for them."""
    flat = iter(operands)
    usable = launch.usable(weights)
    found: dict[int, tuple[Tensor | None, Tensor | None]] = {}
    tiled: dict[int, tuple[Recipe, Tensor, Operands]] = {}
    with torch.autocast(weights[0].device.type, enabled=False):
        for number, (recipe, weight) in enumerate(zip(parse(recipes), weights, strict=True)):
            layer = recipe.operands(flat)
            if usable and launch.supported(recipe):
                tiled[number] = recipe, weight, layer
            else:
                found[number] = _plain_forward(recipe, weight, layer)
        if tiled:
            chosen = list(tiled.values())
            made = launch.forward([r for r, *_ in chosen], [w for _, w, _ in chosen], [o for *_, o in chosen])
            found.update(zip(tiled, made, strict=True))
    return [tensor for number in sorted(found) for tensor in found[number] if tensor is not None]


def _plain_forward(recipe: Recipe, weight: Tensor, operands: Operands) -> tuple[Tensor | None, Tensor | None]:
    wide, narrow = plain.forward(recipe, weight, operands)
    return _lying(recipe, wide), _lying(recipe, narrow)


def _lying(recipe: Recipe, tensor: Tensor | None) -> Tensor | None:
    """A tensor of a layer as its recipe says that it lies."""
    return None if tensor is None else tensor.contiguous(memory_format=memory_format(recipe.last, tensor.dim()))


@compose_op.register_fake
def _(weights: Sequence[Tensor], operands: Sequence[Tensor], recipes: str) -> list[Tensor]:
    del operands
    found: list[Tensor] = []
    for recipe, weight in zip(parse(recipes), weights, strict=True):
        found += [blank(recipe, recipe.wide, weight)] if recipe.teacher else []
        found += [blank(recipe, recipe.shape, weight)] if recipe.student else []
    return found


@torch.library.custom_op("gpd_fx::compose_backward", mutates_args=())
def backward_op(
    gradients: Sequence[Tensor | None], operands: Sequence[Tensor], recipes: str, needed: str
) -> list[Tensor]:
    """The gradients of each layer's weight and terms, from those of its outputs, where `needed` has a 1."""
    flat = iter(operands)
    given = [g for g in gradients if g is not None]
    usable = launch.usable(given)
    found: dict[int, list[Tensor | None]] = {}
    tiled: dict[int, tuple[Recipe, Operands, tuple[Tensor | None, Tensor | None], list[bool]]] = {}
    with torch.autocast(given[0].device.type, enabled=False):
        for number, (recipe, pair, flags) in enumerate(_layers(gradients, recipes, needed)):
            layer = recipe.operands(flat)
            if any(flags) and usable and launch.differentiable(recipe, flags):
                tiled[number] = recipe, layer, pair, flags
            elif any(flags):
                found[number] = _plain_backward(recipe, layer, pair, flags)
        if tiled:
            chosen = list(tiled.values())
            made = launch.backward(
                [r for r, *_ in chosen],
                [o for _, o, *_ in chosen],
                [p for _, _, p, _ in chosen],
                [f for *_, f in chosen],
            )
            found.update(zip(tiled, made, strict=True))
    return [tensor for number in sorted(found) for tensor in found[number] if tensor is not None]


def _plain_backward(
    recipe: Recipe, operands: Operands, pair: tuple[Tensor | None, Tensor | None], needed: list[bool]
) -> list[Tensor | None]:
    of_weight, *others = plain.backward(recipe, operands, *pair, needed)
    tensors = [t for term in operands.terms for t in term.tensors]
    return [_lying(recipe, of_weight), *(_like(t, g) for t, g in zip(tensors, others, strict=True))]


def _like(tensor: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient of an operand, lying as `twin` of it does."""
    return gradient if gradient is None or tensor.device.type == "cpu" else twin(tensor).copy_(gradient)


@backward_op.register_fake
def _(gradients: Sequence[Tensor | None], operands: Sequence[Tensor], recipes: str, needed: str) -> list[Tensor]:
    flat = iter(operands)
    found: list[Tensor] = []
    for recipe, pair, flags in _layers(gradients, recipes, needed):
        like = next((tensor for tensor in pair if tensor is not None), None)
        tensors = [t for term in recipe.operands(flat).terms for t in term.tensors]
        if like is not None and flags[0]:
            found.append(blank(recipe, recipe.wide, like))
        found += [twin(t) for t, flag in zip(tensors, flags[1:], strict=True) if flag]
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
