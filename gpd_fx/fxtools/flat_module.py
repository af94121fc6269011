"""A module seen as a function of a flat list of tensors, for tools that know nothing of nested inputs and outputs."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class FlatModule(nn.Module):
    """`module` with its tensors in as positional arguments and its tensors out as a tuple.

    Inputs may be nested in lists, tuples and dicts; what is not a tensor stays as in the example. Outputs may be
    tensors, mappings, dataclasses and sequences of them; what is not a tensor is left out.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        paths, self._spec = pytree.tree_flatten_with_path((args, kwargs))
        self._leaves = [leaf for _, leaf in paths]
        self._slots = [slot for slot, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        parameters = list(inspect.signature(module.forward).parameters)
        self.input_names = _unique([_input_name(paths[slot][0], parameters) for slot in self._slots])
        self._output_names: tuple[str, ...] = ()

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The tensors of the example, on the CPU."""
        return tuple(self._leaves[slot].detach().cpu() for slot in self._slots)

    @property
    def batch(self) -> int:
        """The example's batch size: the leading size of the first input that has an axis."""
        return next((tensor.shape[0] for tensor in self.example if tensor.ndim), 1)

    @property
    def batched(self) -> tuple[bool, ...]:
        """Which inputs have the batch as their leading axis: those with its size."""
        batch = self.batch
        return tuple(tensor.ndim > 0 and tensor.shape[0] == batch for tensor in self.example)

    def resize(self, batch: int) -> tuple[Tensor, ...]:
        """The example with another batch size: its rows, repeated as often as needed."""
        rows = torch.arange(batch) % max(self.batch, 1)
        return tuple(
            tensor[rows] if batched else tensor for tensor, batched in zip(self.example, self.batched, strict=True)
        )

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, from their place in the structure that the last call returned."""
        return self._output_names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The module's output tensors, in order."""
        leaves = list(self._leaves)
        for slot, tensor in zip(self._slots, tensors, strict=True):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        named = list(named_tensors(self.module(*args, **kwargs)))
        self._output_names = _unique([name or "output" for name, _ in named], taken=self.input_names)
        return tuple(tensor for _, tensor in named)


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors inside mappings, dataclasses and sequences, in order, with the path to each."""
    if isinstance(value, Tensor):
        yield name, value
        return
    children: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        children = list(value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, (list, tuple)):
        children = list(
            zip(getattr(value, "_fields", range(len(value))), value, strict=True)
        )  # a named tuple has names
        name = name or "output"
    for key, child in children:
        yield from named_tensors(child, f"{name}_{key}" if name else str(key))


def draw(example: Tensor, generator: torch.Generator) -> Tensor:
    """A random tensor of the example's shape and type, and in the example's range.

    Integers are uniform between the example's extremes. Floats are drawn from the example's own values, which keeps
    masks, probabilities and images what they are; a constant example gives normal numbers.
    """
    if example.dtype == torch.bool:
        return torch.randint(0, 2, example.shape, generator=generator).bool()
    if example.numel() == 0:
        return example.clone()
    if not example.is_floating_point() and not example.is_complex():
        low, high = int(example.min()), int(example.max())
        return torch.randint(low, high + 1, example.shape, generator=generator).to(example.dtype)
    values = example.flatten()
    if bool((values == values[0]).all()):
        return torch.randn(example.shape, generator=generator, dtype=torch.float64).to(example.dtype)
    return values[torch.randint(0, values.numel(), example.shape, generator=generator)]


def _input_name(path: tuple[Any, ...], parameters: list[str]) -> str:
    """`path` starts with 0 for positional arguments or 1 for keyword arguments, then the place among them."""
    kind, place, *rest = (getattr(key, "idx", getattr(key, "key", None)) for key in path)
    if kind == 1:
        first = str(place)
    else:
        first = parameters[place] if isinstance(place, int) and place < len(parameters) else f"input_{place}"
    return "_".join([first, *map(str, rest)])


def _unique(names: list[str], taken: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names with every character that is no identifier's replaced, and numbered where they would clash."""
    result: list[str] = []
    for name in names:
        clean = candidate = re.sub(r"\W", "_", name) or "value"
        count = 1
        while candidate in result or candidate in taken:
            candidate, count = f"{clean}_{count}", count + 1
        result.append(candidate)
    return tuple(result)
