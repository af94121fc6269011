"""Verification: a transformed network against its source, on random inputs.

`check_expansion` is what `expand` runs. It compares graph with graph, for both modes: the capture with the model's
tensors, and the wide graph with the same tensors widened. Randomness is switched off in both (dropout, stochastic
depth), every float becomes a float64, and the batch differs from the example's. Tensors are also perturbed, so that an
untouched batch norm or a zero layer scale hides nothing. Then the capture is compared with the module itself.

An error is measured as max |difference| / max |output|. Beyond the tolerance it is held against the conditioning of the
model: what a change of its input by one unit in the last place does.

Where both networks would take too many bytes in float64 (`gpd_fx.numerics.precision.LARGE`), the graphs are compared in
float32. What rounding may do is then the model's own rounding error, which its float64 result tells: the wide graph
may be `_ROOM` times as far from that as the model itself is. No more than the tensors of both networks are held at a
time.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpd_fx.capture.capture import shallow_copy
from gpd_fx.errors import VerificationError
from gpd_fx.fxtools.module_calls import detached_copies, unchanged
from gpd_fx.fxtools.torch_internals import (
    OpOverload,
    copy_graph,
    flat_inputs,
    schema,
)
from gpd_fx.numerics.comparison import CONDITIONING, nudged, random_like
from gpd_fx.numerics.comparison import relative_error as relative_error
from gpd_fx.numerics.precision import (
    DOUBLE,
    SINGLE,
    Precision,
    deterministic,
    precision_for,
)
from gpd_fx.numerics.precision import is_random as is_random
from gpd_fx.passes.widen import EXACT
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.plan.plan import Plan
from gpd_fx.verify.first_difference import first_difference
from gpd_fx.verify.sample_tensors import Source

if TYPE_CHECKING:
    from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
    from gpd_fx.teacher.study import Draft

TOLERANCE = 1e-9
_ROOM = 30.0  # in float32, times the model's own rounding error: wide sums are longer, and ordered otherwise
_FEW = 32.0  # units of rounding that are always allowed in float32
_ROUNDINGS = 1e5  # how many units of rounding a deep network may gather in its own dtype
_CAST_TOLERANCE = 1e-4  # module against capture: a module may cast to float32 by itself
_ADVICE = (
    "Nothing is returned; please report this model. Meanwhile exclude=[...] with the parameters around that node keeps "
    "them as they are"
)


def elements(plan: Plan) -> int:
    """How many parameters both networks have, branches apart."""
    parameters = plan.analysis.parameters
    return sum(p.numel() for p in parameters.values()) + sum(plan.tensors[name].wide_numel for name in parameters)


def _copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph, and of those inside it, over the same tensors."""
    copied = fx.GraphModule(module, copy_graph(module.graph)[0])
    for name, inner in list(copied.named_children()):
        if isinstance(inner, fx.GraphModule):
            copied.add_module(name, _copy_graph(inner))
    copied.meta.update(module.meta)
    return copied


def _prepared(module: fx.GraphModule, precision: Precision) -> tuple[fx.GraphModule, str | None]:
    """A deterministic copy in some precision, and the op that stays random."""
    copied = _copy_graph(module)
    return copied, deterministic(copied, precision)


def check_expansion(
    plan: Plan,
    captures: Mapping[str, fx.GraphModule],
    graphs: Mapping[str, fx.GraphModule],
    draft: Draft,
    precision: Precision | None = None,
) -> float:
    """Compare the wide graphs with the captures, and the captures with the module.

    Returns:
        The largest relative error found.

    Raises:
        VerificationError: an error beyond the tolerance; names the mode and the first node that differs.
    """
    worst = 0.0
    precision = precision or precision_for(elements(plan))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mode in captures:
            plain, stubborn = _prepared(captures[mode], precision)
            if stubborn is not None:
                continue  # nothing to compare: the op draws anew at each call
            inputs = _inputs(plain, Source(captures[mode], None).tensors(precision), draft, generator, precision)
            for seed in (None, 1) if mode == "eval" and precision is DOUBLE else (1,):
                check = _Check(plan, mode, captures[mode], graphs[mode], Source(captures[mode], seed), inputs)
                worst = max(worst, check.double() if precision is DOUBLE else check.single())
        return max(worst, _check_capture(captures["eval"], draft, generator, precision))


def _inputs(
    capture: fx.GraphModule,
    tensors: Mapping[str, Tensor],
    draft: Draft,
    generator: torch.Generator,
    precision: Precision,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random inputs, with another batch than the example's where the capture left it open."""
    example = (draft.study.args, draft.study.kwargs)
    inputs = random_like(example, generator, precision.real, _other_batches(capture, example))
    try:
        _run(capture, tensors, inputs, precision)
    except Exception:  # noqa: BLE001  a batch that the model refuses, such as one that it cannot halve
        return random_like(example, generator, precision.real)
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


def _run(module: nn.Module, tensors: Mapping[str, Tensor], inputs: Any, precision: Precision) -> Any:
    """Call a module with these tensors, which stay as they are, and its constants in the given precision."""
    kept = _written(module) if isinstance(module, fx.GraphModule) else None
    fresh = {name: tensor.clone() if kept is None or name in kept else tensor for name, tensor in tensors.items()}
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    constants = _constants(module, fresh, precision)
    return torch.func.functional_call(module, constants | fresh, args, kwargs, tie_weights=False)


def _written(module: fx.GraphModule) -> set[str]:
    """The attributes that a graph may write to: running statistics, and whatever an in-place op goes back to."""
    found: set[str] = set()
    for node in module.graph.nodes:
        if isinstance(node.target, OpOverload) and (schema(node.target).is_mutable or _tracks(node.target)):
            todo: list[fx.Node] = list(node.all_input_nodes)
            while todo:
                operand = todo.pop()
                if operand.op == "get_attr":
                    found.add(str(operand.target))
                elif operand.op == "call_function" and operand.args and isinstance(operand.args[0], fx.Node):
                    todo.append(operand.args[0])
    return found


def _tracks(op: OpOverload) -> bool:
    """Whether an op updates running statistics, though its schema does not say so."""
    return any(name in str(op) for name in ("batch_norm", "instance_norm"))


def _constants(module: nn.Module, given: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """The buffers that are not given, as they were before they were rounded."""
    before: dict[str, Tensor] = getattr(module, "meta", {}).get(EXACT, {})
    rest = {name: buffer for name, buffer in module.named_buffers() if name not in given}
    return {name: precision.exact(before.get(name, buffer).to(buffer.device)) for name, buffer in rest.items()}


@dataclass(frozen=True)
class _Check:
    """The capture and the wide graph of one mode, with the tensors and inputs to compare them on."""

    plan: Plan
    mode: str
    capture: fx.GraphModule
    graph: fx.GraphModule
    source: Source
    inputs: Any

    def double(self) -> float:
        """Compare in float64; returns the relative error."""
        expected = self._plain(DOUBLE, self.inputs)
        error = relative_error(expected, self._wide(DOUBLE))
        if error <= TOLERANCE:
            return error
        conditioning = relative_error(expected, self._plain(DOUBLE, nudged(self.inputs, DOUBLE.real)))
        if error <= CONDITIONING * conditioning:
            return error
        raise self._differs(DOUBLE, error, f"one unit in the last place of the input: {conditioning:.1e}")

    def single(self) -> float:
        """Compare in float32, both with the capture's result in float64; returns the wide graph's relative error."""
        exact = self._plain(DOUBLE, pytree.tree_map_only(Tensor, DOUBLE.exact, self.inputs))
        own = relative_error(exact, self._plain(SINGLE, self.inputs))
        own = max(own, relative_error(exact, self._plain(SINGLE, nudged(self.inputs, SINGLE.real))))
        error = relative_error(exact, self._wide(SINGLE))
        if error <= max(_ROOM * own, _FEW * SINGLE.unit):
            return error
        raise self._differs(SINGLE, error, f"checked in float32, where the model's own rounding error is {own:.1e}")

    def _plain(self, precision: Precision, inputs: Any) -> Any:
        return _run(_prepared(self.capture, precision)[0], self.source.tensors(precision), inputs, precision)

    def _wide(self, precision: Precision) -> Any:
        graph = _prepared(self.graph, precision)[0]
        try:
            return _run(graph, self.source.widened(self.plan, self.mode, precision), self.inputs, precision)
        except Exception as failure:
            raise VerificationError(
                f"in {self.mode} mode the expanded graph does not run ({type(failure).__name__}: {failure}). "
                f"{self._where(precision)} {_ADVICE}"
            ) from failure

    def _differs(self, precision: Precision, error: float, context: str) -> VerificationError:
        return VerificationError(
            f"in {self.mode} mode the expanded graph differs from the model by {error:.1e} of its output ({context}). "
            f"{self._where(precision)} {_ADVICE}"
        )

    def _where(self, precision: Precision) -> str:
        plain, wide = (_prepared(graph, precision)[0] for graph in (self.capture, self.graph))
        tensors = self.source.tensors(precision)
        copies = self.source.widened(self.plan, self.mode, precision)
        tensors |= _constants(plain, tensors, precision)
        copies |= _constants(wide, copies, precision)
        tolerance = TOLERANCE if precision is DOUBLE else 1e-4
        return first_difference(self.plan, self.mode, plain, wide, tensors, copies, self.inputs, tolerance)


def _check_capture(capture: fx.GraphModule, draft: Draft, generator: torch.Generator, precision: Precision) -> float:
    """The module itself against its capture, in eval mode."""
    model = draft.study.model
    module = shallow_copy(draft.study.skeleton).eval()
    if is_random(capture):
        return 0.0
    graph, _ = _prepared(capture, precision)
    named = [*model.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    tensors = {name: precision.exact(t.detach()) for name, t in named}
    used = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    read = {name: t for name, t in tensors.items() if name in used}
    inputs = _inputs(graph, read, draft, generator, precision)
    try:
        _run(module, tensors, inputs, precision)  # the second call shows what the first one left behind
        expected = _run(module, tensors, inputs, precision)
    except Exception:  # noqa: BLE001  it casts to float32 by itself; the finished teacher is compared in its own dtype
        return 0.0
    error = relative_error(expected, _run(graph, read, inputs, precision))
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
    for plan, wide, narrow in teacher.composition.one_by_one():
        tensor = student[plan.name].detach()
        same = torch.equal(wide, tensor) if not plan.shape else wide.shape == plan.wide_shape
        same = same and all(torch.equal(wide[r], plan.scaled_rows(tensor, r)) for r in plan.blocks())
        if not same or not torch.equal(narrow, tensor):
            raise VerificationError(
                f"the composed tensors of {plan.name!r} differ from the model's; please report this"
            )
    parameter = next(iter(student.values()), None)
    graph = teacher.graphs["eval_mode"]
    assert isinstance(graph, fx.GraphModule)
    if parameter is None or not parameter.is_floating_point() or is_random(graph):
        return
    generator = torch.Generator().manual_seed(0)
    args, kwargs = random_like(teacher.example, generator, parameter.dtype)
    source = shallow_copy(model).eval()
    was_training = teacher.training
    teacher.eval()
    with torch.no_grad(), unchanged(teacher.skeleton):
        source(*args, **kwargs)
        expected = source(*args, **kwargs)  # the second call shows what the first one left behind
        outputs = {"student": teacher.run_student(student, *args, **kwargs)}
        with _scaled(teacher, student) as tensors:
            outputs["teacher"] = teacher.run_teacher(tensors, *args, **kwargs)
    teacher.train(was_training)
    coarsest = max([parameter.dtype, *_float_dtypes(graph)], key=lambda dtype: torch.finfo(dtype).eps)
    limit = max(_ROUNDINGS * torch.finfo(coarsest).eps, TOLERANCE)
    for role, output in outputs.items():
        error = relative_error(expected, output)
        if error > limit:
            raise VerificationError(
                f"the finished dynamic teacher's {role} differs from {type(model).__name__} by {error:.1e} of its "
                f"output in eval mode, more than rounding in {coarsest} explains ({limit:.1e}). Either the "
                "model keeps state that is neither parameter nor buffer, or this is a fault of gpd_fx; please report it"
            )


@contextmanager
def _scaled(teacher: DynamicTeacher, student: Mapping[str, Tensor]) -> Generator[dict[str, Tensor]]:
    """The tensors of the wide graph while all branches are zero, without memory of their own.

    Meanwhile the parameters hold alpha times what they are; afterwards they get their values back from the student's.
    """
    weights: dict[str, tuple[ParamPlan, Tensor]] = {
        plan.name: (plan, weight.detach()) for plan, weight in teacher.composition.wide_parameters()
    }
    try:
        for plan, weight in weights.values():
            plan.scale_(weight)
        yield {name: weight for name, (_, weight) in weights.items()}
    finally:
        for name, (plan, weight) in weights.items():
            for rows in plan.blocks() if plan.scales else ():
                weight[rows] = plan.rows(student[name].detach(), rows)


def _float_dtypes(graph: fx.GraphModule) -> set[torch.dtype]:
    """The dtypes that a graph computes in: parts of a float64 model may cast to float32."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    return {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}


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
    source = copy.deepcopy(model, detached_copies(model)).to(dtype).eval()
    wide = copy.deepcopy(teacher).to(dtype).eval()
    graph = wide.graphs["eval_mode"]
    if dtype == torch.float64:
        assert isinstance(graph, fx.GraphModule)
        deterministic(graph)
    with torch.no_grad():
        return relative_error(source(*inputs[0], **inputs[1]), wide(*inputs[0], **inputs[1]))
