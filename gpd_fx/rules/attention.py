"""Contractions whose pattern is an argument: attention and einsum."""

from __future__ import annotations

from string import ascii_lowercase

from gpd_fx.axes import size
from gpd_fx.rules.effects import Fixed
from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.site import Site, Value

_ATTENTION = Einsum("* M d, * N d, * N e, * M N -> * M e")


def scaled_dot_product(site: Site) -> Value:
    """Scaled dot-product attention: positions are frozen, heads are free, the default scale stays the model's."""
    if site.arg("enable_gqa"):
        return site.freeze_all("grouped queries with an implicit repeat of the keys")
    value = _ATTENTION(site)
    width = site.axes(site.arg("query"))[-1]
    site.effects.append(Fixed("scale", size(width) ** -0.5, width))
    return value


def einsum(site: Site) -> Value:
    """torch.einsum: the equation is a rule already."""
    equation = str(site.arg("equation")).replace(" ", "")
    operands = site.arg("tensors")
    if "->" not in equation or "..." in equation or len(operands) > 2:
        return site.freeze_all(f"the equation {equation!r}")
    terms, result = equation.split("->")[0].split(","), equation.split("->")[1]
    once = {letter for term in terms for letter in term if letter not in result and equation.count(letter) < 2}
    if once or any(len(set(term)) < len(term) for term in terms):
        return site.freeze_all(f"the equation {equation!r} sums or takes a diagonal of one operand")
    lower = dict(zip(sorted(set("".join(terms))), ascii_lowercase, strict=False))
    spaced = [" ".join(lower[letter] for letter in term) for term in (*terms, result)]
    rule = Einsum(f"{', '.join(spaced[:-1])} -> {spaced[-1]}")
    return rule.apply(site, operands, [f"tensors.{k}" for k in range(len(operands))])
