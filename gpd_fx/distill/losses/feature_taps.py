"""What modules and nodes compute inside a model, picked by name; for any module and any captured graph.

A module is watched by a hook. In a graph the output of a module is the last node inside it that a node outside uses,
as far as the graph's record of modules goes; there a `Tap` is put, which keeps what it is given.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpd_fx.capture.capture import capture
from gpd_fx.errors import ArgumentError
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher


class Tap(nn.Module):
    """Keeps what it is called with until that is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, value: Tensor) -> Tensor:
        self.kept = [value]
        return value

    def take(self, name: str) -> Tensor:
        """The value of the last call; it is forgotten here.

        Raises:
            ArgumentError: there was no call.
        """
        if not self.kept:
            raise ArgumentError(f"features: {name!r} was not called; pick a module that every call of the model uses")
        return self.kept.pop()


@contextlib.contextmanager
def watched(module: nn.Module, names: Sequence[str]) -> Generator[list[Tensor]]:
    """Meanwhile calls are watched; afterwards the list holds the outputs of the modules, in the order of the names.

    Raises:
        ArgumentError: there is no module of a name, it is not called, or gives no tensor.
    """
    modules = dict(module.named_modules())
    taps = [Tap() for _ in names]
    handles: list[Any] = []

    def hook(tap: Tap, name: str) -> Any:
        def keep(layer: nn.Module, args: Any, output: Any) -> None:
            tap(first_tensor(output, name))

        return keep

    found: list[Tensor] = []
    try:
        for tap, name in zip(taps, names, strict=True):
            handles.append(modules[name].register_forward_hook(hook(tap, name)))
        yield found
        found += [tap.take(name) for tap, name in zip(taps, names, strict=True)]
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any, name: str) -> Tensor:
    """The tensor that a module gives, or the first of several.

    Raises:
        ArgumentError: it gives none.
    """
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise ArgumentError(f"features: {name!r} gives a {type(output).__name__} without a tensor; pick another module")


def find_node(graph: fx.GraphModule, name: str) -> fx.Node:
    """The node that a name means: the node of that name, or the output of the module of that name.

    Raises:
        ArgumentError: there is none.
    """
    paths: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function":
            if node.name == name:
                return node
            for path in _modules(node):
                paths.setdefault(path, []).append(node)
    leaving = [node for node in paths.get(name, ()) if any(name not in _modules(user) for user in node.users)]
    if leaving:
        return leaving[-1]
    close = difflib.get_close_matches(name, [*paths, *(node.name for node in graph.graph.nodes)], n=5)
    raise ArgumentError(
        f"features: the captured model has no module or node {name!r}"
        + (f"; close to it: {', '.join(close)}" if close else "")
    )


def put_tap(graph: fx.GraphModule, node: fx.Node) -> Tap:
    """Let the graph hand what a node computes to a tap."""
    tap = Tap()
    name = next(f"gpd_fx_tap_{n}" for n in range(10**6) if not hasattr(graph, f"gpd_fx_tap_{n}"))
    graph.add_module(name, tap)
    with graph.graph.inserting_after(node):
        graph.graph.call_module(name, (node,))
    graph.recompile()
    return tap


def remove_taps(graph: fx.GraphModule) -> None:
    """Take all taps out again."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Tap):
            graph.graph.erase_node(node)
            graph.delete_submodule(str(node.target))
    graph.recompile()


class TeacherTaps:
    """Features of a dynamic teacher and of its student, by the same names.

    The teacher's are taken from its graph of train mode. The student runs as the user's own module, so the name of a
    node must be that of a module's output.

    Raises:
        ArgumentError: a name means nothing, or a node that is no module's output.
    """

    def __init__(self, teacher: DynamicTeacher, names: Sequence[str]) -> None:
        self._graph = teacher.graphs["train_mode"]
        assert isinstance(self._graph, fx.GraphModule)
        self._skeleton = teacher.skeleton
        nodes = [find_node(self._graph, name) for name in names]
        self.names = [self._module(name, node) for name, node in zip(names, nodes, strict=True)]
        self._taps = [put_tap(self._graph, node) for node in nodes]

    def _module(self, name: str, node: fx.Node) -> str:
        modules = dict(self._skeleton.named_modules())
        if name in modules:
            return name
        for path in reversed(_modules(node)):
            if path and path in modules and _leaves(node, path):
                return path
        inside = ", ".join(repr(path) for path in _modules(node) if path) or "the model itself"
        raise ArgumentError(
            f"features: node {name!r} lies inside {inside} and is no module's output; the student runs as a module, so "
            "pick one by name"
        )

    @contextlib.contextmanager
    def watching(self) -> Generator[tuple[list[Tensor], list[Tensor]]]:
        """Meanwhile calls are watched; afterwards there are the student's and the teacher's features."""
        wide: list[Tensor] = []
        with watched(self._skeleton, self.names) as narrow:
            yield narrow, wide
            wide += [tap.take(name) for tap, name in zip(self._taps, self.names, strict=True)]

    def remove(self) -> None:
        """Leave the teacher as it was."""
        assert isinstance(self._graph, fx.GraphModule)
        remove_taps(self._graph)


class StudentTaps:
    """Features of a student that is trained alone, by module name."""

    def __init__(self, student: nn.Module, names: Sequence[str]) -> None:
        check_modules(student, names, "the student")
        self._student, self._names = student, names

    @contextlib.contextmanager
    def watching(self) -> Generator[tuple[list[Tensor], list[Tensor]]]:
        """Meanwhile calls are watched; afterwards there are the student's features, and none of a teacher."""
        with watched(self._student, self._names) as narrow:
            yield narrow, []

    def remove(self) -> None:
        """There is nothing to remove."""


def with_features(
    model: nn.Module, names: Sequence[str], example: Tensor
) -> tuple[nn.Module, Mapping[str, Tap | None]]:
    """A model whose features of these names can be watched, and the taps of those that are nodes.

    Where every name is that of a module, the model itself; otherwise its capture in eval mode, with taps.
    """
    modules = dict(model.named_modules())
    if all(name in modules for name in names):
        return model, dict.fromkeys(names)
    graph = capture(model, (example,), mode="eval")
    return graph, {name: put_tap(graph, find_node(graph, name)) for name in names}


def check_modules(model: nn.Module, names: Sequence[str], whose: str) -> None:
    """Refuse names that are no modules.

    Raises:
        ArgumentError: with the names that are close.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            close = difflib.get_close_matches(name, list(modules), n=5)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise ArgumentError(f"features: {whose} has no module {name!r}{hint}")


def _modules(node: fx.Node) -> list[str]:
    """The paths of the modules that a node lies in, outermost first."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    return [str(entry[0]) for entry in stack.values()]


def _leaves(node: fx.Node, path: str) -> bool:
    return any(path not in _modules(user) for user in node.users)
