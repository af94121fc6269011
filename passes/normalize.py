"""Normalize: bring a graph, in whatever form it is held, to the form that all other passes take.

That form is what `gpd_fx.capture` gives: a plain `GraphModule` of ATen ops at the level of layers (conv2d, linear,
batch_norm, layer_norm, attention), parameters as attributes under the model's names, and `meta["val"]` at every node,
with symbolic sizes where the exporter left them open.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from gpd_fx.capture.capture import capture, clean
from gpd_fx.errors import GPDError, PassError
from gpd_fx.fxtools.attributes import (
    fetch,
    graphs_of,
    put,
    with_graph,
)
from gpd_fx.fxtools.torch_internals import (
    OpOverload,
    copy_graph,
    enter_autocast,
    exit_autocast,
    has_structure,
)
from gpd_fx.passes.base import IN_CODE_ONLY, Pass, PassResult
from gpd_fx.passes.branch import find_composition
from gpd_fx.passes.fingerprint import Sharing
from gpd_fx.passes.raising import raise_ops
from gpd_fx.passes.shapes import VALUE, has_values, refresh_values

_ARITHMETIC = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ON_SIZES = frozenset(getattr(operator, name) for name in (*_ARITHMETIC, *_COMPARISONS))
"""Functions on results of several tensors and on symbolic sizes."""


@dataclass(frozen=True)
class Normalize(Pass):
    """Brings any of these to the form of `gpd_fx.capture`.

    - a graph that `gpd_fx.capture` made, also after passes that left nodes without recorded values;
    - a `torch.export.ExportedProgram`, also after `run_decompositions()`, whose core ATen ops are raised to the
      composite ops that they come from;
    - what its `.module()` returns;
    - its lifted `.graph_module`, together with `program`, which holds the tensors;
    - a `torch.fx.symbolic_trace` graph with submodules, methods and torch functions, and any other `nn.Module`. These
      are captured anew in the mode that they are in, for which they need example inputs.

    Parameters are shared with the argument, buffers are copies.

    Attributes:
        example_inputs: positional inputs, or a mapping of keyword inputs, for a graph whose inputs record no shapes.
        program: the program that a lifted graph belongs to.

    Example:
        >>> graph = Normalize()(torch.export.export(model, (x,))).graph_module
        >>> graph = Normalize((x,))(torch.fx.symbolic_trace(model)).graph_module
    """

    parameters: ClassVar[Sharing] = "shared"
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = field(default=None, metadata={IN_CODE_ONLY: True})
    program: ExportedProgram | None = field(default=None, metadata={IN_CODE_ONLY: True})

    def admits(self, given: Any) -> None:
        """Take modules and exported programs."""
        if not isinstance(given, nn.Module | ExportedProgram):
            raise PassError(
                f"{self.name} takes a GraphModule, an ExportedProgram or an nn.Module, got {type(given).__name__}"
            )

    def sources(self, module: Any) -> tuple[Any, ...]:
        """The argument, and the program whose tensors it is given."""
        return (module,) if self.program is None else (module, self.program)

    def requires(self, module: fx.GraphModule) -> None:
        if isinstance(module, fx.GraphModule) and find_composition(module) is not None:  # pyright: ignore[reportUnnecessaryIsInstance]  see `admits`
            raise PassError(f"{self.name}: the graph has branches; run the pass Merge first")

    def run(self, module: fx.GraphModule) -> PassResult:
        notes: list[str] = []
        given: Any = module
        if isinstance(given, fx.GraphModule) and _lifted(given):
            given = self._with_tensors(given)
        if isinstance(given, ExportedProgram):
            notes.append("tensors of the program became attributes of the graph")
            given = given.module(check_guards=False)
        problem = _unlike_aten(given)
        if problem is not None:
            graph = self._captured(given, problem)
            notes.append(f"captured anew, because {problem}")
        else:
            graph = clean(_copied(given))
            gone = len(given.graph.nodes) - len(graph.graph.nodes)
            notes += [f"{gone} nodes of the exporter's checks and of regions were taken away"] if gone > 0 else []
        if not refresh_values(graph):
            raise PassError(f"{self.name}: an attribute that the graph reads is an empty place (None)")
        raised = raise_ops(graph.graph)
        notes += [f"raised {count} {what}" for what, count in raised.items()]
        stale = problem is None and not notes and _without_values(given)
        notes += [f"recorded the values of {stale} nodes"] if stale else []
        if not notes:
            return PassResult(module, False, ("the graph is in the form that passes take",))
        graph.recompile()
        return PassResult(graph, True, tuple(notes))

    def ensures(self, module: fx.GraphModule) -> None:
        module.graph.lint()
        problem = _unlike_aten(module)
        if problem is not None:
            raise PassError(f"{self.name}: {problem}, which no pass takes")

    def _with_tensors(self, lifted: fx.GraphModule) -> ExportedProgram:
        """The program of a lifted graph, with this graph."""
        program = self.program
        if program is None:
            names = [node.name for node in lifted.graph.find_nodes(op="placeholder") if _holds_state(node)]
            raise PassError(
                f"{self.name}: the inputs {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} of the graph are "
                "parameters or buffers (it is the lifted graph of an ExportedProgram), whose values it does not hold; "
                "give the ExportedProgram itself, or Normalize(program=the program)"
            )
        try:
            return ExportedProgram(
                root=lifted,
                graph=copy_graph(lifted.graph)[0],
                graph_signature=program.graph_signature,
                state_dict=program.state_dict,
                range_constraints=program.range_constraints,
                module_call_graph=program.module_call_graph,
                example_inputs=program.example_inputs,
                constants=program.constants,
                verifiers=program.verifiers,
            )
        except Exception as error:
            raise PassError(
                f"{self.name}: the graph does not have the inputs and outputs that `program` records for it "
                f"({type(error).__name__}: {error})"
            ) from error

    def _captured(self, module: nn.Module, problem: str) -> fx.GraphModule:
        """Capture a module in the mode that it is in."""
        inputs = self.example_inputs
        if inputs is None:
            inputs = _recorded_inputs(module)
        if inputs is None:
            raise PassError(
                f"{self.name}: {problem}, so the module has to be captured anew, and nothing records what it takes; "
                "pass example inputs, Normalize((x,))"
            )
        modes = {part.training for part in module.modules() if next(part.parameters(), None) is not None}
        if len(modes) > 1:
            raise PassError(
                f"{self.name}: some submodules are in train mode and some in eval mode, and a graph is captured in one "
                "mode; call .train() or .eval() on the module"
            )
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, None)
        try:
            return capture(module, args, kwargs, mode="train" if modes == {True} else "eval")
        except GPDError as error:
            raise type(error)(f"{self.name}: {error}") from error


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph and of those inside it, over the same parameters and over copies of the buffers."""
    made = with_graph(module, copy_graph(module.graph)[0])
    buffers: dict[int, Tensor] = {}
    for node in made.graph.find_nodes(op="get_attr"):
        value = fetch(made, str(node.target))
        if isinstance(value, fx.GraphModule):
            put(made, str(node.target), _copied(value), like=value)
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            put(made, str(node.target), buffers.setdefault(id(value), value.clone()), like=value)
    made.meta.update(module.meta)
    return made


def _holds_state(placeholder: fx.Node) -> bool:
    """Whether an input of a lifted graph is a parameter or buffer: the exporter says so by the prefix of its name."""
    return placeholder.name.startswith(("p_", "b_", "c_", "obj_"))


def _lifted(module: fx.GraphModule) -> bool:
    """Whether a graph takes its parameters or buffers as inputs, as that of an exported program does."""
    return not has_structure(module) and any(map(_holds_state, module.graph.find_nodes(op="placeholder")))


def _unlike_aten(module: nn.Module) -> str | None:
    """Why a module is no graph of ATen calls whose inputs record their values; None where it is."""
    if not isinstance(module, fx.GraphModule):
        return f"a {type(module).__name__} is no graph"
    for node in [node for inner in graphs_of(module) for node in inner.graph.nodes]:
        known = node.target in _ON_SIZES or node.target in (enter_autocast, exit_autocast)
        known = known or isinstance(node.target, OpOverload | torch._ops.HigherOrderOperator)  # pyright: ignore[reportPrivateUsage]  no public name
        known = known or str(getattr(node.target, "__module__", "")) in ("torch", "math", "_operator")
        if node.op == "call_method" or (node.op == "call_module" and node.target != "_guards_fn"):
            return f"node {node.name!r} is a {node.op} of {node.target!r}"
        if node.op == "call_function" and (not known or _is_torch_function(node.target)):
            return f"node {node.name!r} calls {getattr(node.target, '__name__', node.target)}, which is no ATen op"
    if not has_values(module):
        return "its inputs record no values"
    return None


def _is_torch_function(target: Any) -> bool:
    """Whether a target is a function of torch on tensors, such as `torch.relu`; those on symbolic sizes are not."""
    name = str(getattr(target, "__name__", ""))
    return getattr(target, "__module__", "") == "torch" and not name.startswith("sym_") and hasattr(Tensor, name)


def _without_values(module: fx.GraphModule) -> int:
    """How many calls record no value."""
    return sum(VALUE not in node.meta for node in module.graph.nodes if node.op == "call_function")


def _recorded_inputs(module: nn.Module) -> tuple[Any, ...] | None:
    """Inputs of the shapes that a graph's inputs record, with zeros for values; None where one records nothing."""
    if not isinstance(module, fx.GraphModule):
        return None
    found: list[Any] = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get(VALUE, node.meta.get("tensor_meta"))
        if value is None or not hasattr(value, "shape"):
            return None
        device = value.device if isinstance(value, Tensor) else None
        found.append(torch.zeros([_example(extent) for extent in value.shape], dtype=value.dtype, device=device))
    if not has_structure(module):
        return tuple(found)
    info: Any = getattr(module.graph._codegen, "pytree_info")  # noqa: B009  # pyright: ignore[reportPrivateUsage]  only that of captures has it
    args, kwargs = pytree.tree_unflatten(found, info.in_spec)
    return None if kwargs else tuple(args)


def _example(extent: Any) -> int:
    """The size that a symbolic dimension had in the example."""
    hint = extent.node.hint if isinstance(extent, torch.SymInt) else extent
    return 2 if hint is None else int(hint)
