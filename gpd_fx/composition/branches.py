"""The extra linear branches of a conv or linear weight: what each adds to the kernel, and where it fits.

Every branch is a small linear network in parallel with the layer. It is described by the kernel it adds, not run as a
sequence of convs: the layer stays one conv of its own shape. So stride, padding, padding mode and dilation do not
matter, and the result is exact at the borders, where padded convs run one after another are not.

A branch adds v[o] * T(theta) to the kernel (g, o, i, *k). Theta is random, v starts at zero: nothing changes at the
start, and v has a gradient from the first step. Random entries are scaled so that T maps inputs of unit variance to
outputs of about unit variance.

To add a branch: a `BranchKind` with an entry in `KINDS`, or one that `register_branch` is given. It says where it fits,
which tensors it owns, and which terms of `gpd_fx.kernels.compose` it is.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gpd_fx.errors import ArgumentError
from gpd_fx.fxtools.unknown_names import did_you_mean
from gpd_fx.kernels.compose.compose import (
    InputFilter,
    Line,
    OutputFilter,
    Product,
    Term,
    tap,
)
from gpd_fx.kernels.compose.layout import KernelLayout
from gpd_fx.kernels.compose.terms import TERMS

MAIN = "kxk"
"""The original weight: always there, without a scale."""
FULL = "full"
"""In the place of an inner width: as wide as the layer's inputs."""


class Sizes(NamedTuple):
    """The canonical sizes of a wide kernel: groups, outputs and inputs of a group, kernel."""

    groups: int
    outputs: int
    inputs: int
    kernel: tuple[int, ...]

    @staticmethod
    def of(layout: KernelLayout, shape: Sequence[int]) -> Sizes:
        """The sizes of a weight stored with `shape`."""
        groups, outputs, inputs, *kernel = layout.canonical_shape(shape)
        return Sizes(groups, outputs, inputs, tuple(kernel))

    @property
    def taps(self) -> int:
        """How many taps the kernel has; 1 for a linear layer."""
        return math.prod(self.kernel)

    @property
    def depthwise(self) -> bool:
        """Whether each group has one input and one output."""
        return self.outputs == self.inputs == 1


class Init(NamedTuple):
    """The shape of a random tensor, and how many of its products are summed into one value."""

    shape: tuple[int, ...]
    fan_in: int


@dataclass(frozen=True)
class BranchKind(ABC):
    """One kind of branch; `width` is its inner width where it has one.

    None stands for an eighth of the narrower side, `FULL` for the number of inputs of a group.
    """

    name: ClassVar[str]
    has_width: ClassVar[bool] = False
    width: int | str | None = None

    @property
    def identifier(self) -> str:
        """The name as part of a state-dict key."""
        plain = self.name.replace("-", "_").replace("+", "_")
        return f"b{plain}" if plain[0].isdigit() else plain

    def inner(self, sizes: Sizes) -> int:
        """The inner width for a kernel of `sizes`."""
        if isinstance(self.width, str):
            return sizes.inputs
        return self.width or max(1, min(sizes.outputs, sizes.inputs) // 8)

    @abstractmethod
    def fits(self, sizes: Sizes) -> str | None:
        """None, or why the branch adds nothing to a kernel of `sizes`."""

    @abstractmethod
    def theta(self, sizes: Sizes) -> dict[str, Init]:
        """The random trainable tensors; the first dimension is the groups', merged with the next in the parameter."""

    def fixed(self, sizes: Sizes) -> dict[str, Tensor]:
        """The tensors that are not trained, float64 on the CPU."""
        del sizes
        return {}

    @abstractmethod
    def terms(self, scale: Tensor, theta: Mapping[str, Tensor]) -> tuple[Term, ...]:
        """What the branch adds, from its scale (g, o) and its tensors, fixed ones included."""


def _point(sizes: Sizes) -> dict[str, Init]:
    return {"point": Init((sizes.groups, sizes.outputs, sizes.inputs), sizes.inputs)}


def _larger_than_a_tap(sizes: Sizes) -> str | None:
    if sizes.kernel:
        return None if sizes.taps > 1 else "the kernel has one tap"
    return "a linear layer has no kernel axes"


class _PointThenFilter(BranchKind):
    """A 1x1 conv followed by a fixed depthwise filter."""

    def fits(self, sizes: Sizes) -> str | None:
        return _larger_than_a_tap(sizes)

    def theta(self, sizes: Sizes) -> dict[str, Init]:
        return _point(sizes)

    @abstractmethod
    def filters(self, sizes: Sizes) -> Tensor:
        """The filters, broadcastable to (g, o, *k)."""

    def fixed(self, sizes: Sizes) -> dict[str, Tensor]:
        return {"filters": self.filters(sizes).expand(sizes.groups, sizes.outputs, *sizes.kernel).contiguous()}

    def terms(self, scale: Tensor, theta: Mapping[str, Tensor]) -> tuple[Term, ...]:
        return (OutputFilter(scale, theta["point"], theta["filters"]),)


class Pointwise(_PointThenFilter):
    """A 1x1 conv: one tap, at the centre of the kernel."""

    name = "1x1"

    def filters(self, sizes: Sizes) -> Tensor:
        delta = torch.zeros(sizes.kernel, dtype=torch.float64)
        delta[tuple(tap(n) for n in sizes.kernel)] = 1.0
        return delta


class PointwiseAverage(_PointThenFilter):
    """A 1x1 conv, then the mean over the kernel's window."""

    name = "1x1-avg"

    def filters(self, sizes: Sizes) -> Tensor:
        return torch.full(sizes.kernel, 1.0 / sizes.taps, dtype=torch.float64)


class Prior(_PointThenFilter):
    """A 1x1 conv, then one cosine filter an output channel.

    The filters are the orthonormal DCT-II basis but its mean, which `1x1-avg` has, dealt out from low to high
    frequency and over again.
    """

    name = "prior"

    def filters(self, sizes: Sizes) -> Tensor:
        table = cosine_filters(sizes.kernel)
        channels = torch.arange(sizes.groups * sizes.outputs) % len(table)
        return table[channels].reshape(sizes.groups, sizes.outputs, *sizes.kernel)


class PointwiseKernel(BranchKind):
    """A 1x1 conv to a few channels, then a conv of the full size."""

    name = "1x1-kxk"
    has_width = True

    def fits(self, sizes: Sizes) -> str | None:
        return _larger_than_a_tap(sizes)

    def theta(self, sizes: Sizes) -> dict[str, Init]:
        g, o, i, kernel = sizes
        c = self.inner(sizes)
        return {"point": Init((g, c, i), i), "kernel": Init((g, o, c, *kernel), c * sizes.taps)}

    def terms(self, scale: Tensor, theta: Mapping[str, Tensor]) -> tuple[Term, ...]:
        return (Product(scale, theta["point"], theta["kernel"]),)


class DepthwiseSeparable(BranchKind):
    """A depthwise conv, then a 1x1 conv."""

    name = "dwsep"

    def fits(self, sizes: Sizes) -> str | None:
        if sizes.depthwise:
            return "a depthwise kernel is already one filter a channel"
        return _larger_than_a_tap(sizes)

    def theta(self, sizes: Sizes) -> dict[str, Init]:
        return {"filters": Init((sizes.groups, sizes.inputs, *sizes.kernel), sizes.taps), **_point(sizes)}

    def terms(self, scale: Tensor, theta: Mapping[str, Tensor]) -> tuple[Term, ...]:
        return (InputFilter(scale, theta["point"], theta["filters"]),)


class Lines(BranchKind):
    """The sum of one conv along each kernel axis, through the centre: 1xk and kx1."""

    name = "1xk+kx1"

    def fits(self, sizes: Sizes) -> str | None:
        long = sum(n > 1 for n in sizes.kernel)
        return None if long > 1 else f"needs two kernel axes longer than 1, has {long}"

    def theta(self, sizes: Sizes) -> dict[str, Init]:
        g, o, i, kernel = sizes
        return {f"line{a}": Init((g, o, i, n), i * sum(kernel)) for a, n in enumerate(kernel) if n > 1}

    def terms(self, scale: Tensor, theta: Mapping[str, Tensor]) -> tuple[Term, ...]:
        return tuple(Line(scale, values, int(name.removeprefix("line"))) for name, values in theta.items())


class LowRank(BranchKind):
    """Two linear layers, or two 1x1 convs, with few channels between them."""

    name = "lowrank"
    has_width = True

    def fits(self, sizes: Sizes) -> str | None:
        if sizes.taps > 1:
            return f"only for linear layers and 1x1 convs, the kernel is {'x'.join(map(str, sizes.kernel))}"
        return "one weight a channel has no lower rank" if sizes.depthwise else None

    def theta(self, sizes: Sizes) -> dict[str, Init]:
        g, o, i, kernel = sizes
        c = self.inner(sizes)
        return {"down": Init((g, c, i), i), "up": Init((g, o, c, *kernel), c)}

    def terms(self, scale: Tensor, theta: Mapping[str, Tensor]) -> tuple[Term, ...]:
        return (Product(scale, theta["down"], theta["up"]),)


KINDS: dict[str, type[BranchKind]] = {
    kind.name: kind
    for kind in (Pointwise, PointwiseKernel, PointwiseAverage, DepthwiseSeparable, Prior, Lines, LowRank)
}
SETS: dict[str, tuple[str, ...]] = {"orepa": (MAIN, "1x1", "1x1-kxk", "1x1-avg", "dwsep", "prior", "lowrank")}


def register_branch(kind: type[BranchKind]) -> type[BranchKind]:
    """Make a kind of branch known by its name, so that `branches=["mine"]` adds it; also a class decorator.

    Args:
        kind: a subclass of `BranchKind` with a `name`. A teacher that has it can be loaded only where it is registered.

    Returns:
        The class.

    Raises:
        ArgumentError: it is no such class, or its name is taken or cannot be written in a list of branches.

    Example:
        >>> @gpd_fx.register_branch
        ... class Twice(Pointwise):
        ...     name = "twice"
        >>> teacher = gpd_fx.expand(model, 2.0, inputs, branches=["orepa", "twice"])
    """
    if not (isinstance(kind, type) and issubclass(kind, BranchKind)):  # pyright: ignore[reportUnnecessaryIsInstance]  users call this
        raise ArgumentError(f"register_branch: pass a subclass of gpd_fx.composition.branches.BranchKind, got {kind!r}")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w+-]*", name):
        raise ArgumentError(
            f"register_branch: {kind.__name__} needs a class attribute `name` of letters, digits, '-' and '+', "
            f"got {name!r}"
        )
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        raise ArgumentError(f"register_branch: {kind.__name__} lacks {', '.join(missing)}")
    if name in (MAIN, *SETS, *KINDS):
        raise ArgumentError(f"register_branch: there is a branch or a set called {name!r} already; choose another name")
    KINDS[name] = kind
    return kind


def resolve_branches(branches: str | Sequence[str] | None) -> tuple[str, ...]:
    """The branch names that a user's choice stands for; `kxk` always comes first.

    A name may carry an inner width: `"1x1-kxk:16"`, `"lowrank:4"`, or `"1x1-kxk:full"` for as many channels as a group
    of the layer has inputs. None, an empty list and `"kxk"` mean no extra branch.

    Raises:
        ArgumentError: a name is not known, comes twice with different widths, or has a bad width.
    """
    given = [branches] if isinstance(branches, str) else list(branches or ())
    chosen: dict[str, str] = {MAIN: MAIN}
    for entry in given:
        for name in SETS.get(entry, (entry,)):
            kind = MAIN if name == MAIN else find_kind(name).name
            if chosen.setdefault(kind, name) != name:
                raise ArgumentError(f"branches: {kind!r} is given twice, as {chosen[kind]!r} and as {name!r}; keep one")
    return tuple(chosen.values())


def find_kind(name: str) -> BranchKind:
    """The branch called `name`, which may carry an inner width.

    Raises:
        ArgumentError: there is none, or the width is neither a positive whole number nor `full`.
    """
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  users call this
        raise ArgumentError(f"branches: a branch is a name, got {name!r} ({type(name).__name__})")
    base, colon, width = name.partition(":")
    kind = KINDS.get(base)
    if kind is None:
        known = [*SETS, MAIN, *KINDS]
        raise ArgumentError(f"branches: there is no branch {base!r}{did_you_mean(base, known)}")
    if not colon:
        return kind()
    if not kind.has_width:
        raise ArgumentError(f"branches: {base!r} has no inner width, so write {base!r} and not {name!r}")
    if width == FULL:
        return kind(FULL)
    if not (width.isascii() and width.isdigit() and int(width)):
        raise ArgumentError(
            f"branches: the width in {name!r} must be a whole number above 0, such as '{base}:16', or '{base}:{FULL}'"
        )
    return kind(int(width))


def checked_terms(kind: BranchKind, scale: Tensor, theta: Mapping[str, Tensor]) -> tuple[Term, ...]:
    """What a branch adds; `ArgumentError` where no kernel can be composed of that."""
    terms = kind.terms(scale, theta)
    for each in map(type, terms):  # of a branch that may be a user's
        if each not in TERMS:
            known = ", ".join(term.__name__ for term in TERMS)
            raise ArgumentError(
                f"branch {kind.name!r}: {each.__name__} is no term that a kernel is composed of; its `terms` may "
                f"return {known}"
            )
    given = {id(tensor) for tensor in (scale, *theta.values())}
    if any(id(tensor) not in given for term in terms for tensor in term.tensors):
        raise ArgumentError(
            f"branch {kind.name!r}: its terms must hold the tensors that it is given, as they are; make others in "
            "`fixed`, or scale random ones by their `Init`"
        )
    return terms


def random_tensor(key: str, init: Init, like: Tensor) -> Tensor:
    """A random tensor that depends on `key` alone, with the dtype and on the device of `like`."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(init.shape, generator=generator, dtype=torch.float32, device="cpu") * init.fan_in**-0.5
    return values.to(dtype=like.dtype, device=like.device)


def cosine_filters(kernel: Sequence[int]) -> Tensor:
    """The orthonormal DCT-II filters but the constant one, `(taps - 1, *kernel)`, lowest frequencies first."""
    filters: list[Tensor] = []
    for frequency in sorted(itertools.product(*map(range, kernel)), key=lambda f: (sum(f), f))[1:]:
        wave = torch.ones((), dtype=torch.float64)
        for size, f in zip(kernel, frequency, strict=True):
            position = torch.arange(size, dtype=torch.float64) + 0.5
            wave = wave[..., None] * torch.cos(math.pi / size * f * position) * math.sqrt((2 if f else 1) / size)
        filters.append(wave)
    return torch.stack(filters)
