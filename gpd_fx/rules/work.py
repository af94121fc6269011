"""Multiply-adds of ops that contract, as axes whose sizes are multiplied.

As `torch.utils.flop_counter` does, these count products of matrices and convs, and no products with a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpd_fx.axes.expressions import Expr
from gpd_fx.rules.attention import read_equation
from gpd_fx.rules.entry import Operands, Work


def contracted(first: str) -> Work:
    """A product of matrices: every element of the result sums over the last dimension of an operand."""

    def work(call: Operands) -> Sequence[Sequence[Expr]]:
        return [[*call.out, *call[first][-1:]]]

    return work


def matmul(call: Operands) -> Sequence[Sequence[Expr]]:
    """A matmul of two matrices, or of two batches of them."""
    return contracted("self")(call) if min(len(call["self"]), len(call["other"])) > 1 else []


def convolution(call: Operands) -> Sequence[Sequence[Expr]]:
    """A conv: every element of the result sums over one filter."""
    return [[*call.out, *call["weight"][1:]]]


def transposed_convolution(call: Operands) -> Sequence[Sequence[Expr]]:
    """A transposed conv: every element of the input is multiplied with one filter."""
    return [[*call["input"], *call["weight"][1:]]]


def attention(call: Operands) -> Sequence[Sequence[Expr]]:
    """Scaled dot-product attention: queries times keys, and the shares times values."""
    query, keys, values = call["query"], call["key"][-2:-1], call["value"][-1:]
    return [[*query, *keys], [*query[:-1], *keys, *values]]


def recurrent(call: Operands) -> Sequence[Sequence[Expr]]:
    """A recurrent layer: each of its matrices is applied at every position."""
    weights = [call.axes_of(node) for node in call.arg("params")]
    return [[*call["input"][:-1], *weight] for weight in weights if len(weight) > 1]


def tensordot(call: Operands) -> Sequence[Sequence[Expr]]:
    """A tensordot: every element of the result sums over the pairs of dimensions."""
    own = call["self"]
    return [[*call.out, *(own[dim] for dim in call.arg("dims_self"))]]


def einsum(call: Operands) -> Sequence[Sequence[Expr]]:
    """An einsum: operands are multiplied from the left, and what no later one has is summed at once."""
    *terms, right = read_equation(str(call.arg("equation")))
    operands = [call.axes_of(node) for node in call.arg("tensors")]
    named = [_letters(term, axes) for term, axes in zip(terms, operands, strict=True)]
    kept = {key for term in named for key in term if key.isdigit() or key in right}
    found: list[list[Expr]] = []
    so_far = named[0]
    for k, term in enumerate(named[1:], start=1):
        later = kept.union(*named[k + 1 :])
        both = so_far | term
        if any(key not in later for key in so_far.keys() & term.keys()):
            found.append(list(both.values()))
        so_far = {key: axis for key, axis in both.items() if key in later}
    return found


def _letters(term: str, axes: Sequence[Expr]) -> dict[str, Expr]:
    """The axes of an operand by letter; those of the ellipsis by their number from the right."""
    before, dots, after = term.partition("...")
    names = [*before]
    if dots:
        names += [str(k) for k in range(len(axes) - len(before) - len(after), 0, -1)]
    return dict(zip([*names, *after], axes, strict=True))
