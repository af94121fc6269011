"""Recurrent layers: lstm, gru, rnn.

For every layer and direction the op takes w_ih (G·h, i), w_hh (G·h, r), perhaps two biases (G·h) and perhaps a
projection w_hr (p, h), where G is the number of gates and r the size of the hidden state: p if there is a projection,
else h. Gates and states are pointwise, so copies of a hidden unit stay copies; i, r and (for w_hr) h are contracted.

All layers and directions share the dimensions of the initial and last states, so their hidden units are the same axis.
A layer reads the output of both directions below it, which is a product: directions, hidden units.
"""

from __future__ import annotations

from torch import fx

from gpd_fx.axes.expressions import Expr, frozen, product
from gpd_fx.rules.effects import Contract
from gpd_fx.rules.site import (
    Axes,
    Rule,
    Site,
    Value,
)


def recurrent(gates: int) -> Rule:
    """The rule of a recurrent op with so many gates: hidden units are free, time and batch stay."""

    def rule(site: Site) -> Value:
        """lstm, gru, rnn: hidden units are free, time and batch stay."""
        return _apply(site, gates)

    return rule


def _apply(site: Site, gates: int) -> Value:
    solver = site.solver
    directions = 2 if site.arg("bidirectional") else 1
    weights: list[fx.Node] = list(site.arg("params"))
    initial = site.arg("hx")
    states: list[fx.Node] = list(initial) if isinstance(initial, list | tuple) else [initial]
    each = len(weights) // (site.arg("num_layers") * directions)
    projected = each in (3, 5)

    state = site.axes(states[0])[-1]
    cell = site.axes(states[-1])[-1] if projected or len(states) > 1 else state
    if projected:  # the op tells a projection by state and cell having unlike sizes, which must not become alike
        state = site.freeze(state, "the hidden state is projected")
    else:
        cell = state = solver.unify(state, cell)

    *run, inputs = site.axes(site.arg("input"))
    held: Axes = [site.freeze(axis, "the recurrence runs along this axis") for axis in run]
    for node in states:
        for axis in site.axes(node)[:-1]:
            site.freeze(axis, "it counts layers and samples of a recurrence")

    axes = gates, state, cell
    for k in range(0, len(weights), each):
        if k and k % (each * directions) == 0:
            inputs = product((frozen(directions), state))
        layer = weights[k : k + each]
        for place, node in enumerate(layer):
            hidden = projected and place == each - 1
            _bind(site, f"params.{k + place}", node, place, inputs, axes, projection=hidden)
    resolve = solver.resolve
    outputs = [*held, resolve(product((frozen(directions), state)))]
    found = [outputs]
    used = [user.args[1] for user in site.node.users if user.users]
    for k, (node, axis) in enumerate(zip(states, (state, cell), strict=False), start=1):
        recorded = site.out_shapes[k]
        if len(recorded) == len(site.shape(node)):
            found.append([*map(frozen, recorded[:-1]), resolve(axis)])
        elif k in used:  # torch 2.11 records the states of an lstm with one dimension too many
            return site.freeze_all("its last states have another shape than capture says")
        else:
            found.append(list(map(frozen, recorded)))
    return tuple(found)


def _bind(
    site: Site, name: str, node: fx.Node, place: int, inputs: Expr, axes: tuple[int, Expr, Expr], *, projection: bool
) -> None:
    """Tie the axes of one weight, and state what it contracts."""
    gates, state, cell = axes
    own = site.axes(node)
    unify = site.solver.unify
    if projection:
        unify(own[0], state)
        contracted = unify(own[1], cell)
    else:
        unify(own[0], product((frozen(gates), cell)))
        if len(own) == 1:
            return
        contracted = unify(own[1], state if place else inputs)
    site.effects.append(Contract(name, (((own[0], False),), ((contracted, True),))))
