"""What a pass was given, noted before it runs, so that the base class can tell whether it kept its promises.

Nothing is copied: a graph is noted as text, a tensor by its identity and by the counter of its in-place writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from gpd_fx.errors import PassError
from gpd_fx.fxtools.attributes import fetch, graphs_of

Sharing = Literal["shared", "new", "any"]
"""The parameters of a pass's result: those of its argument, none of them, or not promised."""


class Fingerprint:
    """The graphs and the tensors of modules or programs as they are now.

    Args:
        given: `GraphModule`s, other modules, or `ExportedProgram`s.
    """

    def __init__(self, *given: nn.Module | ExportedProgram) -> None:
        self._given = given
        self._nodes = list(_nodes(given))
        self._tensors = {name: (tensor, _version(tensor)) for name, tensor in _tensors(given)}

    def difference(self) -> str | None:
        """What has changed since, in words; None where nothing has."""
        nodes = list(_nodes(self._given))
        for before, after in zip(self._nodes, nodes, strict=False):
            if before != after:
                return f"node {before[1]!r} is not as it was"
        if len(nodes) != len(self._nodes):
            return f"its graph has {len(nodes)} nodes, it had {len(self._nodes)}"
        tensors = dict(_tensors(self._given))
        for name in self._tensors.keys() | tensors.keys():
            before, version = self._tensors.get(name, (None, None))
            after = tensors.get(name)
            if after is not before:
                return f"{name!r} is another tensor"
            if after is not None and _version(after) != version:
                return f"{name!r} was written to"
        return None

    def check_sharing(self, result: fx.GraphModule, promise: Sharing, who: str) -> None:
        """Hold the parameters of a result to what a pass promises about them.

        Raises:
            PassError: a parameter is shared that should be new, or the other way round; the message names it.
        """
        if promise == "any" or any(result is each for each in self._given):
            return
        held = {id(tensor) for tensor, _ in self._tensors.values()}
        places = {_place(tensor) for tensor, _ in self._tensors.values()} - {0}
        for name, parameter in result.named_parameters():
            if promise == "shared" and id(parameter) not in held:
                raise PassError(
                    f"{who}: its parameter {name!r} is none of its argument's, but the pass declares that it shares "
                    'them; set `parameters = "new"` or "any" in its class'
                )
            if promise == "new" and (id(parameter) in held or _place(parameter) in places):
                raise PassError(
                    f"{who}: its parameter {name!r} is its argument's, but the pass declares that it makes new ones; "
                    'set `parameters = "shared"` or "any" in its class'
                )


def _nodes(given: Sequence[nn.Module | ExportedProgram]) -> Iterator[tuple[Any, ...]]:
    for each in given:
        for inner in graphs_of(each.graph_module if isinstance(each, ExportedProgram) else each):
            for node in inner.graph.nodes:
                meta = tuple((key, id(value)) for key, value in node.meta.items())
                yield node.op, node.name, node.target, str(node.args), str(node.kwargs), meta


def _tensors(given: Sequence[nn.Module | ExportedProgram]) -> Iterator[tuple[str, Tensor]]:
    for each in given:
        if isinstance(each, ExportedProgram):
            held = each.state_dict | each.constants
            yield from ((name, value) for name, value in held.items() if isinstance(value, Tensor))
            continue
        yield from each.named_parameters(remove_duplicate=False)
        yield from each.named_buffers(remove_duplicate=False)
        if isinstance(each, fx.GraphModule):
            for node in each.graph.find_nodes(op="get_attr"):
                value = fetch(each, str(node.target))
                if isinstance(value, Tensor):
                    yield str(node.target), value


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; tensors made in inference mode do not count it."""
    return None if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]  no public name


def _place(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 where it has none."""
    return tensor.untyped_storage().data_ptr()
