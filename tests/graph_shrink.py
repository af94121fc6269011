"""Failing trials made small, and written as a test that needs no generator.

Delta debugging: whatever can be left out or made plainer, while the trial still fails in the same way, is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.fx.graph import CodeGen

import gpd_fx
from gpd_fx.capture.capture import capture
from gpd_fx.fxtools.attributes import fetch
from gpd_fx.fxtools.torch_internals import copy_graph
from tests.graph_check import Setting, WrongError
from tests.graph_trials import Trial
from tests.graphs import SOURCES, Program, RandomNet, Step, example


def failure(trial: Trial) -> WrongError | None:
    """How a trial fails, if it does."""
    try:
        trial.run()
    except WrongError as error:
        return error
    except gpd_fx.CaptureError:
        return None
    return None


def shrink(trial: Trial, seconds: float = 120.0) -> Trial:
    """The smallest trial that is found, within some time, to fail as this one does."""
    first = failure(trial)
    assert first is not None, "it does not fail"
    until = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for candidate in _simpler(trial):
            if time.monotonic() > until:
                return trial
            error = failure(candidate)
            if error is not None and error.kind == first.kind:
                trial, smaller = candidate, True
                break
    return trial


def _simpler(trial: Trial) -> Iterator[Trial]:
    """Trials that are one change plainer, those that leave out most first."""
    program, steps = trial.program, trial.program.steps
    if len(trial.settings) > 1:
        yield from (replace(trial, settings=(setting,)) for setting in trial.settings)
    if len(trial.modes) > 1:
        yield from (replace(trial, modes=(mode,)) for mode in trial.modes)
    if trial.laws:
        yield replace(trial, laws=False)
    size = len(steps)
    while size:
        for start in range(0, len(steps), size):
            yield replace(trial, program=replace(program, steps=steps[:start] + steps[start + size :]))
        size //= 2
    for setting in (Setting(), Setting(3.0), Setting(1.5)):
        if len(trial.settings) == 1 and _cost(setting) < _cost(trial.settings[0]):
            yield replace(trial, settings=(setting,))
    for source in SOURCES[: SOURCES.index(program.source)]:
        yield replace(trial, program=replace(program, source=source))
    for plainer in _plainer_numbers(program):
        yield replace(trial, program=plainer)


def _cost(setting: Setting) -> tuple[bool, int]:
    return setting.other is not None, (2.0, 3.0, 1.5, 1.3).index(setting.ratio)


def _plainer_numbers(program: Program) -> Iterator[Program]:
    if program.seed:
        yield replace(program, seed=0)
    for numbers in _lower(program.stem):
        yield replace(program, stem=numbers)
    for numbers in _lower(program.head):
        yield replace(program, head=numbers)
    for k, step in enumerate(program.steps):
        for numbers in _lower(step.picks):
            yield replace(program, steps=(*program.steps[:k], Step(step.op, numbers), *program.steps[k + 1 :]))


def _lower(numbers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    zeros = (0,) * len(numbers)
    if numbers != zeros:
        yield zeros
        for k, number in enumerate(numbers):
            for lower in sorted({0, number // 2, number - 1}):
                if 0 <= lower < number:
                    yield (*numbers[:k], lower, *numbers[k + 1 :])


def as_code(trial: Trial, name: str = "found") -> str:
    """A test of the model that a trial is about, as the calls of its capture in the first mode."""
    program, mode = trial.program, trial.modes[0]
    inputs = example(program, 2, 0)
    captured = capture(RandomNet(program), inputs, mode=mode)
    graph, _ = copy_graph(captured.graph)
    members: dict[str, str] = {}
    for node in graph.find_nodes(op="get_attr"):
        tensor = fetch(captured, str(node.target))
        if isinstance(tensor, Tensor):
            node.target = members.setdefault(str(node.target), f"t{len(members)}")
    graph.set_codegen(CodeGen())
    body = graph.python_code("self").src.replace("torch.ops.aten", "aten")
    lines = [f"def test_{name}() -> None:", "    class Net(nn.Module):", "        def __init__(self) -> None:"]
    lines.append("            super().__init__()")
    for path, member in members.items():
        tensor = fetch(captured, path)
        kind = "weight" if isinstance(tensor, torch.nn.Parameter) else "table"
        made = f"{kind}({', '.join(map(str, tensor.shape))})"
        lines.append(
            f"            self.{member} = {made if tensor.is_floating_point() else f'integers({tensor.tolist()})'}"
        )
    lines += ["", *(f"        {line.split(';  ')[0]}" for line in body.strip().splitlines()), ""]
    shapes = ", ".join(str(tuple(x.shape[1:])) for x in inputs)
    lines.append(f"    widens_exactly(Net(), {shapes}, {_asked(trial, members)}, modes={trial.modes})")
    return "\n".join(lines)


def _asked(trial: Trial, members: dict[str, str]) -> str:
    """The first setting, in the names that the code gives to parameters."""
    setting = trial.settings[0]
    ratio, exclude = setting.ask([name for name, _ in RandomNet(trial.program).named_parameters()])
    globs = [glob for glob in ratio if glob != "*"] if isinstance(ratio, Mapping) else list(exclude)
    matched = [member for path, member in members.items() if any(fnmatchcase(path, glob) for glob in globs)]
    if exclude:
        return f"ratio={ratio}, exclude={tuple(matched)}"
    if isinstance(ratio, Mapping):
        ratio = {"*": setting.ratio, **dict.fromkeys(matched, setting.other)}
    return f"ratio={ratio}"
