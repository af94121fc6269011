"""Every trainable parameter of a dynamic teacher, and the step that turns them into the tensors of both networks.

    M = W + sum_b v_b[o] T_b(theta_b)      teacher: alpha[i] M      student: M[slice]

Branches may be left out of the teacher's tensors, for a graph that runs them beside the layer (`gpd_fx.apart`).

The keys of the state dict are `weights.<name>` for W and `branches.<name>.<branch>.<tensor>` for v and theta, where
<name> is the student's name of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpd_fx.composition.branches import (
    MAIN,
    BranchKind,
    Sizes,
    checked_terms,
    find_kind,
    random_tensor,
    resolve_branches,
)
from gpd_fx.composition.two_layers import (
    TOGETHER,
    ApartKeys,
    ApartSet,
    add_products,
    beside,
    group_slice,
    refusal,
)
from gpd_fx.errors import ArgumentError
from gpd_fx.kernels.compose.compose import (
    Layer,
    Network,
    Part,
    Product,
    Recipe,
    Term,
    compose,
)
from gpd_fx.kernels.compose.forms import obstacle
from gpd_fx.kernels.compose.layout import Slice
from gpd_fx.plan.parameter_plan import ParamPlan


class Tree(nn.Module):
    """A bare container: dotted names become state-dict keys, and no attribute of ours can clash with one."""

    @staticmethod
    def gather(places: Sequence[_Place]) -> list[Tensor]:
        """The tensors at some places; a parameter may have a stand-in, during a `functional_call` or for good."""
        found = [p.constant if p.tree is None else p.tree._parameters.get(p.name) for p in places]
        return [t if t is not None else getattr(p.tree, p.name) for t, p in zip(found, places, strict=True)]


def grow(tree: Tree, path: Sequence[str]) -> Tree:
    """The container at `path` below `tree`, made where it is missing."""
    for part in path:
        below = dict(tree.named_children()).get(part)
        if below is None:
            below = Tree()
            tree.add_module(part, below)
        assert isinstance(below, Tree)
        tree = below
    return tree


@dataclass(frozen=True)
class _Branch:
    """A branch of one parameter: where its tensors lie, and their names."""

    kind: BranchKind
    tree: Tree
    names: tuple[str, ...]


class _Place(NamedTuple):
    """Where a tensor is found each step: a parameter, or else a constant."""

    tree: Tree | None
    name: str
    constant: Tensor | None


class _Program(NamedTuple):
    """What a step does: compose this network, of tensors that are found there."""

    network: Network
    weights: tuple[_Place, ...]
    operands: tuple[_Place, ...]


@dataclass
class _Slot:
    """A parameter with its plan; what follows `branches` is made anew for its dtype, device and memory format.

    `parts` and `places` say of each branch what its terms are, and where their tensors are found.
    """

    plan: ParamPlan
    owner: Tree
    leaf: str
    sizes: Sizes | None
    branches: tuple[_Branch, ...]
    alpha: tuple[Tensor | None, ...] = ()
    slices: Sequence[Slice] = ()
    groups: Slice = None
    fixed: tuple[dict[str, Tensor], ...] = ()
    parts: tuple[tuple[Part, ...], ...] = ()
    places: tuple[tuple[_Place, ...], ...] = ()
    last: bool = False

    def prepare(self) -> None:
        """Make the constants anew from the plan's, which are exact."""
        weight = self.weight()
        plan = self.plan
        self.alpha = tuple(None if a is None else a.to(weight.dtype).to(weight.device) for a in plan.alpha)
        slices = (*plan.slices, group_slice(plan))
        *self.slices, self.groups = (s.to(weight.device) if isinstance(s, Tensor) else s for s in slices)
        if self.sizes is not None:
            sizes = self.sizes
            self.fixed = tuple(
                {name: t.to(weight.dtype).to(weight.device) for name, t in branch.kind.fixed(sizes).items()}
                for branch in self.branches
            )
        self.last = Recipe.of(Layer(weight.detach(), plan.kernel, (), (), (), plan.shape)).last
        found = [self._states(number) for number in range(len(self.branches))]
        self.parts = tuple(parts for parts, _ in found)
        self.places = tuple(places for _, places in found)

    def _states(self, number: int) -> tuple[tuple[Part, ...], tuple[_Place, ...]]:
        """What the terms of a branch are, and where their tensors are found."""
        branch = self.branches[number]
        theta, fixed = self._theta(number), self.fixed[number]
        known = {id(tensor): _Place(branch.tree, name, None) for name, tensor in theta.items()}
        known |= {id(tensor): _Place(None, name, tensor.flatten(0, 1)) for name, tensor in fixed.items()}
        terms = checked_terms(branch.kind, theta.pop("v"), theta | fixed)
        tensors = [tensor for term in terms for tensor in term.tensors]
        return tuple(Part.of(term) for term in terms), tuple(known[id(tensor)] for tensor in tensors)

    def _theta(self, number: int) -> dict[str, Tensor]:
        """The parameters of a branch with the dimension of groups."""
        assert self.sizes is not None
        branch, split = self.branches[number], (self.sizes.groups, -1)
        return {name: getattr(branch.tree, name).unflatten(0, split) for name in branch.names}

    def recipe(self, apart: ApartSet) -> Recipe:
        """What is known of the layer before the step."""
        plan = self.plan
        parts = [part for number in self._composed(apart) for part in self.parts[number]]
        return Recipe(
            plan.wide_shape,
            plan.kernel,
            tuple(parts),
            tuple([alpha is not None for alpha in self.alpha]),
            tuple([True if isinstance(part, Tensor) else part for part in self.slices]),
            plan.shape,
            self.last,
        )

    def operands(self, apart: ApartSet) -> list[_Place]:
        """Where its operands are found, in the order in which the operator takes them."""
        found = [_Place(None, "alpha", alpha) for alpha in self.alpha if alpha is not None]
        found += [_Place(None, "slice", part) for part in self.slices if isinstance(part, Tensor)]
        for number in self._composed(apart):
            found += self.places[number]
        return found

    def _composed(self, apart: ApartSet) -> list[int]:
        """Which of its branches do not run apart."""
        return [n for n, branch in enumerate(self.branches) if (self.plan.name, branch.kind.name) not in apart]

    def weight(self) -> Tensor:
        """The parameter itself, or what stands in for it during a `functional_call`."""
        return getattr(self.owner, self.leaf)

    def terms(self, number: int) -> tuple[Term, ...]:
        """What one of the branches adds."""
        theta = self._theta(number)
        return self.branches[number].kind.terms(theta.pop("v"), theta | self.fixed[number])

    def layer(self, apart: ApartSet = TOGETHER) -> Layer:
        """What `compose` takes: the parameter, its terms but those that run apart, and its constants."""
        plan = self.plan
        terms = [term for number in self._composed(apart) for term in self.terms(number)]
        return Layer(self.weight(), plan.kernel, tuple(terms), self.alpha, tuple(self.slices), plan.shape)

    def products(self, apart: ApartSet) -> dict[str, Product]:
        """The branches that run apart, by name."""
        found: dict[str, Product] = {}
        for number, branch in enumerate(self.branches):
            if (self.plan.name, branch.kind.name) in apart:
                (term,) = self.terms(number)
                assert isinstance(term, Product)
                found[branch.kind.name] = term
        return found


class Composition(nn.Module):
    """The parameters of a dynamic teacher; calling it gives the tensors of both networks by the student's names.

    Args:
        plans: one a parameter of the student, with its canonical name.
        tensors: the student's values by that name; they are copied.
        requires_grad: by the same name; a frozen weight gets no branches. A missing name means True.
        branches: what `resolve_branches` takes.
        seed: of the random branch tensors; each depends on the seed, the parameter's name and the branch, not on order.
    """

    def __init__(
        self,
        plans: Sequence[ParamPlan],
        tensors: Mapping[str, Tensor],
        requires_grad: Mapping[str, bool],
        branches: str | Sequence[str] | None = "orepa",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.skipped: dict[str, dict[str, str]] = {}
        self.weights = Tree()
        self.branches = Tree()
        self._programs: dict[tuple[ApartSet, bool, bool], _Program] = {}
        kinds = [find_kind(name) for name in resolve_branches(branches) if name != MAIN]
        self._slots = [self._add(plan, tensors, requires_grad, kinds, seed) for plan in plans]
        self.refresh()
        self.register_load_state_dict_post_hook(_after_load)  # assign=True may change dtypes

    def _add(
        self,
        plan: ParamPlan,
        tensors: Mapping[str, Tensor],
        requires_grad: Mapping[str, bool],
        kinds: Sequence[BranchKind],
        seed: int,
    ) -> _Slot:
        tensor = tensors[plan.name].detach()
        if tuple(tensor.shape) != plan.shape:
            raise ArgumentError(f"{plan.name} has shape {tuple(tensor.shape)}, its plan was made for {plan.shape}")
        wide = plan.widen(tensor)
        wide = wide.clone() if wide is tensor else wide
        trainable = requires_grad.get(plan.name, True) and wide.is_floating_point()
        *path, leaf = plan.name.split(".")
        owner = grow(self.weights, path)
        owner.register_parameter(leaf, nn.Parameter(wide, requires_grad=trainable))
        slot = _Slot(plan, owner, leaf, None, ())
        if plan.kernel is None:
            return slot
        slot.sizes = Sizes.of(plan.kernel, plan.wide_shape)
        fitting: list[_Branch] = []
        for kind in kinds:
            reason = kind.fits(slot.sizes) if trainable else "the weight is frozen (requires_grad is False)"
            if reason is not None:
                self.skipped.setdefault(plan.name, {})[kind.name] = reason
                continue
            tree = grow(self.branches, [*path, leaf, kind.identifier])
            tree.register_parameter("v", nn.Parameter(wide.new_zeros(slot.sizes.groups * slot.sizes.outputs)))
            theta = kind.theta(slot.sizes)
            for name, init in theta.items():
                # without the dimension of groups: `to(memory_format=channels_last)` fails on five dimensions
                values = random_tensor(f"{seed}/{plan.name}/{kind.name}/{name}", init, wide).flatten(0, 1)
                tree.register_parameter(name, nn.Parameter(values))
            fitting.append(_Branch(kind, tree, ("v", *theta)))
        slot.branches = tuple(fitting)
        return slot

    @property
    def plans(self) -> tuple[ParamPlan, ...]:
        """The plans, in the order given."""
        return tuple(slot.plan for slot in self._slots)

    def branch_names(self, name: str) -> tuple[str, ...]:
        """The branches that the parameter called `name` has; empty where it is no conv or linear weight."""
        for slot in self._slots:
            if slot.plan.name == name:
                return () if slot.sizes is None else (MAIN, *(branch.kind.name for branch in slot.branches))
        raise ArgumentError(f"there is no parameter {name!r} in this composition")

    def left_by_kernels(self) -> dict[str, str]:
        """The parameters that the Triton kernels leave to torch's ops, each with the reason."""
        recipes = {slot.plan.name: slot.recipe(TOGETHER) for slot in self._slots}
        reasons = {name: obstacle(recipe) for name, recipe in recipes.items() if not recipe.idle}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def layers(self) -> list[Layer]:
        """What `compose` takes, in the order of the plans."""
        return [slot.layer() for slot in self._slots]

    def products(self) -> dict[tuple[str, str], tuple[int, str | None]]:
        """The branches that are a product of two kernels, as (parameter, branch).

        With each its inner width, and why it cannot run apart, or None where it can.
        """
        found: dict[tuple[str, str], tuple[int, str | None]] = {}
        for slot in self._slots:
            for number, branch in enumerate(slot.branches):
                terms = slot.terms(number)
                if len(terms) == 1 and isinstance(terms[0], Product):
                    found[slot.plan.name, branch.kind.name] = (terms[0].point.shape[1], refusal(slot.plan))
        return found

    def forward(self, apart: ApartSet = TOGETHER) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The teacher's tensors, alpha included, and the student's, from one composition.

        The teacher's lack the branches that are to run apart; what those need lies among them, under `ApartKeys`.
        """
        teacher, student = self._composed(apart, True, True)
        return self._named(teacher) | self._beside(apart), self._whole(student, apart)

    @torch.no_grad()
    def one_by_one(self) -> Iterator[tuple[ParamPlan, Tensor, Tensor]]:
        """Each plan with the teacher's and the student's tensor, composed alone."""
        for slot in self._slots:
            wide, narrow = compose([slot.layer()])
            yield slot.plan, wide[0], narrow[0]

    def wide_parameters(self) -> Iterator[tuple[ParamPlan, Tensor]]:
        """Each plan with its parameter, without branches."""
        return ((slot.plan, slot.weight()) for slot in self._slots)

    def teacher(self, apart: ApartSet = TOGETHER) -> dict[str, Tensor]:
        """Only the teacher's tensors, alpha included."""
        return self._named(self._composed(apart, True, False)[0]) | self._beside(apart)

    def student(self, apart: ApartSet = TOGETHER) -> dict[str, Tensor]:
        """Only the student's tensors."""
        return self._whole(self._composed(apart, False, True)[1], apart)

    def _composed(self, apart: ApartSet, teacher: bool, student: bool) -> tuple[list[Tensor], list[Tensor]]:
        """As `compose(self.layers())`, with all worked out before that does not change from step to step."""
        key = (apart, teacher, student)
        program = self._programs.get(key)
        if program is None:
            network = Network.of([slot.recipe(apart) for slot in self._slots], teacher, student)
            operands = [place for n in network.taken for place in self._slots[n].operands(apart)]
            weights = [_Place(slot.owner, slot.leaf, None) for slot in self._slots]
            program = self._programs[key] = _Program(network, tuple(weights), tuple(operands))
        return program.network.run(Tree.gather(program.weights), Tree.gather(program.operands))

    def _beside(self, apart: ApartSet) -> dict[str, Tensor]:
        """What the branches that run apart need in the teacher."""
        found: dict[str, Tensor] = {}
        for slot in self._slots if apart else ():
            for branch, term in slot.products(apart).items():
                found |= beside(term, slot.alpha, ApartKeys.of(slot.plan.name, branch))
        return found

    def _whole(self, narrow: Sequence[Tensor], apart: ApartSet) -> dict[str, Tensor]:
        """The student's tensors, with the branches that were left out of them."""
        tensors = self._named(narrow)
        for slot in self._slots if apart else ():
            products = list(slot.products(apart).values())
            if products:
                whole = add_products(slot.layer(apart), tensors[slot.plan.name], products, slot.groups)
                tensors[slot.plan.name] = whole
        return tensors

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The wide kernels M, before alpha: new tensors without a gradient."""
        layers = [replace(layer, alpha=()) for layer in self.layers()]
        wide, _ = compose(layers, student=False)
        return self._named([m.clone() if m is layer.weight else m for m, layer in zip(wide, layers, strict=True)])

    def extra_repr(self) -> str:
        extra = sum(len(slot.branches) for slot in self._slots)
        return f"{len(self._slots)} parameters, {extra} extra branches"

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return {slot.plan.name: tensor for slot, tensor in zip(self._slots, tensors, strict=True)}

    def refresh(self) -> None:
        """Bring the constants to the dtype and device of the parameters; done after every move and load."""
        self._programs.clear()
        with torch.device("cpu"):  # whatever the caller's default is; they then move to their parameter's device
            for slot in self._slots:
                slot.prepare()

    def _apply(self, fn: Any, recurse: bool = True) -> Composition:
        super()._apply(fn, recurse)
        self.refresh()
        return self


def _after_load(module: nn.Module, incompatible: object) -> None:
    del incompatible
    assert isinstance(module, Composition)
    module.refresh()
