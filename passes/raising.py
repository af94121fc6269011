"""Core ATen ops raised to the composite ops that they come from.

`ExportedProgram.run_decompositions()` writes `convolution` for every conv, `addmm` of a transposed weight for a linear
layer, `_native_batch_norm_legit_functional` with copies into the buffers for a batch norm, and so on. The composite ops
say more: which operand is a layer's weight, that statistics are updated in place, that tokens are no part of the
batch. Each entry of `RAISINGS` turns one core op back; an op that does not fit its pattern stays.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from gpd_fx.fxtools.node_arguments import bind, op_name
from gpd_fx.fxtools.torch_internals import OpOverload, schema

aten = torch.ops.aten
Raising: TypeAlias = Callable[[fx.Node], "fx.Node | None"]
"""Writes the composite op before a node and lets it take over all uses; returns it, or None where nothing was done."""

_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.clone.default")
_CONVS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


def raise_ops(graph: fx.Graph) -> Counter[str]:
    """Raise every core op of a graph, in place; returns how many of each were raised, by the names of both ops."""
    raised: Counter[str] = Counter()
    for node in list(graph.nodes):
        raising = RAISINGS.get(op_name(node.target)) if node.op == "call_function" else None
        made = None if raising is None else raising(node)
        if made is not None:
            raised[f"{op_name(node.target)} to {op_name(made.target)}"] += 1
            _erase(node)
    for node in list(graph.find_nodes(op="call_function", target=aten.linear.default)):
        _over_all_dimensions(node)
    return raised


def _convolution(node: fx.Node) -> fx.Node | None:
    given = bind(node)
    dims = len(_shape(given["weight"])) - 2
    if dims not in _CONVS:
        return None
    first = [given[name] for name in ("input", "weight", "bias", "stride", "padding")]
    if given["transposed"]:
        rest = [given[name] for name in ("output_padding", "groups", "dilation")]
        return _replace(node, node, _TRANSPOSED[dims], *first, *rest)
    return _replace(node, node, _CONVS[dims], *first, given["dilation"], given["groups"])


def _addmm(node: fx.Node) -> fx.Node | None:
    given = bind(node)
    weight = _weight(given["mat2"])
    if weight is None or len(_shape(given["self"])) != 1 or given["beta"] != 1 or given["alpha"] != 1:
        return None
    return _replace(node, node, aten.linear.default, given["mat1"], weight, given["self"])


def _mm(node: fx.Node) -> fx.Node | None:
    given = bind(node)
    weight = _weight(given["mat2"])
    return None if weight is None else _replace(node, node, aten.linear.default, given["self"], weight)


def _bmm(node: fx.Node) -> fx.Node | None:
    """A product with one matrix that was expanded along the batch."""
    given = bind(node)
    matrix = given["mat2"]
    while op_name(matrix.target) in _VIEWS and _shape(matrix) == _shape(matrix.args[0]):
        matrix = matrix.args[0]
    if op_name(matrix.target) != "aten.expand.default" or len(_shape(matrix.args[0])) != 2:
        return None
    weight = _weight(matrix.args[0])
    if weight is None:
        return _replace(node, node, aten.matmul.default, given["self"], matrix.args[0])
    return _replace(node, node, aten.linear.default, given["self"], weight)


def _weight(matrix: fx.Node) -> fx.Node | None:
    """What a matrix is the transpose of, if that is made of parameters alone."""
    name, args = op_name(matrix.target), matrix.args
    flips = (name == "aten.permute.default" and [d % 2 for d in args[1]] == [1, 0]) or (  # pyright: ignore[reportGeneralTypeIssues, reportOperatorIssue, reportOptionalIterable, reportUnknownVariableType]  a list of ints by the op's schema
        name in ("aten.t.default", "aten.transpose.int", "aten.mT.default", "aten.numpy_T.default")
    )
    source = args[0] if args else None
    if not flips or not isinstance(source, fx.Node) or len(_shape(source)) != 2 or _depends_on_inputs(source):
        return None
    return source


def _depends_on_inputs(node: fx.Node) -> bool:
    todo, seen = [node], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        seen.add(node)
        todo += [operand for operand in node.all_input_nodes if operand not in seen]
    return False


def _over_all_dimensions(linear: fx.Node) -> None:
    """A linear op between two views, which flatten all dimensions but the last and bring them back, without them."""
    view = linear.args[0]
    if not isinstance(view, fx.Node) or op_name(view.target) not in _VIEWS[:3]:
        return
    source = view.args[0]
    assert isinstance(source, fx.Node)
    users = list(linear.users)
    wide = [*_shape(source)[:-1], _shape(linear)[-1]]
    if _shape(source)[-1:] != _shape(view)[-1:] or any(
        op_name(user.target) not in _VIEWS[:3] or _shape(user) != wide for user in users
    ):
        return
    linear.update_arg(0, source)
    for user in users:
        linear.meta["val"] = user.meta["val"]
        user.replace_all_uses_with(linear)
        linear.graph.erase_node(user)
    _erase(view)


def _normalised(node: fx.Node) -> fx.Node | None:
    """Layer norm and group norm, of whose results only the first is used."""
    result, given = _only_result(node), bind(node)
    if result is None:
        return None
    affine = (given["weight"], given["bias"], given["eps"])
    if "group" in given:
        return _replace(node, result, aten.group_norm.default, given["input"], given["group"], *affine)
    return _replace(node, result, aten.layer_norm.default, given["input"], given["normalized_shape"], *affine)


def _batch_norm(node: fx.Node) -> fx.Node | None:
    """A batch norm that reads running statistics, or updates them in place, or has none."""
    result, given = _only_result(node), bind(node)
    if result is None:
        return None
    # the ops without an argument `training` are named by what they do
    training = given.get("training", "with_update" in str(node.target))
    args = [given["input"], given["weight"], given["bias"], given.get("running_mean"), given.get("running_var")]
    return _replace(node, result, aten.batch_norm.default, *args, training, given["momentum"], given["eps"], False)


def _functional_batch_norm(node: fx.Node) -> fx.Node | None:
    """A batch norm that returns new running statistics, which are copied into the buffers at the end of the graph."""
    given = bind(node)
    buffers = {-2: given["running_mean"], -1: given["running_var"]}
    count = len(schema(node.target).returns) if isinstance(node.target, OpOverload) else 0
    updates = {getitem: buffers[number] for number in buffers for getitem in _results(node, number % count)}
    used = [user for user in node.users if user.users and user.args[1] not in (0, count - 2, count - 1)]
    if used or not all(_goes_back(getitem, buffer) for getitem, buffer in updates.items()):
        return None
    if any(not _last_reader(node, buffer, set(updates)) for buffer in buffers.values()):
        return None
    result = next(iter(_results(node, 0)), None)
    if result is None:
        return None
    for getitem, buffer in updates.items():
        for user in list(getitem.users):
            if op_name(user.target) == "aten.copy_.default":
                user.replace_all_uses_with(buffer)
                node.graph.erase_node(user)
        getitem.replace_all_uses_with(buffer)
    args = [given[name] for name in ("input", "weight", "bias", "running_mean", "running_var")]
    training = given.get("training", True)
    return _replace(node, result, aten.batch_norm.default, *args, training, given["momentum"], given["eps"], False)


def _goes_back(value: fx.Node, buffer: fx.Node) -> bool:
    """Whether all that becomes of a new statistic is that it is copied into its buffer, maybe by a later batch norm."""
    if buffer.op != "get_attr":
        return False
    for user in value.users:
        name, args = op_name(user.target), user.args
        if name == "aten.copy_.default" and args[0] is buffer and args[1] is value:
            continue
        if RAISINGS.get(name) is not _functional_batch_norm or value not in (args[3], args[4]):
            return False
        number = -2 if value is args[3] else -1
        count = len(schema(user.target).returns) if isinstance(user.target, OpOverload) else 0
        if not all(_goes_back(getitem, buffer) for getitem in _results(user, number % count)):
            return False
    return bool(value.users)


def _last_reader(node: fx.Node, buffer: fx.Node, updates: set[fx.Node]) -> bool:
    """Whether nothing behind a node reads a buffer's old value, so that the node may write to it."""
    order = {each: number for number, each in enumerate(node.graph.nodes)}
    return all(
        order[user] <= order[node]
        or (op_name(user.target) == "aten.copy_.default" and user.args[1] in updates)
        or (op_name(user.target) == "aten.copy_.default" and user.args[0] is buffer)
        for user in buffer.users
    )


def _attention(node: fx.Node) -> fx.Node | None:
    result, given = _only_result(node), bind(node)
    if result is None:
        return None
    query, key, value = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask", given.get("attn_bias"))
    grouped = _shape(query)[1] != _shape(key)[1]
    made = _replace(
        node, result, aten.scaled_dot_product_attention.default, query, key, value, mask, given["dropout_p"],
        given["is_causal"],
    )  # fmt: skip
    made.kwargs = {"scale": given["scale"], "enable_gqa": grouped}
    return made


def _softmax(node: fx.Node) -> fx.Node | None:
    given = bind(node)
    op = aten.log_softmax.int if "log" in str(node.target) else aten.softmax.int
    dtype = (torch.float32,) if given["half_to_float"] else ()
    return _replace(node, node, op, given["self"], given["dim"], *dtype)


def _dropout(node: fx.Node) -> fx.Node | None:
    result, given = _only_result(node), bind(node)
    train = given["train"] is not False
    return None if result is None else _replace(node, result, aten.dropout.default, given["input"], given["p"], train)


def _same_args(op: Any) -> Raising:
    """An op that has the arguments of its composite form."""
    return lambda node: _replace(node, node, op, *node.args)


def _first_of(op: Any) -> Raising:
    """An op with further results that are not used, and the arguments of its composite form."""

    def raising(node: fx.Node) -> fx.Node | None:
        result = _only_result(node)
        return None if result is None else _replace(node, result, op, *node.args)

    return raising


RAISINGS: dict[str, Raising] = {
    "aten.convolution.default": _convolution,
    "aten._convolution.default": _convolution,
    "aten.addmm.default": _addmm,
    "aten.mm.default": _mm,
    "aten.bmm.default": _bmm,
    "aten.native_layer_norm.default": _normalised,
    "aten.native_group_norm.default": _normalised,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten._native_batch_norm_legit.default": _batch_norm,
    "aten._native_batch_norm_legit.no_stats": _batch_norm,
    "aten.native_batch_norm.default": _batch_norm,
    "aten._batch_norm_no_update.default": _batch_norm,
    "aten._batch_norm_with_update.default": _batch_norm,
    "aten._native_batch_norm_legit_functional.default": _functional_batch_norm,
    "aten._batch_norm_with_update_functional.default": _functional_batch_norm,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _attention,
    "aten._scaled_dot_product_flash_attention.default": _attention,
    "aten._scaled_dot_product_efficient_attention.default": _attention,
    "aten._scaled_dot_product_cudnn_attention.default": _attention,
    "aten._softmax.default": _softmax,
    "aten._log_softmax.default": _softmax,
    "aten.native_dropout.default": _dropout,
    "aten._adaptive_avg_pool2d.default": _same_args(aten.adaptive_avg_pool2d.default),
    "aten._adaptive_avg_pool3d.default": _same_args(aten.adaptive_avg_pool3d.default),
    "aten.grid_sampler_2d.default": _same_args(aten.grid_sampler.default),
    "aten.grid_sampler_3d.default": _same_args(aten.grid_sampler.default),
    "aten._cdist_forward.default": _same_args(aten.cdist.default),
    "aten.max_pool2d_with_indices.default": _first_of(aten.max_pool2d.default),
    "aten.max_pool3d_with_indices.default": _first_of(aten.max_pool3d.default),
}
"""By the name of a core op, how it is raised."""


def _replace(node: fx.Node, result: fx.Node, op: Any, *args: Any) -> fx.Node:
    """Write an op before `node`, and let it take over the uses of `result`."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(op, args)
    made.meta = dict(result.meta)
    result.replace_all_uses_with(made)
    return made


def _results(node: fx.Node, number: int) -> Iterator[fx.Node]:
    """The nodes that take one result of an op with several."""
    return (user for user in list(node.users) if user.target is operator.getitem and user.args[1] == number)


def _only_result(node: fx.Node) -> fx.Node | None:
    """The node that takes the first result of an op with several, if no other result is used."""
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
        return None
    return next(_results(node, 0), None)


def _shape(node: Any) -> list[str]:
    """The sizes of a node's result as text, which compares symbolic sizes without assuming anything about them."""
    value = node.meta.get("val")
    return [str(extent) for extent in value.shape] if isinstance(value, Tensor) else []


def _erase(node: fx.Node) -> None:
    """Erase a node that was raised, what took its results, and the views that only it used."""
    for user in list(node.users):
        if not user.users:
            node.graph.erase_node(user)
    if node.users or node.op != "call_function":
        return
    operands = node.all_input_nodes
    node.graph.erase_node(node)
    views = (*_VIEWS, "aten.expand.default", "aten.permute.default", "aten.t.default", "aten.transpose.int")
    for operand in operands:
        if op_name(operand.target) in views and not operand.users:
            _erase(operand)
