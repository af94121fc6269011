"""Depthwise convs that run as one op with the batch norm behind them: what was fused, and how in the student.

The teacher's graphs are rewritten by the pass `FuseDepthwise`. The student is a module, so there the calls are met on
their way: a conv with a kernel that is to be fused gives a tensor of its output's shape that takes no memory, and the
batch norm that is called with that runs both. The graphs say that nothing else uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gpd_fx.kernels.depthwise.launch import Conv, padding_of
from gpd_fx.kernels.depthwise.op import depthwise_norm

_OF_SHAPE = {
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point),
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda")),
}
"""What asks a tensor for other things than its values."""


@dataclass(frozen=True)
class Fused:
    """A depthwise conv in the graph of a mode, whether it is one op with its batch norm, and why not.

    Attributes:
        parameter: the student's name of the kernel.
        mode: "train" or "eval".
        runs: "fused" or "apart".
        reason: in words.
    """

    parameter: str
    mode: str
    runs: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What `DynamicTeacher.fuse` did, one row a depthwise conv and mode."""

    rows: tuple[Fused, ...]

    @property
    def fused(self) -> tuple[tuple[str, str], ...]:
        """What was fused, as (mode, parameter)."""
        return tuple((row.mode, row.parameter) for row in self.rows if row.runs == "fused")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        table = [("parameter", "mode", "runs", "reason"), *((r.parameter, r.mode, r.runs, r.reason) for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{len(self.fused)} of {len(self.rows)} depthwise convs run as one op with their batch norm"]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join(lines)


class FusingCalls(TorchFunctionMode):
    """Meanwhile conv2d with one of these kernels waits for the batch norm that takes its output, and runs with it.

    Anything else that takes the output makes it run first.
    """

    def __init__(self, kernels: Iterable[Tensor]) -> None:
        super().__init__()
        self._kernels = {id(kernel) for kernel in kernels}
        self.waiting: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and id(_weight(*args, **(kwargs or {}))) in self._kernels:
            return self._wait(**_conv2d(*args, **(kwargs or {})))
        if func is functional.batch_norm:
            given = _batch_norm(*args, **(kwargs or {}))
            waiting = self.waiting.pop(id(given["x"]), None)
            if waiting is not None:
                return depthwise_norm(**(given | waiting[1]))
        if self.waiting and func not in _OF_SHAPE:
            args, kwargs = pytree.tree_map_only(Tensor, self._run, (args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _wait(self, x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
        size = Conv.of(weight, rest["stride"], rest["padding"], rest["dilation"]).out(x.shape[2:])
        # whatever takes its values for those of a conv shows it
        stand_in = x.new_full((1,), torch.nan).expand(*x.shape[:2], *size)
        self.waiting[id(stand_in)] = (stand_in, {"x": x, "weight": weight, **rest})
        return stand_in

    def _run(self, tensor: Tensor) -> Tensor:
        """What a tensor stands for."""
        if id(tensor) not in self.waiting:
            return tensor
        given = self.waiting[id(tensor)][1]
        names = ("x", "weight", "bias", "stride", "padding", "dilation")
        return torch.conv2d(*(given[name] for name in names), groups=len(given["weight"]))


def synchronised(module: nn.Module) -> set[str]:
    """The names of parameters and buffers of batch norms that may take their statistics over several processes."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, nn.SyncBatchNorm)
        for name in (*part._parameters, *part._buffers)  # pyright: ignore[reportPrivateUsage]  places that are empty too
    }


def _weight(input: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
    return weight


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any]:
    """The arguments of `torch.conv2d` by the names of `depthwise_norm`."""

    def pair(value: Any) -> list[int]:
        return [value, value] if isinstance(value, int) else [value[0], value[-1]]

    numbers = padding_of(padding, weight.shape[2:], pair(dilation))
    assert numbers is not None  # or the pass would have left the conv alone
    given = {"x": input, "weight": weight, "bias": bias}
    return given | {"stride": pair(stride), "padding": numbers, "dilation": pair(dilation)}


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Any]:
    """The arguments of `functional.batch_norm` by the names of `depthwise_norm`."""
    given = {"x": input, "gamma": weight, "beta": bias, "running_mean": running_mean, "running_var": running_var}
    return given | {"training": training, "momentum": momentum, "eps": eps}
