"""What every pass is: a small frozen dataclass that maps one FX GraphModule to another.

A pass states its options as fields. Calling it checks its precondition, runs it, checks its postcondition, and brings
`meta["val"]` of the result up to date. The base class holds every pass to three laws: its argument is unchanged,
the parameters of its result are shared or new as the class declares, and its result is a `PassResult`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra import pass_base

from gpd_fx.errors import PassError
from gpd_fx.passes.fingerprint import Fingerprint, Sharing
from gpd_fx.passes.shapes import refresh_values

IN_CODE_ONLY = "in code only"
"""Key in the metadata of a pass's field that no text can give."""


class PassResult(pass_base.PassResult):
    """The module after a pass, whether the pass changed it, and what it has to say.

    It is torch's own `PassResult` with notes, so `torch.fx.passes.infra.pass_manager.PassManager` takes it. As a tuple
    it has two entries, `graph_module` and `modified`.

    Attributes:
        graph_module: the module after the pass.
        modified: whether the pass changed anything.
        notes: what the pass reports, one line each.

    Example:
        >>> PassResult(graph, True, ("3 layers widened",)).notes
        ('3 layers widened',)
    """

    notes: tuple[str, ...] = ()

    def __new__(cls, graph_module: fx.GraphModule, modified: bool, notes: Sequence[str] = ()) -> PassResult:
        result = super().__new__(cls, graph_module, modified)
        assert isinstance(result, cls)
        result.notes = tuple(notes)
        return result


class Pass(ABC):
    """A transformation of an `fx.GraphModule`; options are dataclass fields. Call it to run it with its checks.

    A pass fits into `gpd_fx.passes.Pipeline` and into torch's `PassManager`.

    Attributes:
        parameters: what the class promises about the parameters of a result that is not the argument itself: "shared"
            (each is one of the argument's), "new" (none is), or "any" (no promise).
        changes_function: whether the result may compute another function than the argument. A pipeline with `verify`
            does not compare the values before and after such a pass.
    """

    parameters: ClassVar[Sharing] = "shared"
    changes_function: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name used in messages."""
        return type(self).__name__

    def admits(self, given: Any) -> None:
        """Raise `PassError` where the argument is of a type that this pass cannot take."""
        if not isinstance(given, fx.GraphModule):
            raise PassError(
                f"{self.name} takes an fx.GraphModule, got {type(given).__name__}; capture a model with "
                "gpd_fx.capture(model, example_inputs) first, or run the pass Normalize on it"
            )

    def sources(self, module: Any) -> tuple[Any, ...]:
        """What the result may share parameters with, and what has to stay as it is: the argument, and maybe more."""
        return (module,)

    def requires(self, module: fx.GraphModule) -> None:
        """Raise `PassError` where `module` is not one that this pass can take."""

    @abstractmethod
    def run(self, module: fx.GraphModule) -> PassResult:
        """Transform `module`; the given module is left as it was."""

    def ensures(self, module: fx.GraphModule) -> None:
        """Raise `PassError` where the result is not what this pass promises."""
        module.graph.lint()

    def __call__(self, module: nn.Module | ExportedProgram) -> PassResult:
        """Check the precondition, run, check the postcondition, and record the values of the result's nodes.

        Args:
            module: a `GraphModule`. `Normalize`, and a pipeline that begins with it, take other forms too.

        Raises:
            PassError: the argument is not of a type that the pass takes, a condition does not hold, or the pass broke
                what every pass promises: it changed its argument, or the parameters of its result are not as its class
                declares.
        """
        self.admits(module)
        given: Any = module
        before = Fingerprint(*self.sources(given))
        self.requires(given)
        result = self.run(given)
        if not isinstance(result, PassResult):  # pyright: ignore[reportUnnecessaryIsInstance]  users write passes
            raise PassError(f"{self.name}: run returned a {type(result).__name__}; return a PassResult")
        self.ensures(result.graph_module)
        changed = before.difference()
        if changed is not None:
            raise PassError(f"{self.name} changed its argument: {changed}; a pass has to work on a copy")
        before.check_sharing(result.graph_module, self.parameters, self.name)
        if result.modified:
            refresh_values(result.graph_module)
        return result
