"""Example inputs: those of the caller, or inferred from what models say about themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpd_fx.errors import InputError
from gpd_fx.fxtools.fake_tensors import fake_call
from gpd_fx.fxtools.size_ranges import outside
from gpd_fx.fxtools.torch_internals import flat_inputs, free_size, has_structure

Example = tuple[tuple[Any, ...], dict[str, Any]]
_SIDES = (224, 64, 32, 256, 384, 28, 8)  # what image models are usually built for
_BATCH = 2


def example_inputs(model: nn.Module) -> tuple[Any, ...]:
    """Random positional inputs for `model`, a batch of 2.

    Raises:
        InputError: nothing about the model says what it takes; or it takes keyword inputs.
    """
    args, kwargs = prepare(model, None, None)
    if kwargs:
        raise InputError(
            f"{type(model).__name__} takes keyword inputs ({', '.join(kwargs)}); pass example_inputs and example_kwargs"
        )
    return args


def prepare(model: nn.Module, args: Sequence[Any] | Tensor | None, kwargs: Mapping[str, Any] | None) -> Example:
    """The caller's example inputs, checked for form; inferred where neither is given.

    Raises:
        InputError: they are no sequence or mapping, or nothing about the model says what it takes.
    """
    if isinstance(args, Tensor):
        raise InputError("example_inputs is a tensor; pass a tuple with one entry an argument, such as (images,)")
    if args is not None and not isinstance(args, tuple | list):
        raise InputError(f"example_inputs is a {type(args).__name__}; pass a tuple with one entry an argument")
    if kwargs is not None and not isinstance(kwargs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  users call this
        raise InputError(f"example_kwargs is a {type(kwargs).__name__}; pass a dict of keyword arguments")
    if args is not None or kwargs:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 0:
                raise InputError(f"an example input of shape {list(leaf.shape)} is empty; pass a batch of 2 or more")
        plain = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (args or (), kwargs or {}))
        return tuple(plain[0]), dict(plain[1])
    for guess in _guesses(model):
        if _accepts(model, guess):
            return guess
    raise InputError(
        f"cannot tell what {type(model).__name__} takes as input; pass example_inputs=(...), one entry an argument of "
        "its forward, with a batch of 2 or more"
    )


def check_inputs(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compare inputs with those that a graph was captured with: what is fixed there must be the same.

    Raises:
        InputError: another structure, another size of a fixed dimension, or another value of what is no tensor.
    """
    if not has_structure(graph):  # a graph that was unpickled forgets what it was captured with
        return
    remedy = "expand the model with example inputs like those of this call"
    try:
        leaves = flat_inputs(graph, args, kwargs)
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise InputError(f"the dynamic teacher's graph does not take these inputs: it {error}; {remedy}") from error
    for node, leaf in zip(graph.graph.find_nodes(op="placeholder"), leaves, strict=True):
        captured = node.meta.get("val")
        if isinstance(captured, Tensor):
            fixed = [None if free_size(extent) else int(extent) for extent in captured.shape]
            if not isinstance(leaf, Tensor) or not _fits(leaf.shape, fixed):
                given = list(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf)
                wanted = ", ".join("any" if n is None else str(n) for n in fixed)
                raise InputError(
                    f"input {node.name!r} is {given}, the dynamic teacher was made for [{wanted}]; {remedy}"
                )
            wrong = outside(node, leaf)
            if wrong is not None:
                dim, (low, high) = wrong
                sizes = f"at least {low}" if high is None else f"at most {high}" if low == 0 else f"{low} to {high}"
                raise InputError(
                    f"input {node.name!r} has the size {leaf.shape[dim]} along dimension {dim}; the model's code "
                    f"decides by this size, and the dynamic teacher was captured for {sizes}; {remedy}"
                )
        elif isinstance(captured, bool | int | float | str | None) and leaf != captured:
            raise InputError(
                f"input {node.name!r} is {leaf!r}, the dynamic teacher was made for {captured!r}; {remedy}"
            )


def _fits(shape: Sequence[int], fixed: Sequence[int | None]) -> bool:
    return len(shape) == len(fixed) and all(n in (None, m) for n, m in zip(fixed, shape, strict=True))


def _accepts(model: nn.Module, guess: Example) -> bool:
    """Whether a call on fake tensors goes through."""
    training = {module: module.training for module in model.modules()}
    try:
        for module in training:
            module.training = False
        fake_call(model, *guess)
    except Exception as error:  # noqa: BLE001  whatever a model raises on inputs that are not its own
        return "DataDependent" in type(error).__name__  # it got as far as to ask for a value; capture will say where
    finally:
        for module, was in training.items():
            module.training = was
    return True


def _guesses(model: nn.Module) -> Iterator[Example]:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = first.device if first is not None else torch.device("cpu")
    dtype = first.dtype if first is not None else torch.get_default_dtype()

    def images(channels: int, *size: int) -> Example:
        return (torch.randn(_BATCH, channels, *size, device=device, dtype=dtype),), {}

    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, Mapping) and "input_size" in config:  # timm
        yield images(*config["input_size"])
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values":  # Hugging Face vision
        side = getattr(config, "image_size", 224)
        size = tuple(side) if isinstance(side, list | tuple) else (side, side)
        args, _ = images(getattr(config, "num_channels", 3), *size)
        yield (), {"pixel_values": args[0]}
    dummy = getattr(model, "dummy_inputs", None)  # Hugging Face text
    if isinstance(dummy, Mapping):
        vocabulary = getattr(config, "vocab_size", None)
        ids = {k: v % vocabulary if isinstance(v, Tensor) and vocabulary else v for k, v in dummy.items()}
        yield (), {k: v.to(device) if isinstance(v, Tensor) else v for k, v in ids.items()}
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            own = getattr(model, "image_size", None) or getattr(model, "img_size", None)
            dims = len(module.kernel_size)
            for side in ((own,) if isinstance(own, int) else ()) + (_SIDES if dims < 3 else (16, 32)):
                yield images(module.in_channels, *((side,) * dims))
            return
        if isinstance(module, nn.Linear):
            yield images(module.in_features)
            yield images(16, module.in_features)
            return
        if isinstance(module, nn.Embedding):
            yield (torch.randint(module.num_embeddings, (_BATCH, 16), device=device),), {}
            return
