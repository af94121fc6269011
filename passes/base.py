"""What every pass is: a small frozen dataclass that maps one FX GraphModule to another.

A pass states its options as fields, checks its precondition before and its postcondition after it runs, and says
whether it changed anything. A `Pipeline` is itself a pass; an error in it names the pass and those that ran before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import fx

from gpd_fx.errors import GPDError, PassError


@dataclass(frozen=True)
class PassResult:
    """The module after a pass, whether the pass changed it, and what it has to say (one line each)."""

    module: fx.GraphModule
    changed: bool
    notes: tuple[str, ...] = field(default=())


class Pass(ABC):
    """A transformation of an `fx.GraphModule`; options are dataclass fields. Call it to run it with its checks."""

    @property
    def name(self) -> str:
        """The name used in messages."""
        return type(self).__name__

    def requires(self, module: fx.GraphModule) -> None:
        """Raise `PassError` where `module` is not one that this pass can take."""

    @abstractmethod
    def run(self, module: fx.GraphModule) -> PassResult:
        """Transform `module`; the given module is left as it was."""

    def ensures(self, module: fx.GraphModule) -> None:
        """Raise `PassError` where the result is not what this pass promises."""
        module.graph.lint()

    def __call__(self, module: fx.GraphModule) -> PassResult:
        """Check the precondition, run, check the postcondition.

        Raises:
            PassError: the argument is no `fx.GraphModule`, or a condition does not hold.
        """
        if not isinstance(module, fx.GraphModule):  # pyright: ignore[reportUnnecessaryIsInstance]  users call this
            raise PassError(
                f"{self.name} takes an fx.GraphModule, got {type(module).__name__}; capture a model with "
                "gpd_fx.capture(model, example_inputs) first"
            )
        self.requires(module)
        result = self.run(module)
        self.ensures(result.module)
        return result


@dataclass(frozen=True)
class Pipeline(Pass):
    """Passes run one after another.

    Raises:
        GPDError: whatever a pass raises, of the same class, with the failing pass and those before it named.
    """

    passes: tuple[Pass, ...]

    def run(self, module: fx.GraphModule) -> PassResult:
        done: list[str] = []
        notes: list[str] = []
        changed = False
        for step in self.passes:
            try:
                result = step(module)
            except GPDError as error:
                after = f" (after {', '.join(done)})" if done else ""
                raise type(error)(f"pass {step.name}{after}: {error}") from error
            module, changed = result.module, changed or result.changed
            notes += result.notes
            done.append(step.name)
        return PassResult(module, changed, tuple(notes))
