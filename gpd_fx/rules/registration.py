"""Rules from outside: for a user's own ops, for other libraries' ops, and for ATen ops that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpd_fx.errors import ArgumentError
from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.fxtools.torch_internals import OpOverload
from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.site import Rule
from gpd_fx.rules.table import RULES, rule_of


def register_rule(op: Any, rule: str | Rule, *, replace: bool = False) -> None:
    """Say what an op does to axes, so that channels widen through it. It holds for this process.

    `expand` verifies every model, so a wrong rule leads to an error and never to a wrong teacher. A teacher whose plan
    depends on a rule can be loaded only where the rule is registered.

    Args:
        op: an overload such as `torch.ops.torchvision.roi_align.default`; an op with a single overload, or what
            `torch.library.custom_op` returns, stands for that overload.
        rule: a line of the notation (`gpd_fx.rules.notation`), a function of a `gpd_fx.rules.Site` that returns the
            axes of the result, or a `gpd_fx.rules.Entry`, which also says which argument is a layer's kernel, what the
            op multiplies, and how it is kept from drawing random numbers.
        replace: whether it may take the place of a rule that is there.

    Raises:
        ArgumentError: `op` is no overload, or has a rule already; `rule` cannot be read.

    Example:
        >>> @torch.library.custom_op("mine::scale", mutates_args=())
        ... def scale(x: Tensor, gain: Tensor) -> Tensor: ...
        >>> gpd_fx.register_rule(scale, "n c _ _, c -> n c _ _")
    """
    overload = _overload(op)
    name = op_name(overload)
    if not replace and rule_of(overload) is not None:
        raise ArgumentError(f"register_rule: {name} has a rule already; pass replace=True to put yours in its place")
    RULES[name.removeprefix("aten.")] = _read(rule, name)
    rule_of.cache_clear()


def _overload(op: Any) -> OpOverload:
    found = getattr(op, "_opoverload", op)  # what torch.library.custom_op returns
    overloads: Callable[[], list[str]] | None = getattr(found, "overloads", None)
    if not isinstance(found, OpOverload) and overloads is not None:
        names = overloads()
        if len(names) > 1:
            raise ArgumentError(f"register_rule: {found} has the overloads {', '.join(names)}; pass one, such as "
                                f"torch.ops.{found}.{names[0]}")  # fmt: skip
        found = getattr(found, names[0])
    if not isinstance(found, OpOverload):
        raise ArgumentError(
            f"register_rule: op is {op!r}, not an overload such as torch.ops.torchvision.roi_align.default"
        )
    return found


def _read(rule: str | Rule, name: str) -> Rule:
    if isinstance(rule, str):
        try:
            return Einsum(rule)
        except (ValueError, KeyError, IndexError) as error:
            raise ArgumentError(f"register_rule: the rule {rule!r} of {name} cannot be read: {error}") from error
    if not callable(rule):  # pyright: ignore[reportUnnecessaryComparison]  users call this
        raise ArgumentError(f"register_rule: the rule of {name} is {rule!r}; pass a line of the notation or a function")
    return rule
