"""The dynamic teacher: two wide graphs and the student, over one set of parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gpd_fx.capture.example_inputs import check_inputs
from gpd_fx.composition.composition import Composition, Tree
from gpd_fx.composition.two_layers import TOGETHER, ApartKeys, ApartSet
from gpd_fx.errors import ArgumentError
from gpd_fx.fxtools.attributes import graphs_of, put, with_graph
from gpd_fx.fxtools.fake_tensors import shapes_of
from gpd_fx.fxtools.module_calls import call_with, detached_copies, places_of, recurrent_layers
from gpd_fx.fxtools.module_modes import set_mode
from gpd_fx.fxtools.name_patterns import some
from gpd_fx.fxtools.regions import has_autocast, restored_autocast
from gpd_fx.fxtools.torch_internals import copy_graph, enter_autocast
from gpd_fx.passes.apart import Apart, Beside, obstacle, uses_of
from gpd_fx.passes.branch import insert_composition
from gpd_fx.passes.fuse import FuseDepthwise, pairs_of
from gpd_fx.report.expansion_report import ExpansionReport
from gpd_fx.teacher.branch_cost import (
    BranchSchedule,
    Choice,
    ProductSizes,
    Use,
)
from gpd_fx.teacher.fusion import (
    Fused,
    FusionReport,
    synchronised,
)

Role = Literal["teacher", "student", "both"]


class DynamicTeacher(nn.Module):
    """What `gpd_fx.expand` returns: a wide network that shares its parameters with the student inside it.

    Every trainable tensor lies in `composition`. A call composes the kernels of both networks once, then runs the wide
    graph of the current mode, the student, or both. The student is the user's own module, called with the tensors that
    the composition derives for it, so it keeps its class, its buffers and its behaviour in both modes.

    Attributes:
        composition: all parameters, and what makes both networks' tensors of them.
        wide_buffers: the teacher's buffers (its batch-norm statistics), by the student's names.
        skeleton: the user's module without parameters, with the student's buffers.
        graphs: the wide graphs, "train_mode" and "eval_mode" (a module has no room for names such as "train").
        recipe: the arguments of `expand`, ready for JSON.
        example: positional and keyword example inputs that the graphs were captured with.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        graphs: Mapping[str, fx.GraphModule],
        composition: Composition,
        wide_buffers: Tree,
        aliases: Mapping[str, str],
        trainable: Mapping[str, bool],
        recipe: dict[str, Any],
        example: tuple[tuple[Any, ...], dict[str, Any]],
        report: ExpansionReport,
    ) -> None:
        super().__init__()
        self.composition = composition
        self.wide_buffers = wide_buffers
        self.skeleton = skeleton
        self.graphs = nn.ModuleDict({f"{key}_mode": graph for key, graph in graphs.items()})
        self.recipe = recipe
        self.example = example
        self.aliases = dict(aliases)  # every name of a student's parameter or buffer -> its canonical name
        self.trainable = dict(trainable)  # canonical name -> requires_grad, as it was in the given model
        self._report = report
        self._places = places_of(skeleton, aliases)
        self._recurrent = recurrent_layers(skeleton)
        self._autocast = {key for key, graph in graphs.items() if has_autocast(graph)}
        feeds = {key: {str(n.target) for n in g.graph.find_nodes(op="get_attr")} for key, g in graphs.items()}
        self._apart = TOGETHER
        self._beside: dict[str, dict[str, str]] = {key: {} for key in graphs}  # places in a graph -> `ApartKeys`
        self._feeds = {key: {t: aliases[t] for t in sorted(feeds[key]) if t in aliases} for key in feeds}
        self._fuses = False
        self._plain_graphs = {key: copy_graph(graph.graph)[0] for key, graph in graphs.items()}
        self._modes: dict[str, list[tuple[nn.Module, bool]]] = {}  # the parts of the skeleton, as they were captured
        for key in graphs:
            set_mode(skeleton, key == "train", self.frozen)
            self._modes[key] = [(part, part.training) for part in skeleton.modules()]

    @property
    def frozen(self) -> tuple[str, ...]:
        """The submodules that stay in eval mode while the networks train, as they did in the given model."""
        return tuple(self.recipe["frozen"])

    def train(self, mode: bool = True) -> DynamicTeacher:
        """Set the mode of both networks; submodules in `frozen` stay in eval mode."""
        super().train(mode)
        set_mode(self.skeleton, mode, self.frozen)
        return self

    def forward(self, *args: Any, role: Role = "teacher", **kwargs: Any) -> Any:
        """Run one network or both on the same inputs, which are those of the student.

        Args:
            args: positional inputs of the student.
            role: "teacher", "student", or "both" for the pair (teacher's output, student's output).
            kwargs: keyword inputs of the student.

        Raises:
            ArgumentError: an unknown role.
        """
        if role == "teacher":
            return self.run_teacher(self.composition.teacher(self._apart), *args, **kwargs)
        if role == "student":
            return self.run_student(self.composition.student(self._apart), *args, **kwargs)
        if role == "both":
            wide, narrow = self.composition(self._apart)
            return self.run_teacher(wide, *args, **kwargs), self.run_student(narrow, *args, **kwargs)
        raise ArgumentError(f"role is {role!r}; it must be 'teacher', 'student' or 'both'")

    def student(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output; the same as `forward(..., role="student")`."""
        return self(*args, role="student", **kwargs)

    def both(self, *args: Any, **kwargs: Any) -> Any:
        """(teacher's output, student's output) from one composition; the same as `forward(..., role="both")`."""
        return self(*args, role="both", **kwargs)

    def run_teacher(self, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the wide graph of the current mode with composed tensors, by canonical name.

        While branches run apart, the tensors are those of `composition.teacher(self.apart)`.

        Raises:
            InputError: the inputs are unlike those that the graph was captured with.
            ArgumentError: the tensors were composed for another schedule.
        """
        key = "train" if self.training else "eval"
        graph = self.graphs[f"{key}_mode"]
        self._check_parts()
        if not torch.compiler.is_compiling():  # what is compiled has its own guards
            assert isinstance(graph, fx.GraphModule)
            check_inputs(graph, args, kwargs)
        buffers = dict(self.wide_buffers.named_buffers())
        state = {t: tensors[name] if name in tensors else buffers[name] for t, name in self._feeds[key].items()}
        for place, name in self._beside[key].items():
            if name not in tensors:
                raise ArgumentError(f"the tensors lack {name!r}; compose them by composition.teacher(teacher.apart)")
            state[place] = tensors[name]
        framed = key in self._autocast and not torch.compiler.is_compiling()
        with restored_autocast() if framed else contextlib.nullcontext():
            return torch.func.functional_call(graph, state, args, kwargs, tie_weights=False)

    def run_student(self, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the student's module with composed tensors, by canonical name."""
        self._check_parts()
        state = {place: tensors[name] for place, name in self._places.items() if name in tensors}
        return call_with(self.skeleton, state, args, kwargs, self._recurrent)

    def _check_parts(self) -> None:
        """Refuse a skeleton whose parts are others, or in other modes, than the wide graphs were captured with."""
        if torch.compiler.is_compiling():  # what is compiled has its own guards
            return
        captured = self._modes["train" if self.training else "eval"]
        now = list(self.skeleton.named_modules())
        if len(now) != len(captured) or any(part is not old for (_, part), (old, _) in zip(now, captured, strict=True)):
            raise ArgumentError(
                "modules of the student were added, removed or replaced after expand, which the wide graphs cannot "
                "follow; change the model first, then expand it"
            )
        for (path, part), (_, was) in zip(now, captured, strict=True):
            if part.training != was:
                mode, other = ("train", "eval") if part.training else ("eval", "train")
                raise ArgumentError(
                    f"submodule {path!r} is in {mode} mode, the wide graphs were captured with it in {other} mode, and "
                    "only the student would follow; set the modes of parts before expand (model.train(), then "
                    "part.eval()), and switch the teacher as a whole by teacher.train() and teacher.eval()"
                )

    def as_graph(self, mode: Literal["train", "eval"] = "eval") -> fx.GraphModule:
        """The teacher alone, as one captured graph that passes can take: its weights come from a `composition`.

        It shares parameters and buffers with this module. `gpd_fx.passes.Merge()` turns it into a plain wide model.
        """
        graph = self._plain(mode)
        buffers = dict(self.wide_buffers.named_buffers())
        names: dict[str, tuple[str, ...]] = {}
        for target, name in self._feeds[mode].items():
            if name in buffers:
                put(graph, target, buffers[name], like=buffers[name])
            else:
                names[name] = (*names.get(name, ()), target)
        graph.add_submodule("composition", self.composition)
        insert_composition(graph, names)
        graph.recompile()
        return graph

    @property
    def apart(self) -> ApartSet:
        """The branches that run apart, as (parameter, branch)."""
        return self._apart

    def schedule(self, *args: Any, **kwargs: Any) -> BranchSchedule:
        """Choose, for inputs of this size, which branches are composed and which run apart, by their cost.

        Both ways are exact, so this changes the speed and the memory of a step, and nothing else. It holds for both
        modes until the next call of this or of `run_apart`, and is not saved.

        Args:
            args: inputs as in training; only their shapes count, and tensors on the meta device will do.
            kwargs: keyword inputs likewise.

        Raises:
            InputError: the inputs are unlike those that the graphs were captured with.
        """
        given, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        plains = {mode: self._plain(mode) for mode in self._feeds}
        plain = plains["train"]
        check_inputs(plain, given, kwargs)
        plans = {plan.name: plan for plan in self.composition.plans}
        wide = {plan.name: weight for plan, weight in self.composition.wide_parameters()}
        wide |= self.wide_buffers.named_buffers()
        shapes = shapes_of(plain, {t: wide[n] for t, n in self._feeds["train"].items()}, given, kwargs)
        choices: list[Choice] = []
        for (name, branch), (inner, refusal) in self.composition.products().items():
            product = ProductSizes.of(plans[name], inner)
            reason = refusal or self._obstacle(plains, name)
            if reason is not None:
                choices.append(Choice(name, branch, product.composed(), None, "composed", reason))
                continue
            nodes = [node for _, node in self._uses(plains, "train", name)]
            uses = [Use.of(shapes[n.all_input_nodes[0].name], shapes[n.name], product) for n in nodes]
            choices.append(Choice.cheaper(name, branch, product, uses))
        found = BranchSchedule(tuple(choices))
        self.run_apart(found.apart)
        return found

    def run_apart(self, branches: Iterable[tuple[str, str]]) -> None:
        """Let exactly these branches run apart, each given as (parameter, branch): none with an empty list.

        Raises:
            ArgumentError: there is no such branch, or it cannot run apart.
        """
        chosen = frozenset(branches)
        known = self.composition.products()
        plains = {mode: self._plain(mode) for mode in self._feeds}
        for name, branch in sorted(chosen):
            if (name, branch) not in known:
                among = f"; there are {some([f'{n} {b}' for n, b in known])}" if known else ""
                raise ArgumentError(f"run_apart: {name!r} has no product branch {branch!r}{among}")
            reason = known[name, branch][1] or self._obstacle(plains, name)
            if reason is not None:
                raise ArgumentError(f"run_apart: branch {branch!r} of {name!r} cannot run apart: {reason}")
        self._apart = chosen
        self._rewrite()

    def fuse(self, on: bool = True) -> FusionReport:
        """Run each depthwise conv of the wide graphs as one op with the batch norm behind it, where nothing is between.

        The results are the same. On CUDA the op is a few Triton kernels that never write the conv's output, which takes
        fewer passes over the activations and less memory (see `gpd_fx.kernels.depthwise`); elsewhere it is the two ops
        that it stands for. The student, which is a module, keeps its two ops. The choice holds for both modes until
        the next call, and is not saved.

        Args:
            on: False runs all of them as two ops again.
        """
        self._fuses = on
        return FusionReport(tuple(self._rewrite()))

    def _rewrite(self) -> list[Fused]:
        """Make the running graphs of both modes from the plain ones, by the passes that were chosen.

        Returns:
            A row for each depthwise conv and mode, where convs are to be fused.
        """
        wide = {plan.name: weight for plan, weight in self.composition.wide_parameters()}
        rows: list[Fused] = []
        for mode, feeds in self._feeds.items():
            running = self.graphs[f"{mode}_mode"]
            assert isinstance(running, fx.GraphModule)
            places: dict[str, str] = {}
            added: dict[str, tuple[Beside, ...]] = {}
            for target, name in feeds.items():
                for number, (owner, branch) in enumerate(sorted(self._apart)):
                    if owner == name:
                        keys = ApartKeys.of(name, branch)
                        paths = ApartKeys(*(f"_gpd_apart{number}_{part}" for part in keys._fields))
                        places |= zip(paths, keys, strict=True)
                        added[target] = (*added.get(target, ()), Beside(*paths, taps=prod(wide[name].shape[2:])))
            plain = self._plain(mode)
            for path in places:
                put(plain, path, None, like=None)
                put(running, path, None, like=torch.empty(0))
            made = Apart(added)(plain).graph_module
            if self._fuses:
                for target, name in feeds.items():
                    if name in wide:
                        put(made, target, wide[name], like=wide[name])
                synced = synchronised(self.skeleton)
                but = {t: "its batch norm is synchronised" for t, name in feeds.items() if name in synced}
                for pair in pairs_of(made, but):
                    runs, reason = ("fused", f"with {pair.norm}") if pair.reason is None else ("apart", pair.reason)
                    rows.append(Fused(feeds[pair.weight], mode, runs, reason))
                made = FuseDepthwise(but)(made).graph_module
            running.graph = made.graph
            self._beside[mode] = places
        return rows

    def _plain(self, mode: str) -> fx.GraphModule:
        """The graph of a mode as it was widened: all branches composed, and every conv one op."""
        source = self.graphs[f"{mode}_mode"]
        return with_graph(source, copy_graph(self._plain_graphs[mode])[0])

    def _uses(self, plains: Mapping[str, fx.GraphModule], mode: str, name: str) -> list[tuple[fx.Node, fx.Node]]:
        """The nodes of a parameter in the graph of a mode, each with an op that takes it."""
        targets = [target for target, owner in self._feeds[mode].items() if owner == name]
        return [node for target in targets for node in uses_of(plains[mode].graph, target)]

    def _obstacle(self, plains: Mapping[str, fx.GraphModule], name: str) -> str | None:
        """What in the graphs keeps the branches of a parameter from running apart."""
        uses = [use for mode in self._feeds for use in self._uses(plains, mode, name)]
        found = [obstacle(*use) for use in uses]
        return next((reason for reason in found if reason is not None), None) if uses else "no op uses it"

    def report(self) -> ExpansionReport:
        """What the expansion did: widths, coverage, what stayed unwidened and why, costs."""
        return self._report

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicTeacher:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo |= detached_copies(self.skeleton)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(
            "a dynamic teacher cannot be pickled, since its graphs do not survive that; use gpd_fx.save(teacher, path) "
            "and gpd_fx.load(path, model), or its state_dict()"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> DynamicTeacher:
        """Move or cast; tensors that the graphs create follow the parameters."""
        before = _home(self)
        super()._apply(fn, recurse)
        after = _home(self)
        if before != after:
            moves = dict(zip(before, after, strict=True))
            for graph in self.graphs.values():
                for module in graphs_of(graph):
                    _rehome(module.graph, moves)
                    module.recompile()
            for plain in self._plain_graphs.values():
                _rehome(plain, moves)
        return self

    def extra_repr(self) -> str:
        return f"ratio={self.recipe['ratio']}, coverage={self._report.coverage:.4f}"


def _home(module: nn.Module) -> tuple[torch.device, torch.dtype] | tuple[()]:
    """Where the floating parameters are, and their dtype."""
    return next(((p.device, p.dtype) for p in module.parameters() if p.is_floating_point()), ())


def _rehome(graph: fx.Graph, moves: Mapping[Any, Any]) -> None:
    """Replace devices and dtypes among the arguments of a graph's nodes."""

    def move(value: Any) -> Any:
        return moves.get(value, value) if isinstance(value, torch.device | torch.dtype) else value

    device = next((new.type for old, new in moves.items() if isinstance(old, torch.device)), None)
    for node in graph.nodes:
        node.args = pytree.tree_map(move, node.args)
        if node.target is enter_autocast:
            node.args = (device, *node.args[1:])
        node.kwargs = pytree.tree_map(move, dict(node.kwargs))
