"""Verification: a transformed network against its source, in float64, on random inputs.

`check_expansion` is what `expand` runs. It compares graph with graph, for both modes: the capture with the model's
tensors, and the wide graph with the same tensors widened. Randomness is switched off in both (dropout, stochastic
depth), float casts become float64, and the batch differs from the example's. Tensors are also perturbed, so that an
untouched batch norm or a zero layer scale hides nothing. Then the capture is compared with the module itself.

An error is measured as max |difference| / max |output|. Beyond the tolerance it is held against the conditioning of the
model: what a change of its input by one unit in the last place does.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpd_fx.axes import Expr
from gpd_fx.errors import VerificationError
from gpd_fx.passes.widen import EXACT
from gpd_fx.paths import fetch, graphs_of
from gpd_fx.plan import Plan
from gpd_fx.private import OpOverload, copy_graph, enter_autocast, flat_inputs, put_tensor
from gpd_fx.rules.site import bind, op_name

if TYPE_CHECKING:
    from gpd_fx.expansion import Draft
    from gpd_fx.teacher import DynamicTeacher

TOLERANCE = 1e-9
_CONDITIONING = 100.0  # an error may be this many times what one unit in the last place of the input does
_ROUNDINGS = 1e5  # how many units of rounding a deep network may gather in its own dtype
_CAST_TOLERANCE = 1e-4  # module against capture: a module may cast to float32 by itself
_ADVICE = (
    "Nothing is returned; please report this model. A ratio of {glob: 1} for the parameters around that node leaves "
    "them as they are"
)
aten = torch.ops.aten
_EXACT = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def relative_error(expected: Any, actual: Any) -> float:
    """max |difference| / max |output| over all tensors of two outputs; inf where they do not compare."""
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(actual)
    if len(left) != len(right):
        return float("inf")
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if isinstance(a, Tensor)]
    return max((_tensor_error(a, b) for a, b in pairs), default=0.0)


def _tensor_error(expected: Tensor, actual: Any) -> float:
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return float("inf")
    if expected.is_complex() and actual.is_complex():
        expected, actual = torch.view_as_real(expected), torch.view_as_real(actual)
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual) else float("inf")
    expected, actual = expected.double(), actual.double()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    if not torch.equal(expected[~finite].nan_to_num(7.0), actual[~finite].nan_to_num(7.0)):
        return float("inf")
    difference = (expected - actual)[finite].abs().max().item() if finite.any() else 0.0
    scale = expected[finite].abs().max().item() if finite.any() else 0.0
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def random_like(
    example: Any, generator: torch.Generator, dtype: torch.dtype, batches: Mapping[int, int] | None = None
) -> Any:
    """Random inputs of an example's structure: normal floats, integers within the example's range.

    `batches` gives other leading sizes for some of the example's tensors, by their id.
    """

    def draw(tensor: Tensor) -> Tensor:
        batch = (batches or {}).get(id(tensor))
        if batch is not None:
            rows = torch.arange(batch, device=tensor.device) % tensor.shape[0]
            tensor = tensor[rows]
        if tensor.is_floating_point() or tensor.is_complex():
            kind = dtype if tensor.is_floating_point() else _EXACT.get(tensor.dtype, tensor.dtype)
            drawn = _exact(torch.empty(tensor.shape, dtype=tensor.dtype)).normal_(generator=generator)
            return drawn.to(tensor.device, kind)
        if tensor.dtype == torch.bool or tensor.numel() == 0:
            return tensor
        low, high = int(tensor.min()), int(tensor.max())
        return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    return pytree.tree_map_only(Tensor, draw, example)


def _perturb(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """In double precision, each value changed by up to a half, zeros made small and positive; integers as they are."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor.clone()
    factor = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device) + 0.5
    changed = _exact(tensor.detach()) * factor
    return torch.where(changed == 0, 0.1 * factor, changed)


def deterministic(graph: fx.GraphModule) -> str | None:
    """Switch off what is random in a graph and make float casts float64; in place.

    Returns:
        The name of a random op that cannot be switched off, or None.
    """
    stubborn: str | None = None
    modules = graphs_of(graph)
    for node in [node for module in modules for node in module.graph.nodes if node.op == "call_function"]:
        name = op_name(node.target)
        if node.target is enter_autocast:  # device, dtype, enabled, ...
            node.args = (*node.args[:2], False, *node.args[3:])
            continue
        node.args = pytree.tree_map(_upcast, node.args)
        node.kwargs = pytree.tree_map(_upcast, dict(node.kwargs))
        if name.startswith(
            ("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout")
        ):
            node.args = (node.args[0], 0.0, False)
        elif name.startswith("aten.bernoulli_"):
            node.target, node.args, node.kwargs = aten.fill_.Scalar, (node.args[0], 1.0), {}
        elif name == "aten.scaled_dot_product_attention.default":
            if bind(node)["dropout_p"]:
                node.args = (*node.args[:4], 0.0, *node.args[5:])
        elif name.startswith("aten.rrelu"):
            node.args = (*node.args[:3], False)
        elif name.endswith((".input", ".data")) and "dropout" in (given := bind(node)):  # recurrent layers
            node.args, node.kwargs = tuple((given | {"dropout": 0.0}).values()), {}
        elif isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            stubborn = name
    for module in modules:
        module.recompile()
    return stubborn


def is_random(graph: fx.GraphModule) -> bool:
    """Whether two runs of a graph on the same inputs may differ."""
    for node in [node for module in graphs_of(graph) for node in module.graph.nodes]:
        random = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        if random or op_name(node.target).startswith("aten.rrelu"):
            args = bind(node)
            share = args.get("p", args.get("dropout_p", args.get("dropout")))
            if not (share == 0 or False in (args.get("train"), args.get("training"))):
                return True
    return False


def _upcast(value: Any) -> Any:
    return _EXACT.get(value, value) if isinstance(value, torch.dtype) else value


def _exact(tensor: Tensor) -> Tensor:
    """In double precision, if it is not integer."""
    return tensor.to(_EXACT.get(tensor.dtype, tensor.dtype))


def _copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph, and of those inside it, over the same tensors."""
    copied = fx.GraphModule(module, copy_graph(module.graph)[0])
    for name, inner in list(copied.named_children()):
        if isinstance(inner, fx.GraphModule):
            copied.add_module(name, _copy_graph(inner))
    copied.meta.update(module.meta)
    return copied


@dataclass
class _Pair:
    """The capture and the wide graph of one mode, made deterministic and float64."""

    mode: str
    source: fx.GraphModule
    wide: fx.GraphModule
    stubborn: str | None


def check_expansion(
    plan: Plan, captures: Mapping[str, fx.GraphModule], graphs: Mapping[str, fx.GraphModule], draft: Draft
) -> float:
    """Compare the wide graphs with the captures, and the captures with the module.

    Returns:
        The largest relative error found.

    Raises:
        VerificationError: an error beyond the tolerance; names the mode and the first node that differs.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mode in captures:
            pair = _Pair(mode, _copy_graph(captures[mode]), _copy_graph(graphs[mode]), None)
            pair.stubborn = deterministic(pair.source)
            deterministic(pair.wide)
            if pair.stubborn is not None:
                continue  # nothing to compare: the op draws anew at each call
            inputs = _inputs(pair.source, _tensors(captures[mode], None), draft, generator)
            for perturb in (False, True) if mode == "eval" else (True,):
                tensors = _tensors(captures[mode], generator if perturb else None)
                worst = max(worst, _compare(plan, pair, tensors, inputs))
        return max(worst, _check_capture(captures["eval"], draft, generator))


def _inputs(
    capture: fx.GraphModule, tensors: Mapping[str, Tensor], draft: Draft, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random inputs in float64, with another batch than the example's where the capture left it open."""
    example = (draft.study.args, draft.study.kwargs)
    inputs = random_like(example, generator, torch.float64, _other_batches(capture, example))
    try:
        _run(capture, tensors, inputs)
    except Exception:  # noqa: BLE001  a batch that the model refuses, such as one that it cannot halve
        return random_like(example, generator, torch.float64)
    return inputs


def _other_batches(capture: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[int, int]:
    """For each tensor of the example, by id, an unlike leading size, where the capture left it open."""
    found: dict[int, int] = {}
    taken = {leaf.shape[0] for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()}
    size = 4 if 3 in taken else 3
    for node, leaf in zip(capture.graph.find_nodes(op="placeholder"), flat_inputs(capture, *example), strict=True):
        value = node.meta.get("val")
        if isinstance(leaf, Tensor) and isinstance(value, Tensor) and leaf.dim():
            expr: Any = getattr(getattr(value.shape[0], "node", None), "expr", None)
            if expr is not None and expr.free_symbols:
                found[id(leaf)] = int(expr.xreplace(dict.fromkeys(expr.free_symbols, size)))
    return found


def _tensors(capture: fx.GraphModule, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Every tensor that a capture reads, in float64, perturbed if a generator is given."""
    found: dict[str, Tensor] = {}
    same: dict[int, Tensor] = {}
    for node in capture.graph.find_nodes(op="get_attr"):
        value = fetch(capture, str(node.target))
        if isinstance(value, Tensor):
            if id(value) not in same:
                plain = _exact(value.detach())
                same[id(value)] = plain.clone() if generator is None else _perturb(value, generator)
            found[str(node.target)] = same[id(value)]
    return found


def _widened(plan: Plan, key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the wide graph for given tensors of the capture."""
    out: dict[str, Tensor] = {}
    for target, tensor in tensors.items():
        name = plan.analysis.canonical.get(target) or f"{key}:{target}"
        out[target] = plan.tensors[name].scale(plan.tensors[name].widen(tensor))
    return out


def _run(module: nn.Module, tensors: Mapping[str, Tensor], inputs: Any) -> Any:
    fresh = {name: tensor.clone() for name, tensor in tensors.items()}  # running statistics change in place
    constants = _constants(module, fresh)
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    return torch.func.functional_call(module, constants | fresh, args, kwargs, tie_weights=False)


def _constants(module: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that are not given, in double precision, as they were before they were rounded."""
    before: dict[str, Tensor] = getattr(module, "meta", {}).get(EXACT, {})
    rest = {name: buffer for name, buffer in module.named_buffers() if name not in given}
    return {n: before[n].to(buffer.device) if n in before else _exact(buffer) for n, buffer in rest.items()}


def _compare(plan: Plan, pair: _Pair, tensors: Mapping[str, Tensor], inputs: Any) -> float:
    expected = _run(pair.source, tensors, inputs)
    wide = _widened(plan, pair.mode, tensors)
    try:
        actual = _run(pair.wide, wide, inputs)
    except Exception as failure:
        where = first_difference(plan, pair.mode, pair.source, pair.wide, tensors, wide, inputs)
        raise VerificationError(
            f"in {pair.mode} mode the expanded graph does not run ({type(failure).__name__}: {failure}). {where} "
            f"{_ADVICE}"
        ) from failure
    error = relative_error(expected, actual)
    if error <= TOLERANCE:
        return error
    nudged = pytree.tree_map_only(Tensor, lambda t: t * (1 + 2.0**-52) if t.is_floating_point() else t, inputs)
    conditioning = relative_error(expected, _run(pair.source, tensors, nudged))
    if error <= _CONDITIONING * conditioning:
        return error
    where = first_difference(plan, pair.mode, pair.source, pair.wide, tensors, wide, inputs)
    raise VerificationError(
        f"in {pair.mode} mode the expanded graph differs from the model by {error:.1e} of its output (one unit in the "
        f"last place of the input: {conditioning:.1e}). {where} {_ADVICE}"
    )


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of each node's result, as it is when the node has run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.results: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.results[n.name] = pytree.tree_map_only(Tensor, torch.clone, result)
        return result


def _record(module: fx.GraphModule, tensors: Mapping[str, Tensor], inputs: Any) -> dict[str, Any]:
    bound = copy.deepcopy(module)
    for name, tensor in tensors.items():
        put_tensor(bound, name, tensor.clone())
    for name, buffer in _constants(module, tensors).items():
        put_tensor(bound, name, buffer)
    recorder = _Recorder(bound)
    flat = flat_inputs(module, *inputs)
    with contextlib.suppress(Exception):  # what ran before the node that failed is what counts
        recorder.run(*pytree.tree_map_only(Tensor, torch.clone, flat), enable_io_processing=False)
    return recorder.results


def first_difference(
    plan: Plan,
    key: str,
    source: fx.GraphModule,
    wide: fx.GraphModule,
    tensors: Mapping[str, Tensor],
    wide_tensors: Mapping[str, Tensor],
    inputs: Any,
) -> str:
    """The first node whose wide result is not the copies of the model's result, in words."""
    expected, actual = _record(source, tensors, inputs), _record(wide, wide_tensors, inputs)
    facts = plan.analysis.graphs[key]
    last = {name: _final(wide, name, expected) for name in expected}
    for node in facts.module.graph.nodes:
        value = facts.values.get(node)
        if last[node.name] not in actual:
            return f"The first node that fails is {node.name!r} ({op_name(node.target)})."
        if node.op != "call_function" or not isinstance(value, list) or not isinstance(expected[node.name], Tensor):
            continue
        wanted, found = _copies(plan, expected[node.name], value), actual[last[node.name]]
        error = relative_error(wanted, found)
        if error > TOLERANCE:
            shapes = f"{list(expected[node.name].shape)} -> {list(found.shape)}"
            return f"The first node that differs is {node.name!r} ({op_name(node.target)}, {shapes}), by {error:.1e}."
    return "No single node differs."


def _copies(plan: Plan, tensor: Tensor, axes: Sequence[Expr]) -> Tensor:
    for dim, axis in enumerate(axes):
        if plan.widening.widens(axis):
            tensor = tensor.index_select(dim, plan.widening.gather(axis).to(tensor.device))
    return tensor


def _final(wide: fx.GraphModule, name: str, names: Mapping[str, Any]) -> str:
    """The node that stands for the model's node of that name, of those `names`: behind what widening put after it."""
    node = next(n for n in wide.graph.nodes if n.name == name)
    users = list(node.users)
    if len(users) == 1 and users[0].target in (aten.mul.Tensor, aten.add.Tensor) and users[0].name not in names:
        return name if isinstance(users[0].args[1], fx.Node) else users[0].name  # alpha belongs to the user's operand
    return name


def _check_capture(capture: fx.GraphModule, draft: Draft, generator: torch.Generator) -> float:
    """The module itself against its capture, in eval mode."""
    module = copy.deepcopy(draft.study.skeleton, {id(p): p for p in draft.study.model.parameters()}).eval()
    graph = _copy_graph(capture)
    if is_random(capture):
        return 0.0
    deterministic(graph)
    model = draft.study.model
    named = [*model.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    tensors = {name: _exact(t.detach()) for name, t in named}
    used = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    read = {name: t for name, t in tensors.items() if name in used}
    inputs = _inputs(graph, read, draft, generator)
    try:
        expected = _run(module, tensors, inputs)
    except Exception:  # noqa: BLE001  it casts to float32 by itself; the finished teacher is compared in its own dtype
        return 0.0
    error = relative_error(expected, _run(graph, read, inputs))
    if error > _CAST_TOLERANCE:
        raise VerificationError(
            f"torch.export's capture of {type(model).__name__} differs from the module by {error:.1e} of its "
            "output in eval mode; the module does something that capture cannot see (state outside parameters and "
            "buffers, or Python branches on values)"
        )
    return error if error <= TOLERANCE else 0.0


def check_teacher(teacher: DynamicTeacher, model: nn.Module) -> None:
    """The finished teacher against the module: its tensors to the last bit, its outputs to the rounding of their dtype.

    Raises:
        VerificationError: either differs.
    """
    student = dict(model.named_parameters())
    wide, narrow = teacher.composition()
    for plan in teacher.composition.plans:
        tensor = student[plan.name].detach()
        if not torch.equal(narrow[plan.name], tensor) or not torch.equal(
            wide[plan.name], plan.scale(plan.widen(tensor))
        ):
            raise VerificationError(
                f"the composed tensors of {plan.name!r} differ from the model's; please report this"
            )
    parameter = next(iter(student.values()), None)
    if parameter is None or not parameter.is_floating_point():
        return
    generator = torch.Generator().manual_seed(0)
    inputs = pytree.tree_map_only(
        Tensor,
        lambda t: t.to(parameter.dtype) if t.is_floating_point() else t,
        random_like(teacher.example, generator, torch.float64),
    )
    source = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    was_training = teacher.training
    teacher.eval()
    with torch.no_grad():
        expected = source(*inputs[0], **inputs[1])
        outputs = teacher.both(*inputs[0], **inputs[1])
    teacher.train(was_training)
    graph = teacher.graphs["eval_mode"]
    assert isinstance(graph, fx.GraphModule)
    if is_random(graph):
        return
    limit = max(_ROUNDINGS * torch.finfo(parameter.dtype).eps, TOLERANCE)
    for role, output in zip(("teacher", "student"), outputs, strict=True):
        error = relative_error(expected, output)
        if error > limit:
            raise VerificationError(
                f"the finished dynamic teacher's {role} differs from {type(model).__name__} by {error:.1e} of its "
                f"output in eval mode, more than rounding in {parameter.dtype} explains ({limit:.1e}). Either the "
                "model keeps state that is neither parameter nor buffer, or this is a fault of gpd_fx; please report it"
            )


def verify(
    model: nn.Module,
    teacher: DynamicTeacher,
    example_inputs: Sequence[Any] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Compare a teacher with a model on random inputs, in eval mode.

    Args:
        model: the module that the teacher was made from (or, after training, the folded student is no such thing: the
            networks have parted by then).
        teacher: the dynamic teacher.
        example_inputs: positional inputs whose shapes and ranges count; by default those of the expansion.
        dtype: floating dtype of the comparison; both are copied, not changed.

    Returns:
        max |difference| / max |output| of the teacher against the model.
    """
    args, kwargs = teacher.example if example_inputs is None else (tuple(example_inputs), {})
    inputs = random_like((args, kwargs), torch.Generator().manual_seed(0), dtype)
    source = copy.deepcopy(model).to(dtype).eval()
    wide = copy.deepcopy(teacher).to(dtype).eval()
    graph = wide.graphs["eval_mode"]
    if dtype == torch.float64:
        assert isinstance(graph, fx.GraphModule)
        deterministic(graph)
    with torch.no_grad():
        return relative_error(source(*inputs[0], **inputs[1]), wide(*inputs[0], **inputs[1]))
