"""The composition of all layers as one operator, `gpd_fx::compose`, and its gradient, `gpd_fx::compose_backward`.

Both are opaque to autograd, `torch.compile` and `torch.export`, which see one call over flat lists of tensors. Saved
for the backward pass are the operands themselves and nothing else. Autocast does not reach inside: a sum rounded to
bf16 would lose what the branches learn. On CUDA the layers whose form the tile kernels know go through these, all in
one launch; everything else is plain torch.

Outside of a compiler `composed` joins the two by an `autograd.Function`: what `register_autograd` makes of lists of
hundreds of tensors takes longer than all else.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpd_fx.kernels.compose import launch, plain
from gpd_fx.kernels.compose.forms import lying, memory_format
from gpd_fx.kernels.compose.recipe import Recipe, parse, starts_of

Given = tuple[bool, ...]
"""Which tensors of a list are there."""


def composed(weights: Sequence[Tensor], operands: Sequence[Tensor], recipes: str) -> Sequence[Tensor]:
    """What `compose_op` makes, with gradients."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return compose_op(weights, operands, recipes)
    return _Composed.apply(recipes, len(weights), *weights, *operands)  # pyright: ignore[reportUnknownMemberType, reportReturnType]  not typed


# The compiler must not put them into CUDA graphs of its own: their tables would live on in its memory.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("gpd_fx::compose", mutates_args=(), tags=_TAGS)
def compose_op(weights: Sequence[Tensor], operands: Sequence[Tensor], recipes: str) -> list[Tensor]:
    """For each layer the teacher's tensor, then the student's, where its recipe asks for them."""
    layers, starts = parse(recipes), starts_of(recipes)
    tensors = [*weights, *operands]
    made: list[Tensor | None] = [None] * starts[-1].result
    rest: Sequence[int] = range(len(layers))
    if launch.usable(weights):
        plan = launch.forward_plan(recipes)
        if plan.run(tensors, weights[0], made):
            rest = plan.rest
    if rest:
        with torch.autocast(weights[0].device.type, enabled=False):
            for number in rest:
                recipe, start = layers[number], starts[number]
                layer = recipe.operands(iter(operands[start.operand : starts[number + 1].operand]))
                pair = [t for t in plain.forward(recipe, weights[number], layer) if t is not None]
                made[start.result : starts[number + 1].result] = [_lying(t, recipe.last) for t in pair]
    return [tensor for tensor in made if tensor is not None]


def _lying(tensor: Tensor, last: bool) -> Tensor:
    return tensor.contiguous(memory_format=memory_format(last, tensor.dim()))


@compose_op.register_fake
def _(weights: Sequence[Tensor], operands: Sequence[Tensor], recipes: str) -> list[Tensor]:
    del operands
    found: list[Tensor] = []
    for recipe, weight in zip(parse(recipes), weights, strict=True):
        found += [_blank(weight, recipe.wide, recipe.last)] if recipe.teacher else []
        found += [_blank(weight, recipe.shape, recipe.last)] if recipe.student else []
    return found


def _blank(like: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    return like.new_empty_strided(shape, lying(shape, last))


@torch.library.custom_op("gpd_fx::compose_backward", mutates_args=(), tags=_TAGS)
def backward_op(
    gradients: Sequence[Tensor | None], operands: Sequence[Tensor], recipes: str, needed: str
) -> list[Tensor]:
    """The gradients of each layer's weight and terms, from those of its outputs, where `needed` has a 1."""
    layers, starts, flags = parse(recipes), starts_of(recipes), needed.split(" ")
    like = next(g for g in gradients if g is not None)
    tensors = [*gradients, *operands]
    results: list[Tensor | None] = [None] * needed.count("1")
    rest: Sequence[int] = range(len(layers))
    if launch.usable([g for g in gradients if g is not None]):
        plan = launch.backward_plan(recipes, needed, tuple([g is not None for g in gradients]))
        if plan.run(tensors, like, results):
            rest = plan.rest
    asked = [number for number in rest if "1" in flags[number]]
    if asked:
        first = _places(needed)
        with torch.autocast(like.device.type, enabled=False):
            for number in asked:
                start, end = starts[number], starts[number + 1]
                made = _plain_backward(
                    layers[number],
                    operands[start.operand : end.operand],
                    gradients[start.result : end.result],
                    [flag == "1" for flag in flags[number]],
                )
                results[first[number] : first[number + 1]] = made
    return [tensor for tensor in results if tensor is not None]


@functools.lru_cache(maxsize=64)
def _places(needed: str) -> list[int]:
    """Where the gradients of each layer start among those that are needed, and the end."""
    found = [0]
    for flags in needed.split(" "):
        found.append(found[-1] + flags.count("1"))
    return found


def _plain_backward(
    recipe: Recipe, operands: Sequence[Tensor], gradients: Sequence[Tensor | None], needed: list[bool]
) -> list[Tensor]:
    given = iter(gradients)
    pair = (next(given) if recipe.teacher else None, next(given) if recipe.student else None)
    found = plain.backward(recipe, recipe.operands(iter(operands)), *pair, needed)
    layouts = [(recipe.wide, recipe.last), *recipe.shapes()]
    return [_lying(g.view(shape), last) for g, (shape, last) in zip(found, layouts, strict=True) if g is not None]


@backward_op.register_fake
def _(gradients: Sequence[Tensor | None], operands: Sequence[Tensor], recipes: str, needed: str) -> list[Tensor]:
    found: list[Tensor] = []
    starts = starts_of(recipes)
    for number, (recipe, flags) in enumerate(zip(parse(recipes), needed.split(" "), strict=True)):
        start, end = starts[number], starts[number + 1]
        like = next((g for g in gradients[start.result : end.result] if g is not None), None)
        if like is not None and flags[0] == "1":
            found.append(_blank(like, recipe.wide, recipe.last))
        own = operands[start.operand + recipe.constants : end.operand]
        for tensor, (shape, last), flag in zip(own, recipe.shapes(), flags[1:], strict=True):
            found += [_blank(tensor, shape, last)] if flag == "1" else []
    return found


@functools.lru_cache(maxsize=64)
def _needed(recipes: str, wanted: Given, given: Given) -> tuple[str, tuple[int | None, ...]]:
    """Which gradients `backward_op` is asked for, layer by layer; and for each input which of them is its own.

    Args:
        recipes: as for the operators.
        wanted: which weights and operands want one.
        given: which results have one.
    """
    layers, starts = parse(recipes), starts_of(recipes)
    text: list[str] = []
    of_weights: list[int | None] = []
    of_operands: list[int | None] = []
    numbers = itertools.count()
    for number, recipe in enumerate(layers):
        start, end = starts[number], starts[number + 1]
        own = wanted[len(layers) + start.operand + recipe.constants : len(layers) + end.operand]
        reached = any(given[start.result : end.result])
        flags = [reached and flag for flag in (wanted[number], *own)]
        text.append("".join(["01"[flag] for flag in flags]))
        places = [next(numbers) if flag else None for flag in flags]
        of_weights.append(places[0])
        of_operands += [None] * recipe.constants + places[1:]
    return " ".join(text), (*of_weights, *of_operands)


def _differentiate(
    gradients: Sequence[Tensor | None], operands: Sequence[Tensor], recipes: str, wanted: Given
) -> list[Tensor | None]:
    """The gradient of each weight and operand that wants one."""
    needed, places = _needed(recipes, wanted, tuple([g is not None for g in gradients]))
    made = backward_op(gradients, operands, recipes, needed) if "1" in needed else []
    return [None if place is None else made[place] for place in places]


class _Composed(torch.autograd.Function):
    """`compose_op` with its gradient."""

    @staticmethod
    def forward(ctx: Any, recipes: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.recipes = recipes
        ctx.set_materialize_grads(False)  # the gradient of what nobody used is None, not zeros
        weights, operands = tensors[:count], tensors[count:]
        ctx.save_for_backward(*operands)
        return tuple(compose_op(weights, operands, recipes))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = _differentiate(gradients, ctx.saved_tensors, ctx.recipes, ctx.needs_input_grad[2:])
        return (None, None, *found)


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], list[Tensor], str], output: list[Tensor]) -> None:
    del output
    _, operands, ctx.recipes = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None], None]:
    of_weights, of_operands, _ = ctx.needs_input_grad
    found = _differentiate(gradients, ctx.saved_tensors, ctx.recipes, (*of_weights, *of_operands))
    return found[: len(of_weights)], found[len(of_weights) :], None


compose_op.register_autograd(_backward, setup_context=_setup_context)
