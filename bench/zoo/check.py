"""Check one model the hard way: everything random, float64, both modes, uneven ratios, a training step, fold, ONNX."""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import gpd_fx
from bench.zoo.exact import Exact
from gpd_fx.api.expansion import make_teacher
from gpd_fx.capture.capture import shallow_copy
from gpd_fx.fxtools.attributes import fetch, graphs_of
from gpd_fx.fxtools.fake_tensors import fake_call
from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.fxtools.torch_internals import put_tensor
from gpd_fx.plan.analysis import analyse
from gpd_fx.plan.plan import Plan
from gpd_fx.teacher.study import (
    Study,
    make_draft,
    make_report,
    study_model,
)
from gpd_fx.verify.verification import is_random, relative_error


@dataclass
class Record:
    """What was found for one model. Errors are max |difference| / max |output|, keyed by ratio; `peak` is in bytes."""

    name: str
    parameters: int = 0
    coverage: float = 0.0
    factor: float = 0.0
    eval_error: dict[str, float] = field(default_factory=dict[str, float])
    train_error: dict[str, float] = field(default_factory=dict[str, float])
    eval_conditioning: float = 0.0
    train_conditioning: float = 0.0
    fold_error: float | None = None
    onnx_error: float | None = None
    capture_seconds: float = 0.0
    analysis_seconds: float = 0.0
    rewrite_seconds: float = 0.0
    build_seconds: float = 0.0
    nodes: int = 0
    ops: dict[str, int] = field(default_factory=dict[str, int])
    frozen: list[tuple[str, str, int]] = field(default_factory=list[tuple[str, str, int]])
    faults: list[str] = field(default_factory=list[str])
    note: str = ""
    error: str = ""
    seconds: float = 0.0
    peak: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"exact": self.exact}

    def allowed(self, mode: str) -> float:
        """The largest error that counts as rounding: 1e-9, or 100 times what one unit in the last place does."""
        return max(1e-9, 100 * (self.train_conditioning if mode == "train" else self.eval_conditioning))

    @property
    def exact(self) -> bool:
        """Whether no error found is larger than rounding."""
        evals = all(error <= self.allowed("eval") for error in self.eval_error.values())
        trains = all(error <= self.allowed("train") for error in self.train_error.values())
        folds = (self.fold_error or 0.0) <= self.allowed("eval") and (self.onnx_error or 0.0) <= 1e-4
        return evals and trains and folds and not self.faults and not self.error


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every floating parameter and buffer random values of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.ndim > 1:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module


def switch_off_randomness(module: nn.Module) -> nn.Module:
    """Set dropout and stochastic depth to zero, so that train mode is deterministic."""
    for part in module.modules():
        for attribute, value in list(vars(part).items()):
            if isinstance(value, float) and (attribute == "p" or "drop" in attribute):
                setattr(part, attribute, 0.0)
    return module


def check(
    name: str,
    build: Callable[[], nn.Module],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    ratios: Sequence[float] = (2.0, 3.0, 1.5),
    step: bool = True,
    onnx: bool = True,
) -> Record:
    """Expand a model at every ratio with the default branches and compare everything that can be compared.

    Coverage, costs, the step and ONNX are those of the first ratio. `inputs` are example (args, kwargs) in float64 with
    a batch of 2; comparisons are made on a batch of 3.
    """
    torch.manual_seed(0)
    model = switch_off_randomness(randomise(build().double()))
    record = Record(name, parameters=sum(p.numel() for p in model.parameters()))
    study = _study(record, model, *inputs)
    batch = pytree.tree_map_only(Tensor, _three, inputs)
    expected = {"eval": _call(model, batch, "eval")}
    record.eval_conditioning = relative_error(expected["eval"], _call(model, _nudged(batch), "eval"))
    if is_random(study.captures["train"]):
        record.note = "train mode stays random"
    else:
        expected["train"] = _call(model, batch, "train")
        record.train_conditioning = relative_error(expected["train"], _call(model, _nudged(batch), "train"))
    for ratio in ratios:
        draft = make_draft(study, ratio)
        draft = replace(draft, study=replace(study, skeleton=shallow_copy(study.skeleton)))
        started = time.process_time()
        teacher = make_teacher(draft, verify=False)
        if ratio == ratios[0]:
            record.build_seconds = time.process_time() - started
        for mode, errors in (("eval", record.eval_error), ("train", record.train_error)):
            if mode in expected:
                errors[str(ratio)] = _both_error(teacher, batch, mode, expected[mode])
        if ratio == ratios[0] and step:
            record.fold_error, student = _step_and_fold(teacher, build, batch)
            if onnx:
                record.onnx_error = _onnx(student, *inputs)
        del teacher, draft
        gc.collect()  # graphs hold cycles, and two wide teachers may not fit
    return record


def check_shapes(
    name: str,
    build: Callable[[], nn.Module],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    ratios: Sequence[float] = (2.0, 3.0, 1.5),
) -> Record:
    """What can be checked of a model too large for memory, built on the meta device: that wide graphs run, by shape."""
    model = build().to("meta").double()  # some cannot be built there
    record = Record(name, parameters=sum(p.numel() for p in model.parameters()), note="on the meta device: shapes only")
    inputs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)
    study = _study(record, model, *inputs)
    for ratio in ratios:
        draft = make_draft(study, ratio)
        for mode, graph in draft.graphs.items():
            with torch.no_grad():
                capture = study.captures[mode]
                pair = capture, _filled(draft.plan, capture, graph)
                wanted, found = (fake_call(module, *inputs) for module in pair)
            shapes = [[t.shape for t in pytree.tree_leaves(out) if isinstance(t, Tensor)] for out in (wanted, found)]
            if shapes[0] != shapes[1]:
                record.faults.append(f"{mode} mode at ratio {ratio}: shapes {shapes[1]} in the place of {shapes[0]}")
    return record


def _filled(plan: Plan, capture: fx.GraphModule, graph: fx.GraphModule) -> fx.GraphModule:
    """A wide graph with tensors of the right shapes in all its places."""
    for node in graph.graph.find_nodes(op="get_attr"):
        if fetch(graph, str(node.target)) is None:
            shape = plan.tensors[plan.analysis.canonical[str(node.target)]].wide_shape
            like = fetch(capture, str(node.target))
            put_tensor(graph, str(node.target), torch.empty(shape, dtype=like.dtype, device="meta"))
    return graph


def _study(record: Record, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Study:
    """Capture and analyse, and write down what that tells and took, at a ratio of 2."""
    marks = [time.process_time()]
    study = study_model(model, args, kwargs)
    marks.append(time.process_time())
    analyse(study.captures, study.aliases)
    marks.append(time.process_time())
    draft = make_draft(study, 2.0)
    marks.append(time.process_time())
    both, record.analysis_seconds, record.rewrite_seconds = (b - a for a, b in pairwise(marks))
    record.capture_seconds = both - record.analysis_seconds
    graphs = [graph for capture in study.captures.values() for graph in graphs_of(capture)]
    record.nodes = sum(len(graph.graph.nodes) for graph in graphs)
    called = (node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function")
    record.ops = dict(Counter(map(op_name, called)))
    report = make_report(draft)
    record.coverage = report.coverage
    record.factor = report.teacher_parameters / max(report.student_parameters, 1)
    record.frozen = [(entry.op, entry.reason, entry.cost) for entry in report.frozen if entry.cost]
    record.faults = [reason.text for reason in study.analysis.faults]
    return study


def _three(example: Tensor) -> Tensor:
    """A random tensor with a batch of 3, integers within the example's range."""
    shape = (3, *example.shape[1:]) if example.dim() else ()
    if example.is_floating_point():
        return torch.randn(shape, dtype=example.dtype)
    return torch.randint(int(example.min()), int(example.max()) + 1, shape).to(example.dtype)


@torch.no_grad()
def _call(model: nn.Module, batch: Any, mode: str) -> Any:
    run = copy.deepcopy(model).train(mode == "train")
    with Exact():
        return run(*_clones(batch)[0], **_clones(batch)[1])


@torch.no_grad()
def _both_error(teacher: gpd_fx.DynamicTeacher, batch: Any, mode: str, expected: Any) -> float:
    teacher.train(mode == "train")
    before = [(buffer, buffer.clone()) for buffer in teacher.buffers()]
    args, kwargs = _clones(batch)
    with Exact():
        wide, narrow = teacher.both(*args, **kwargs)
    for buffer, value in before:
        buffer.copy_(value)  # running statistics
    return max(relative_error(expected, wide), relative_error(expected, narrow))


def _clones(batch: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, batch)


def _nudged(batch: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t * (1 + 2.0**-52) if t.is_floating_point() else t, batch)


def _step_and_fold(
    teacher: gpd_fx.DynamicTeacher, build: Callable[[], nn.Module], batch: Any
) -> tuple[float, nn.Module]:
    """One SGD step with a loss on both outputs; then the folded student against the teacher's."""
    teacher.train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=1e-3)
    args, kwargs = _clones(batch)
    outputs = teacher.both(*args, **kwargs)
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    loss = torch.stack([t.square().mean() / t.detach().square().mean().clamp_min(1e-30) for t in tensors]).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
    assert torch.isfinite(norm), "gradients are not finite"
    optimizer.step()
    teacher.eval()
    student = gpd_fx.fold(teacher)
    fresh = build().double()
    fresh.load_state_dict(student.state_dict(), strict=True)
    assert type(fresh) is type(student)
    with torch.no_grad():
        expected = teacher.student(*_clones(batch)[0], **_clones(batch)[1])
        errors = [relative_error(expected, m.eval()(*_clones(batch)[0], **_clones(batch)[1])) for m in (student, fresh)]
    return max(errors), student


def _onnx(student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    single = pytree.tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.onnx"
        report = gpd_fx.export_onnx(student.float().eval(), path, single[0], example_kwargs=single[1])
        assert report.max_error is not None
        return report.max_error
