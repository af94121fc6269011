"""Every trainable parameter of a dynamic teacher, and the step that turns them into the tensors of both networks.

    M = W + sum_b v_b[o] T_b(theta_b)      teacher: alpha[i] M      student: M[slice]

Branches may be left out of the teacher's tensors, for a graph that runs them beside the layer (`gpd_fx.apart`).

The keys of the state dict are `weights.<name>` for W and `branches.<name>.<branch>.<tensor>` for v and theta, where
<name> is the student's name of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gpd_fx.apart import TOGETHER, ApartKeys, ApartSet, add_products, beside, group_slice, refusal
from gpd_fx.branches import MAIN, BranchKind, Sizes, find_kind, random_tensor, resolve_branches
from gpd_fx.errors import ArgumentError
from gpd_fx.kernels.compose import Layer, Product, Term, compose
from gpd_fx.layout import ParamPlan, Slice


class Tree(nn.Module):
    """A bare container: dotted names become state-dict keys, and no attribute of ours can clash with one."""


def grow(tree: nn.Module, path: Sequence[str]) -> nn.Module:
    """The container at `path` below `tree`, made where it is missing."""
    for part in path:
        below = dict(tree.named_children()).get(part)
        if below is None:
            below = Tree()
            tree.add_module(part, below)
        tree = below
    return tree


@dataclass(frozen=True)
class _Branch:
    """A branch of one parameter: where its tensors lie, and their names."""

    kind: BranchKind
    tree: nn.Module
    names: tuple[str, ...]


@dataclass
class _Slot:
    """A parameter with its plan; `alpha`, `slices`, `groups` and `fixed` follow the parameter's dtype and device."""

    plan: ParamPlan
    owner: nn.Module
    leaf: str
    sizes: Sizes | None
    branches: tuple[_Branch, ...]
    alpha: tuple[Tensor | None, ...] = ()
    slices: Sequence[Slice] = ()
    groups: Slice = None
    fixed: tuple[dict[str, Tensor], ...] = ()

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

    def weight(self) -> Tensor:
        """The parameter itself, or what stands in for it during a `functional_call`."""
        return getattr(self.owner, self.leaf)

    def terms(self, number: int) -> tuple[Term, ...]:
        """What one of the branches adds."""
        assert self.sizes is not None
        branch, split = self.branches[number], (self.sizes.groups, -1)
        theta: dict[str, Tensor] = {n: getattr(branch.tree, n).unflatten(0, split) for n in branch.names}
        return branch.kind.terms(theta.pop("v"), {**theta, **self.fixed[number]})

    def layer(self, apart: ApartSet = TOGETHER) -> Layer:
        """What `compose` takes: the parameter, its terms but those that run apart, and its constants."""
        plan = self.plan
        terms: list[Term] = []
        for number, branch in enumerate(self.branches):
            if (plan.name, branch.kind.name) not in apart:
                terms += self.terms(number)
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
        layers = [slot.layer(apart) for slot in self._slots]
        teacher, student = compose(layers)
        return self._named(teacher) | self._beside(apart), self._whole(layers, student, apart)

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
        layers = [slot.layer(apart) for slot in self._slots]
        return self._named(compose(layers, student=False)[0]) | self._beside(apart)

    def student(self, apart: ApartSet = TOGETHER) -> dict[str, Tensor]:
        """Only the student's tensors."""
        layers = [slot.layer(apart) for slot in self._slots]
        return self._whole(layers, compose(layers, teacher=False)[1], apart)

    def _beside(self, apart: ApartSet) -> dict[str, Tensor]:
        """What the branches that run apart need in the teacher."""
        found: dict[str, Tensor] = {}
        for slot in self._slots if apart else ():
            for branch, term in slot.products(apart).items():
                found |= beside(term, slot.alpha, ApartKeys.of(slot.plan.name, branch))
        return found

    def _whole(self, layers: Sequence[Layer], narrow: Sequence[Tensor], apart: ApartSet) -> dict[str, Tensor]:
        """The student's tensors, with the branches that were left out of them."""
        tensors = self._named(narrow)
        for slot, layer in zip(self._slots, layers, strict=True) if apart else ():
            products = list(slot.products(apart).values())
            if products:
                tensors[slot.plan.name] = add_products(layer, tensors[slot.plan.name], products, slot.groups)
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
