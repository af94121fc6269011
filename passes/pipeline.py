"""Passes one after another: ours, torch's, and plain functions on graph modules."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import fx
from torch.fx.passes.infra import pass_base
from torch.fx.passes.infra.pass_manager import PassManager

from gpd_fx.errors import GPDError, PassError
from gpd_fx.passes.base import Pass, PassResult
from gpd_fx.passes.fingerprint import Sharing
from gpd_fx.passes.same_values import Values

Function: TypeAlias = Callable[[fx.GraphModule], "fx.GraphModule | pass_base.PassResult | None"]
Step: TypeAlias = Pass | pass_base.PassBase | PassManager | Function
"""One element of a pipeline."""


@dataclass(frozen=True)
class Foreign(Pass):
    """Runs a pass of torch, or a plain function, on a deep copy of the graph module.

    Such passes change what they are given, so the copy has parameters of its own. A function may return a graph
    module, torch's `PassResult`, or None for having changed what it was given.

    Attributes:
        function: an instance of torch's `PassBase` or `PassManager`, or a function on a graph module. An attribute
            `changes_function = True` on it has the meaning that it has for `Pass`.
    """

    parameters: ClassVar[Sharing] = "any"
    function: Step

    @property
    def name(self) -> str:
        """The function's name, or the name of its class."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def run(self, module: fx.GraphModule) -> PassResult:
        given = copy.deepcopy(module)
        try:
            found: Any = self.function(given)
        except GPDError:
            raise
        except Exception as error:
            raise PassError(f"it raised {type(error).__name__}: {error}") from error
        modified, notes = True, ()
        if isinstance(found, pass_base.PassResult):
            found, modified, notes = found.graph_module, found.modified, getattr(found, "notes", ())
        elif found is None:
            found = given
        if not isinstance(found, fx.GraphModule):
            raise PassError(f"it returned a {type(found).__name__}; return a GraphModule, a PassResult or None")
        found.recompile()
        return PassResult(found, modified, notes) if modified else PassResult(module, False, notes)


@dataclass(frozen=True)
class Pipeline(Pass):
    """Passes run one after another.

    Attributes:
        passes: passes of ours, instances of torch's `PassBase` or `PassManager`, and functions on a graph module; see
            `Foreign` for the last two.
        verify: inputs on which the values of the graph are compared in float64 before and after each pass: a tuple of
            positional inputs or a mapping of keyword inputs. None compares nothing. Randomness is switched off in the
            copies that are compared, and running statistics stay as they are.
        after: called after each pass with its name and its result.

    Raises:
        GPDError: whatever a pass raises, of the same class where it is one of ours and as a `PassError` otherwise. The
            message names the pass that failed and those before it.
        PassError: with `verify`, a pass changed the values though it does not declare `changes_function`.

    Example:
        >>> pipeline = Pipeline((Widen(2.0), Branch(), Merge()), verify=(x,), after=lambda name, result: print(name))
        >>> pipeline(gpd_fx.capture(model, (x,))).graph_module
    """

    parameters: ClassVar[Sharing] = "any"
    passes: Sequence[Step]
    verify: Sequence[Any] | Mapping[str, Any] | None = None
    after: Callable[[str, PassResult], None] | None = None

    def __post_init__(self) -> None:
        """Every element has to be something that can be called."""
        for step in self.passes:
            if inspect.isclass(step) or not callable(step):
                what = f"the class {getattr(step, '__name__', step)}" if inspect.isclass(step) else type(step).__name__
                raise PassError(f"Pipeline: passes holds {what}; give instances of passes, or functions")

    def admits(self, given: Any) -> None:
        """The first pass decides what the pipeline takes."""
        first = next(iter(self.passes), None)
        if isinstance(first, Pass):
            first.admits(given)
        else:
            super().admits(given)

    def run(self, module: fx.GraphModule) -> PassResult:
        done: list[str] = []
        notes: list[str] = []
        modified = False
        values = None if self.verify is None else Values(self.verify)
        for given in self.passes:
            step = given if isinstance(given, Pass) else Foreign(given)
            try:
                result = step(module)
                if values is not None and not (step.changes_function or getattr(given, "changes_function", False)):
                    values.compare(module, result.graph_module)
            except Exception as error:
                before = f" (after {', '.join(done)})" if done else ""
                kind = type(error) if isinstance(error, GPDError) else PassError
                text = str(error) if isinstance(error, GPDError) else f"it raised {type(error).__name__}: {error}"
                raise kind(f"pass {step.name}{before}: {text}") from error
            module, modified = result.graph_module, modified or result.modified
            notes += result.notes
            done.append(step.name)
            if self.after is not None:
                self.after(step.name, result)
        return PassResult(module, modified, tuple(notes))
