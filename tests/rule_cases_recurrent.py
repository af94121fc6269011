"""Recurrent layers, and convolutions whose kernel is a point along space."""

from __future__ import annotations

from tests.rule_harness import A, Case, Leaf, W, X, case


def _layer(gates: int, inputs: int, hidden: int, *, biases: bool = True, state: int | None = None) -> list[Leaf]:
    """The weights of one layer and direction; `state` is the size of a projected hidden state."""
    wide = gates * hidden
    leaves = [W(wide, inputs), W(wide, state or hidden), *([W(wide), W(wide)] if biases else [])]
    return [*leaves, W(state, hidden)] if state else leaves


_ONE = (True, 1, 0.0, False, False, True)  # biases, layers, dropout, train, bidirectional, batch first
_PAIR = (True, 1, 0.0, False, True, True)
_DEEP = (False, 2, 0.0, False, True, False)

RECURRENT: list[Case] = [
    case(
        "lstm.input",
        "..i, ..h, ..h, gi, gh, g, g -> ..h, ..h, ..h",
        A(2, 3, 4),
        [A(1, 2, 3), A(1, 2, 3)],
        _layer(4, 4, 3),
        *_ONE,
    ),
    case(
        "lstm.input",
        "..i, ..h, ..h, gi, gh, g, g, gi, gh, g, g -> ..d, ..h, ..h",
        A(2, 3, 4),
        [W(2, 2, 3), W(2, 2, 3)],
        [*_layer(4, 4, 3), *_layer(4, 4, 3)],
        *_PAIR,
    ),
    case(
        "lstm.input",
        "..i, ..h, ..h, gi, gh, gi, gh, gd, gh, gd, gh -> ..d, ..h, ..h",
        A(5, 2, 4),
        [W(4, 2, 3), W(4, 2, 3)],
        [*(leaf for n in (4, 4, 6, 6) for leaf in _layer(4, n, 3, biases=False))],
        *_DEEP,
    ),
    case(
        "lstm.input",
        "..i, ..., ..h, gi, g., g, g, .h -> ..., ..., ..h",  # a projected state is told by its size, so it stays
        A(2, 3, 4),
        [A(1, 2, 2), A(1, 2, 3)],
        _layer(4, 4, 3, state=2),
        *_ONE,
    ),
    case(
        "lstm.input",
        "..i, .i, .., ., . -> ..., ..., ...",  # an initial state from outside is as wide as it is
        A(2, 3, 4),
        [X(1, 2, 3), X(1, 2, 3)],
        _layer(4, 4, 3),
        *_ONE,
    ),
    case("gru.input", "..i, ..h, gi, gh, g, g -> ..h, ..h", A(2, 3, 4), A(1, 2, 3), _layer(3, 4, 3), *_ONE),
    case(
        "gru.input",
        "..i, ..h, gi, gh, gi, gh, gd, gh, gd, gh -> ..d, ..h",
        A(5, 2, 4),
        A(4, 2, 3),
        [*(leaf for n in (4, 4, 6, 6) for leaf in _layer(3, n, 3, biases=False))],
        *_DEEP,
    ),
    case("rnn_tanh.input", "..i, ..h, hi, hh, h, h -> ..h, ..h", A(2, 3, 4), A(1, 2, 3), _layer(1, 4, 3), *_ONE),
    case("rnn_relu.input", "..i, ..h, hi, hh, h, h -> ..h, ..h", A(1, 2, 4), A(1, 1, 3), _layer(1, 4, 3), *_ONE),
]

POINTS: list[Case] = [
    case("conv1d.default", "nct, oc., o -> not", A(2, 4, 7), W(6, 4, 1), W(6)),
    case("conv1d.default", "nct, o.. -> not", A(2, 4, 7), W(6, 2, 1), None, [1], [0], [3], 2),
    case("conv1d.default", "nc., oc. -> no.", A(2, 4, 7), W(6, 4, 1), None, [2]),
    case("conv1d.default", "nc., oc. -> no.", A(2, 4, 7), W(6, 4, 1), None, [1], [1]),
    case("conv1d.padding", "nct, oc. -> not", A(2, 4, 7), W(6, 4, 1), None, [1], "same"),
    case("conv2d.default", "nchw, oc.., o -> nohw", A(2, 3, 5, 6), W(5, 3, 1, 1), W(5)),
    case("conv2d.default", "nch., oc.. -> noh.", A(2, 3, 5, 6), W(5, 3, 1, 3)),
    case("conv2d.default", "nc.w, oc.. -> no.w", A(2, 3, 5, 6), W(5, 3, 1, 1), None, [2, 1]),
    case("conv2d.padding", "nc.w, oc.. -> no.w", A(2, 3, 5, 6), W(5, 3, 3, 1), None, [1], "valid"),
    case("conv3d.default", "ncd.w, oc... -> nod.w", A(2, 2, 3, 4, 3), W(3, 2, 1, 2, 1), None, [1], [0, 1, 0]),
    case("conv_transpose1d.default", "nct, co. -> not", A(2, 4, 5), W(4, 6, 1)),
    case("conv_transpose1d.default", "nc., co. -> no.", A(2, 4, 5), W(4, 6, 1), None, [2], [0], [1]),
    case("conv_transpose2d.input", "nc.w, co.. -> no.w", A(2, 3, 4, 4), W(3, 5, 2, 1), None, [2, 1]),
]
