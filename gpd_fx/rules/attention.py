"""Contractions whose pattern is an argument: attention, einsum, tensordot."""

from __future__ import annotations

from torch import fx

from gpd_fx.axes.expressions import size
from gpd_fx.rules.effects import Fixed
from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.site import Site, Value

_ATTENTION = Einsum("* M d, * N d, * N e, * M N -> * M e")


def scaled_dot_product(site: Site) -> Value:
    """Scaled dot-product attention: positions are frozen, heads are free, the default scale stays the model's."""
    value = (_grouped(site) if site.arg("enable_gqa") else _ATTENTION)(site)
    width = site.axes(site.arg("query"))[-1]
    site.effects.append(Fixed("scale", size(width) ** -0.5, width))
    return value


def _grouped(site: Site) -> Einsum:
    """The rule for queries of which several share the head of a key and a value."""
    masked, heads = site.arg("attn_mask"), size(site.axes(site.arg("query"))[-3])
    shape = (1, 1, 1) if masked is None else site.shape(masked)
    mask = "M N" if len(shape) < 3 else "* (h q) M N" if shape[-3] == heads else "* H M N"
    return Einsum(f"* (h q) M d, * h N d, * h N e, {mask} -> * (h q) M e")


def read_equation(equation: str) -> list[str]:
    """The letters of each operand of an einsum, and lastly of its result, with `...` where they have one."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    once = sorted(letter for letter in set(left) - set(".,") if left.count(letter) == 1)
    return [*left.split(","), right if arrow else "".join(["..." * ("..." in left), *once])]


def einsum(site: Site) -> Value:
    """torch.einsum: the equation is a rule already. `...` are shared dimensions; what is summed alone is frozen."""
    equation, operands = str(site.arg("equation")).replace(" ", ""), site.arg("tensors")
    *terms, result = (term.replace("...", "*") for term in read_equation(equation))
    letters = sorted(set("".join(terms)) - {"*"})
    single = [letter for letter in letters if "".join(terms).count(letter) == 1]
    if any(len(set(term)) < len(term) for term in terms) or ("*" in "".join(terms) and "*" not in result):
        return site.freeze_all(f"the equation {equation!r} takes a diagonal, or sums over dimensions it does not name")
    words = {
        letter: f"{'S' if letter in single and letter not in result else 'f'}{k}" for k, letter in enumerate(letters)
    }
    patterns = [[words.get(letter, letter) for letter in term] for term in (*terms, result)]
    return _contract(site, patterns, operands, [f"tensors.{k}" for k in range(len(operands))])


def tensordot(site: Site) -> Value:
    """tensordot: pairs of dimensions are contracted, the others come one after the other."""
    names = ["self", "other"]
    operands = [site.arg(name) for name in names]
    first, second = (
        [f"{letter}{k}" for k in range(len(site.axes(n)))] for letter, n in zip("ab", operands, strict=True)
    )
    for one, other in zip(site.arg("dims_self"), site.arg("dims_other"), strict=True):
        second[other] = first[one]
    kept = [letter for letter in (*first, *second) if (letter in first) != (letter in second)]
    return _contract(site, [first, second, kept], operands, names)


def inner(site: Site) -> Value:
    """inner: the last dimensions are contracted, the others come one after the other."""
    names = ["self", "other"]
    operands = [site.arg(name) for name in names]
    ranks = [len(site.axes(node)) for node in operands]
    if 0 in ranks:
        return site.freeze_all("an operand has no dimensions")
    first, second = ([f"{letter}{k}" for k in range(rank - 1)] for letter, rank in zip("ab", ranks, strict=True))
    return _contract(site, [[*first, "k"], [*second, "k"], [*first, *second]], operands, names)


def _contract(site: Site, patterns: list[list[str]], operands: list[fx.Node], names: list[str]) -> Value:
    """Apply the rule whose operands, and lastly result, have the given words."""
    *left, right = map(" ".join, patterns)
    return Einsum(f"{', '.join(left)} -> {right}").apply(site, operands, names)
