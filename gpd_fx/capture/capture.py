"""Capture: a module becomes an `fx.GraphModule` of ATen ops that shares its parameters and buffers.

`torch.export` traces the module with the leading dimension of every tensor input left symbolic. In-place ops stay,
batch-norm statistics update, parameters keep their names. The mode (train or eval) is baked in, so a dynamic teacher
holds one capture of each.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import traceback
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpd_fx.capture.example_inputs import prepare
from gpd_fx.errors import CaptureError, InputError
from gpd_fx.fxtools.attributes import graphs_of
from gpd_fx.fxtools.fake_tensors import fake_call
from gpd_fx.fxtools.module_calls import detached_copies, unchanged
from gpd_fx.fxtools.module_modes import frozen_parts, set_mode
from gpd_fx.fxtools.regions import inline_regions
from gpd_fx.fxtools.size_ranges import RANGES, size_ranges

Mode = Literal["train", "eval"]
_BATCH = torch.export.Dim.AUTO  # let the exporter find which leading dimensions vary, and together
_IGNORED = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default")


def shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` with modules and buffers of its own, and the same parameter tensors."""
    memo = detached_copies(model) | {id(parameter): parameter for parameter in model.parameters()}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied (copy.deepcopy raised {type(error).__name__}: {error}); "
            "remove handles, hooks or non-leaf tensors that it stores as attributes"
        ) from error


def capture(
    model: nn.Module,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    mode: Mode = "eval",
) -> fx.GraphModule:
    """Capture `model` in one mode with a dynamic batch.

    Args:
        model: any module that `torch.export` can trace. It is not changed.
        example_inputs: positional inputs; every tensor's first dimension is taken for the batch where it can vary.
        example_kwargs: keyword inputs.
        mode: the mode that the graph has for good.

    Returns:
        A `GraphModule` of ATen ops that takes and returns what the model does. Its parameters are the model's own
        tensors, under the model's names; its buffers are copies. `train` and `eval` change nothing any more.

    Raises:
        InputError: the model cannot be called with these inputs.
        CaptureError: `torch.export` cannot trace the model; the message says where.
    """
    args, kwargs = prepare(model, example_inputs, example_kwargs)
    skeleton = shallow_copy(model)
    try_call(skeleton, args, kwargs)
    return capture_skeleton(skeleton, args, kwargs, mode, frozen_parts(model))


def capture_skeleton(
    skeleton: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode, frozen: Sequence[str] = ()
) -> fx.GraphModule:
    """As `capture`, for a module whose mode may be set; submodules at the paths `frozen` stay in eval mode."""
    set_mode(skeleton, mode == "train", frozen)
    args, kwargs = pytree.tree_map_only(Tensor, _at_least_two, (args, kwargs))
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            shapes[leaf] = {0: _BATCH}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about its own internals
            with unchanged(skeleton), _named_keywords(skeleton, kwargs):
                program = torch.export.export(skeleton, args, kwargs, dynamic_shapes=shapes, strict=False)
            exported = program.module(check_guards=False)
        ranges = size_ranges(program)
    except Exception as error:  # the exporter raises errors of many families
        raise CaptureError(_explain(skeleton, mode, error)) from error
    module = clean(exported)
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta[RANGES] = ranges.get(node.name, {})
    return module


@contextlib.contextmanager
def _named_keywords(skeleton: nn.Module, kwargs: Mapping[str, Any]) -> Generator[None]:
    """Meanwhile `forward` names the given keywords in the place of `**kwargs`, which torch 2.11 cannot export."""
    signature = inspect.signature(skeleton.forward)
    plain = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    free = [name for name in kwargs if name not in signature.parameters]
    if len(plain) == len(signature.parameters) or not free:
        yield
        return
    own = vars(skeleton).get("forward")
    original = skeleton.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    named = [*plain, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in free)]
    vars(forward)["__signature__"] = signature.replace(parameters=named)
    vars(skeleton)["forward"] = forward
    try:
        yield
    finally:
        del vars(skeleton)["forward"]
        if own is not None:
            vars(skeleton)["forward"] = own


def _at_least_two(tensor: Tensor) -> Tensor:
    """A batch of one would be taken for a constant."""
    return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor


def clean(exported: fx.GraphModule) -> fx.GraphModule:
    """A plain GraphModule: the exporter's forbids `train()`, and its assertions would forbid a cast to float64."""
    inline_regions(exported)
    for module in graphs_of(exported):  # what is left inside the graph, such as the branches of a condition
        for node in list(module.graph.nodes):
            unused = node.op == "get_attr" and not node.users
            if str(node.target) in _IGNORED or node.target == "_guards_fn" or unused:
                module.graph.erase_node(node)
        if module is not exported:
            module.recompile()
    return fx.GraphModule(exported, exported.graph)


def _explain(model: nn.Module, mode: Mode, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    summary = lines[0] if lines else type(error).__name__
    where = _user_frame(error)
    advice = (
        "rewrite control flow that depends on tensor values (torch.where, torch.cond)"
        if "data-dependent" in str(error).lower() or "Could not guard" in str(error)
        else "see torch.export's message above"
    )
    if "references nonexistent attribute" in str(error):
        advice = (
            "a submodule or parameter has the name of an attribute of torch.fx.GraphModule (code, graph); rename it"
        )
    if mode == "train":
        advice += (
            "; if only train mode fails, switch off what is random there (stochastic depth, layer drop) by its option"
        )
    at = f" at {where}" if where else ""
    return f"torch.export cannot capture {type(model).__name__} in {mode} mode{at}: {summary} -- {advice}"


def _user_frame(error: BaseException) -> str:
    """The innermost line in the trace of an error that is neither torch's nor ours."""
    ours = (*(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__)), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    if frames:
        return f'File "{frames[-1].filename}", line {frames[-1].lineno}, in {frames[-1].name}'
    return _user_frame(error.__cause__) if error.__cause__ is not None else ""


def register_outputs(value: Any) -> None:
    """Make dataclass outputs known to the exporter, so that they keep their class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        if kind not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(kind)
        for field in dataclasses.fields(value):
            register_outputs(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():  # pyright: ignore[reportUnknownVariableType]  whatever the user's model returns
            register_outputs(item)
    elif isinstance(value, list | tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]  likewise
            register_outputs(item)


def try_call(skeleton: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the model once in eval mode, so that unfit inputs are told from a model that cannot be captured.

    Raises:
        InputError: the call raised.
    """
    skeleton.eval()
    try:
        output = _output(skeleton, args, kwargs)
    except Exception as error:
        given = ", ".join(_describe(leaf) for leaf in pytree.tree_leaves((args, kwargs)))
        parameter = next(skeleton.parameters(), None)
        home = f"; its parameters are {_name(parameter.dtype)} on {parameter.device}" if parameter is not None else ""
        raise InputError(
            f"{type(skeleton).__name__} cannot be called with the example inputs [{given}]{home}. It raised "
            f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}. Pass example_inputs=(...) that "
            "the model accepts"
        ) from error
    register_outputs(output)
    return output


def _output(skeleton: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a call, on fake tensors where that is possible."""
    try:
        return fake_call(skeleton, args, kwargs)
    except Exception:  # noqa: BLE001  the real call decides
        with unchanged(skeleton), torch.no_grad():
            return skeleton(*args, **kwargs)


def _describe(leaf: object) -> str:
    if isinstance(leaf, Tensor):
        return f"{_name(leaf.dtype)}{list(leaf.shape)} on {leaf.device}"
    return repr(leaf)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
