"""Laws of expand and fold: what must hold of any model, checked on one."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import gpd_fx
from gpd_fx.plan.analysis import Analysis
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.teacher import study
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.verify.verification import relative_error
from tests.graph_check import TOLERANCE, nudge, open_batch
from tests.graphs import Program, RandomNet, example


@contextmanager
def watched() -> Generator[list[Analysis]]:
    """The analyses made inside."""
    made: list[Analysis] = []

    def analyse(*args: Any, **kwargs: Any) -> Analysis:
        made.append(original(*args, **kwargs))
        return made[-1]

    original = study.analyse
    with mock.patch.object(study, "analyse", analyse):
        yield made


@contextmanager
def quiet() -> Generator[None]:
    """Without the warnings that such models give rise to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gpd_fx.GPDWarning)  # nothing widens
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        yield


def close(expected: Any, actual: Any, nudged: Callable[[], Any], what: str) -> None:
    """Within the tolerance, or within what one unit in the last place of the inputs does to the model."""
    error = relative_error(expected, actual)
    if error > TOLERANCE:
        conditioning = relative_error(expected, nudged())
        assert error <= 100 * conditioning, f"{what}: {error:.1e}, one unit in the last place makes {conditioning:.1e}"


def total(output: Any) -> Tensor:
    """A scalar that depends on every element of an output in its own way."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return torch.stack(
        [(leaf * torch.arange(1.0, leaf.numel() + 1).sin().view_as(leaf)).sum() for leaf in leaves]
    ).sum()


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """By parameter; zeros where there is none."""
    model.zero_grad()
    total(model(*inputs)).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def summed(plan: ParamPlan, grad: Tensor) -> Tensor:
    """The gradient of all copies of each element together."""
    for dim, index in enumerate(plan.gather):
        if index is not None:
            shape = [n if d != dim else plan.shape[dim] for d, n in enumerate(grad.shape)]
            grad = torch.zeros(shape, dtype=grad.dtype).index_add_(dim, index, grad)
    return grad


def same_state(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def _takes_one(model: nn.Module, program: Program) -> bool:
    """Whether a model takes a batch of one; torch refuses statistics over one value, for instance."""
    try:
        copy.deepcopy(model).eval()(*example(program, 1, 1))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def check_outputs(model: nn.Module, teacher: DynamicTeacher, program: Program) -> None:
    """Teacher, student and model agree in both modes on other batches; the student's statistics are the model's."""
    model, teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    for training, batch in ((False, 5), (True, 4), *([(False, 1)] if _takes_one(model, program) else [])):
        model.train(training)
        teacher.train(training)
        inputs, rough = example(program, batch, batch), copy.deepcopy(model)
        with torch.no_grad():
            expected = model(*inputs)
            for role, output in zip(("teacher", "student"), teacher.both(*inputs), strict=True):
                assert pytree.tree_structure(expected) == pytree.tree_structure(output)
                what = f"the {role} in {'train' if training else 'eval'} mode, on a batch of {batch}"
                close(expected, output, partial(copy.deepcopy(rough), *nudge(inputs)), what)
    narrow = dict(teacher.skeleton.named_buffers())
    for name, buffer in model.named_buffers():
        assert relative_error(buffer, narrow[name]) <= TOLERANCE, name


def check_gradients(model: nn.Module, teacher: DynamicTeacher, program: Program) -> None:
    """The student's gradient lies in its slice; the copies' gradients of the teacher sum to the model's."""
    model, teacher = copy.deepcopy(model).eval(), copy.deepcopy(teacher).eval()
    inputs = example(program, 3, 2)
    expected = gradients(model, inputs)
    plans = {plan.name: plan for plan in teacher.composition.plans}
    found: dict[str, dict[str, Tensor]] = {}
    for role in ("student", "teacher"):
        teacher.zero_grad()
        total(teacher(*inputs, role=role)).backward()
        grads = {n: p.grad for n, p in teacher.composition.weights.named_parameters()}
        found[role] = {n: torch.zeros(plans[n].wide_shape) if g is None else g for n, g in grads.items()}
    scale = max((g.abs().max().item() for g in expected.values()), default=0.0)
    flat = torch.cat([g.flatten() for g in expected.values()])
    if not math.isfinite(scale) or scale == 0:
        return
    narrow = torch.cat([plans[n].student(found["student"][n]).flatten() for n in expected])
    assert relative_error(flat, narrow) <= TOLERANCE
    outside = sum(found["student"][n].abs().sum() - plans[n].student(found["student"][n]).abs().sum() for n in expected)
    assert abs(float(outside)) <= TOLERANCE * scale
    wide = torch.cat([summed(plans[n], found["teacher"][n]).flatten() for n in expected])

    def nudged() -> Tensor:
        return torch.cat([g.flatten() for g in gradients(model, nudge(inputs)).values()])

    close(flat, wide, nudged, "the gradient of the teacher")


def check_step(program: Program, teacher: DynamicTeacher) -> DynamicTeacher:
    """After a step with both losses the folded student is the teacher's student, and loads into a fresh model."""
    teacher = copy.deepcopy(teacher).train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05)
    wide, narrow = teacher.both(*example(program, 4, 3))
    (total(wide) + total(narrow)).backward()
    norm = torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
    if torch.isfinite(norm):
        optimizer.step()
    teacher.eval()
    student = gpd_fx.fold(teacher)
    fresh = RandomNet(program).eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
        fresh.load_state_dict(student.state_dict(), strict=True)
        inputs = example(program, 3, 4)
        expected = teacher.student(*inputs)
        assert relative_error(expected, student(*inputs)) <= TOLERANCE
        assert relative_error(expected, fresh(*inputs)) <= TOLERANCE
    return teacher


def check_growth(program: Program, teacher: DynamicTeacher, ratio: float) -> None:
    """A wider teacher computes what a trained one does, in both modes and for the same student."""
    grown = gpd_fx.grow(teacher, ratio)
    same_state(gpd_fx.fold(teacher).state_dict(), gpd_fx.fold(grown).state_dict())
    for training, batch in ((False, 5), (True, 4)):
        inputs = example(program, batch, batch)
        twin, rough, wide = (copy.deepcopy(each).train(training) for each in (teacher, teacher, grown))
        with torch.no_grad():
            what = f"the grown teacher in {'train' if training else 'eval'} mode"
            close(twin(*inputs), wide(*inputs), partial(rough, *nudge(inputs)), what)


def check_copies(teacher: DynamicTeacher, program: Program) -> None:
    """A deep copy is as good, and a cast works."""
    inputs = example(program, 2, 5)
    twin = copy.deepcopy(teacher).eval()
    with torch.no_grad():
        assert relative_error(teacher.eval()(*inputs), twin(*inputs)) == 0
        single = twin.to(torch.float32)
        cast = tuple(x.float() if x.is_floating_point() else x for x in inputs)
        for out in single.both(*cast):
            leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
            assert all(leaf.dtype == torch.float32 for leaf in leaves)
    assert next(teacher.parameters()).dtype == torch.float64


def expand(program: Program, ratio: float) -> tuple[RandomNet, DynamicTeacher]:
    model = RandomNet(program)
    with watched() as analyses:
        teacher = gpd_fx.expand(model, ratio, example(program, 2, 0))
    (analysis,) = analyses
    faults = [fault for fault in analysis.faults if "'int' and 'Node'" not in fault.text]  # groups are the batch's size
    assert not faults
    return model, teacher


def check_laws(program: Program, ratio: float) -> None:
    """All of them: outputs, gradients, a training step, folding, copies and casts."""
    with quiet():
        model, teacher = expand(program, ratio)
        same_state(model.state_dict(), gpd_fx.fold(teacher).state_dict())
        if not all(open_batch(graph) for graph in teacher.graphs.values() if isinstance(graph, fx.GraphModule)):
            return  # what follows takes other batches
        check_outputs(model, teacher, program)
        check_gradients(model, teacher, program)
        check_step(program, teacher)
        check_copies(teacher, program)
