"""Where a loss stopped being finite: the update is run again, and every layer's output looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.fxtools.torch_internals import flat_inputs
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher


class _Stop(Exception):
    """Carries the sentence that names the culprit."""


@torch.no_grad()
def find_culprit(model: nn.Module, images: Tensor) -> str | None:
    """A sentence that names what first is not finite in a forward pass of `model`, or None where all is finite.

    The random numbers must be those of the update. `model` is a dynamic teacher or any module, in train mode.
    """
    if not images.isfinite().all():
        rows = [row for row, image in enumerate(images) if not image.isfinite().all()]
        return f"the input is not finite (images {rows[:8]} of the batch)"
    for name, parameter in model.named_parameters():  # no buffers: batch norm has noted this update already
        if not parameter.isfinite().all():
            return f"{name!r} is not finite since an earlier update"
    try:
        if isinstance(model, DynamicTeacher):
            with torch.random.fork_rng(devices=[]):
                found = _Looker(model.as_graph("train")).look(images)
            if found is not None:
                return found
            with _looking(model.skeleton, "student"):
                model.student(images)
        else:
            with _looking(model, "student"):
                model(images)
    except _Stop as found:
        return str(found)
    return None


class _Looker(fx.Interpreter):
    """Runs the teacher's graph up to the first node whose result is not finite."""

    found: str | None = None

    def look(self, images: Tensor) -> str | None:
        """A sentence that names the node, or None."""
        assert isinstance(self.module, fx.GraphModule)
        with contextlib.suppress(_Stop):  # whose text the interpreter adds to
            self.run(*flat_inputs(self.module, (images,), {}), enable_io_processing=False)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op not in ("placeholder", "get_attr") and not _finite(result):  # a mask of infinities is no fault
            stack: dict[str, Any] = n.meta.get("nn_module_stack") or {}
            layer = str(list(stack.values())[-1][0]) if stack else ""
            where = f"of layer {layer!r} " if layer else ""
            what = f"{op_name(n.target)} {where}({n.name})"
            self.found = f"the first that is not finite in the dynamic teacher is {what}"
            raise _Stop
        return result


@contextlib.contextmanager
def _looking(module: nn.Module, whose: str) -> Generator[None]:
    """Meanwhile a call of `module` ends at the first layer whose output is not finite."""

    def hook(name: str) -> Any:
        def look(layer: nn.Module, args: Any, output: Any) -> None:
            if not _finite(output):
                given = "" if _finite(args) else ", whose input already is not"
                kind = type(layer).__name__
                raise _Stop(f"the first layer that is not finite in the {whose} is {name!r} ({kind}{given})")

        return look

    handles = [layer.register_forward_hook(hook(name)) for name, layer in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(values: Any) -> bool:
    return all(
        bool(leaf.isfinite().all())
        for leaf in pytree.tree_leaves(values)
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    )
