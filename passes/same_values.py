"""Whether two graphs compute the same values, compared in float64 on given inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from gpd_fx.errors import PassError
from gpd_fx.fxtools.regions import restored_autocast
from gpd_fx.numerics.comparison import CONDITIONING, nudged, relative_error
from gpd_fx.numerics.precision import DOUBLE, deterministic
from gpd_fx.passes.widen import EXACT

TOLERANCE = 1e-9
"""The largest relative error of two outputs that are taken for the same."""
_ROUNDING = 10.0
"""An error may be this many times what rounding the parameters once does."""


class Values:
    """Inputs in float64, and the comparison of graphs on them.

    Args:
        inputs: a sequence of positional inputs, or a mapping of keyword inputs.

    Raises:
        PassError: `inputs` is a tensor, or neither a sequence nor a mapping.
    """

    def __init__(self, inputs: Sequence[Any] | Mapping[str, Any]) -> None:
        if isinstance(inputs, Tensor | str) or not isinstance(inputs, Sequence | Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  users call this
            raise PassError(
                f"verify is a {type(inputs).__name__}; pass a tuple of positional inputs, such as (images,), or a dict "
                "of keyword inputs"
            )
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), dict[str, Any]())
        self._inputs = pytree.tree_map_only(Tensor, DOUBLE.exact, (args, kwargs))

    def compare(self, before: nn.Module | ExportedProgram, after: fx.GraphModule) -> float:
        """The relative error between the outputs of two graphs.

        Beyond the tolerance it is held against two measures of what rounding does to the first graph: a change of the
        inputs by one unit in the last place, and a change of its parameters by half a unit in the last place of their
        own dtype, since new parameters are rounded to it.

        Raises:
            PassError: the outputs differ, or a graph does not run.
        """
        if after is before:
            return 0.0
        name = "the graph before it"
        expected = self._run(before, self._inputs, name)
        error = relative_error(expected, self._run(after, self._inputs, "its result"))
        if error > TOLERANCE:
            inputs = relative_error(expected, self._run(before, nudged(self._inputs, torch.float64), name))
            parameters = relative_error(expected, self._run(before, self._inputs, name, rounded=True))
            if error > max(CONDITIONING * inputs, _ROUNDING * parameters):
                raise PassError(
                    f"it changed the values by {error:.1e} of the largest output in float64 (one unit in the last "
                    f"place of the inputs changes them by {inputs:.1e}, rounding the parameters by {parameters:.1e}); "
                    "set `changes_function = True` in the class of a pass that is meant to"
                )
        return error

    def _run(self, given: nn.Module | ExportedProgram, inputs: Any, what: str, *, rounded: bool = False) -> Any:
        module = copy.deepcopy(given.module() if isinstance(given, ExportedProgram) else given)
        generator = torch.Generator().manual_seed(0)
        for tensor in (*module.parameters(), *module.buffers()):
            unit = torch.finfo(tensor.dtype).eps / 2 if tensor.is_floating_point() else 0.0
            tensor.data = DOUBLE.exact(tensor.data)
            if rounded and unit:
                drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
                tensor.data *= 1 + unit * (2 * drawn - 1)
        for name, exact in getattr(module, "meta", {}).get(EXACT, {}).items():  # before they were rounded
            module.get_buffer(name).data = exact.to(module.get_buffer(name).device)
        if isinstance(module, fx.GraphModule):
            deterministic(module, DOUBLE)
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)
        try:
            with torch.no_grad(), restored_autocast():
                return module(*args, **kwargs)
        except Exception as error:
            raise PassError(
                f"verify: {what} does not run on these inputs in float64: {type(error).__name__}: {error}"
            ) from error
