"""Several calls in a row: created tensors, views that change in place, and reshapes through concatenations."""

from __future__ import annotations

from typing import Any

import torch

from tests.rule_harness import A, Build, Case, K, Leaf, Node, W, X, chain

_INT64_MAX = 2**63 - 1


def _created(op: str, *args: Any, **kwargs: Any) -> Case:
    """A tensor made by `op`, filled, and added to an activation, whose axes it takes over."""

    def make(b: Build, x: Node) -> Node:
        first = (x,) if op.startswith("new") or op.endswith("_like.default") else ()
        made = b(op, *first, *args, **kwargs)
        if "empty" in op:
            made = b("bernoulli_.float", made, 1.0)
        return b("add.Tensor", made, x), made

    return chain(op, "ab -> ab, ab", make, A(2, 3))


def _taking_part(widens: str, op: str, small: Leaf, *args: Any) -> Case:
    """An op repeats an axis of size one, and the result is multiplied by an activation of shape [2, 3]."""
    return chain(op, widens, lambda b, x, y: b("mul.Tensor", b(op, x, *args), y), small, A(2, 3))


def _contracted_zeros(b: Build, x: Node, w: Node) -> Node:
    return b("matmul.default", b("add.Tensor", b("zeros.default", [3]), x), w)


CREATED: list[Case] = [
    _created("zeros.default", [2, 3]),
    _created("ones.default", [2, 3]),
    _created("full.default", [2, 3], 0.5),
    _created("empty.memory_format", [2, 3]),
    _created("new_zeros.default", [2, 3]),
    _created("new_ones.default", [2, 3]),
    _created("new_full.default", [2, 3], 0.5),
    _created("new_empty.default", [2, 3]),
    _created("zeros_like.default"),
    _created("empty_like.default"),
    _taking_part(".b, ab -> ab", "expand.default", A(1, 3), [2, -1]),
    _taking_part(".b, ab -> ab", "repeat.default", A(1, 3), [2, 1]),
    _taking_part("a., ab -> ab", "tile.default", A(2, 1), [3]),
    _taking_part(".b, ab -> ab", "repeat_interleave.self_int", A(1, 3), 2, 0),
    _taking_part(", ab -> ab", "expand.default", A(), [2, 3]),
    chain("zeros.default", "ab, bc -> ac", _contracted_zeros, A(2, 3), W(3, 4)),
]  # fmt: skip


def _relu_on_a_piece(b: Build, x: Node, y: Node) -> Node:
    whole = b("cat.default", [x, y], 1)
    first, _ = b("split_with_sizes.default", whole, [4, 2], 1)
    b("relu_.default", first)
    return whole, first


def _copy_into_a_slice(b: Build, x: Node, y: Node) -> Node:
    b("copy_.default", b("slice.Tensor", x, 1, 2, 5), y)
    return x


def _fill_one_row(b: Build, x: Node) -> Node:
    b("fill_.Scalar", b("select.int", x, 1, 0), 2.0)
    return x


def _scale_between_two_uses(b: Build, x: Node, w: Node) -> Node:
    first = b("linear.default", x, w)
    b("mul_.Tensor", x, 2.0)
    return first, b("linear.default", x, w)


def _parameter_used_twice(b: Build, x: Node, w: Node) -> Node:
    return b("linear.default", b("linear.default", x, w), w)


def _gram(b: Build, w: Node) -> Node:
    return b("matmul.default", w, b("t.default", w))


def _one_operand_twice(b: Build, x: Node) -> Node:
    return b("bmm.default", x, b("transpose.int", x, 1, 2)), b("einsum.default", "bij,bij->b", [x, x])


def _add_in_place(b: Build, x: Node, w: Node, v: Node) -> Node:
    return b("add_.Tensor", b("linear.default", x, w), b("linear.default", x, v))


def _mean_by_hand(b: Build, x: Node) -> Node:
    return b("div.Tensor", b("sum.dim_IntList", x, [1]), b("sym_size.int", x, 1))


def _split_by_a_size(b: Build, x: Node, w: Node) -> Node:
    scaled = b("mul.Tensor", x, w)
    flat = b("view.default", scaled, [-1, 2])
    return b("view.default", flat, [2, b("sym_size.int", scaled, 1), 2])


SIZES: list[Case] = [
    chain("sym_size.int", "ab -> a", _mean_by_hand, A(2, 3)),
    chain("sym_size.int", "b. -> .b.", _split_by_a_size, X(2, 1, 2), W(3, 1)),
]

IN_PLACE: list[Case] = [
    chain("relu_ on a view", "nab, ncb -> nxb, nyb", _relu_on_a_piece, A(2, 3, 2), A(2, 3, 2)),
    chain("copy_ into a slice", "nx, nb -> nx", _copy_into_a_slice, A(2, 8), A(2, 3)),
    chain("fill_ of a row", "a.b -> a.b", _fill_one_row, A(2, 3, 4)),
    chain("an activation that changes between uses", "ni, oi -> no, no", _scale_between_two_uses, A(3, 4), W(5, 4)),
    chain("a parameter used twice", "ni, ii -> ni", _parameter_used_twice, A(3, 4), W(4, 4)),
    chain("a parameter times its transpose", "oi -> oo", _gram, W(3, 4)),
    chain("an activation times itself", "bij -> bii, b", _one_operand_twice, A(2, 3, 4)),
    chain("add_", "ni, oi, oi -> no", _add_in_place, A(3, 4), W(5, 4), W(5, 4)),
]  # fmt: skip


def _through_groups(groups: int, op: str) -> Any:
    """An op on the groups of the channels, then a convolution with as many groups."""

    def make(b: Build, x: Node, w: Node) -> Node:
        n, c, h, k = (int(s) for s in x.meta["val"].shape)
        grouped = b("view.default", x, [n, groups, c // groups, h, k])
        done = b(op, grouped, [1], [1]) if op.startswith("roll") else b(op, grouped)
        return b("conv2d.default", b("view.default", done, [n, c, h, k]), w, None, [1, 1], [0, 0], [1, 1], groups)

    return make


def _shuffle(b: Build, x: Node, y: Node, w: Node) -> Node:
    whole = b("cat.default", [x, y], 1)
    n, c, h = (int(s) for s in whole.meta["val"].shape)
    mixed = b("transpose.int", b("view.default", whole, [n, 2, c // 2, h]), 1, 2)
    first, second = b("chunk.default", b("reshape.default", mixed, [n, c, h]), 2, 1)
    return first, b("conv1d.default", second, w)


def _view_of_cat(shape: list[int], *, back: bool = False) -> Any:
    def make(b: Build, *operands: Node) -> Node:
        whole = b("cat.default", list(operands), 1)
        seen = b("view.default", whole, shape)
        return b("view.default", seen, list(whole.meta["val"].shape)) if back else seen

    return make


def _gate(b: Build, x: Node, y: Node) -> Node:
    return b("glu.default", b("cat.default", [x, y], 1), 1)


def _joined_again(b: Build, x: Node, y: Node) -> Node:
    left, right = b("slice.Tensor", x, 1, None, 3), b("slice.Tensor", x, 1, 3, _INT64_MAX)
    return b("add.Tensor", b("cat.default", [left, right], 1), y)


def _swapped(b: Build, x: Node, y: Node) -> Node:
    left, right = b("slice.Tensor", x, 1, None, 3), b("slice.Tensor", x, 1, 3, _INT64_MAX)
    return b("add.Tensor", b("cat.default", [right, left], 1), y)


def _slice_before_what_widens(b: Build, x: Node, y: Node) -> Node:
    whole = b("cat.default", [x, y], 1)
    return b("slice.Tensor", whole, 1, -7, -4), b("narrow.default", whole, 1, -8, 3)


def _pieces_across(b: Build, x: Node, y: Node) -> Node:
    return b("split_with_sizes.default", b("cat.default", [x, y], 1), [3, 5], 1)


def _twice_in_groups(b: Build, x: Node, w: Node) -> Node:
    return b("conv1d.default", b("cat.default", [x, x], 1), w, None, [1], [0], [1], 2)


def _depthwise_on_cat(b: Build, x: Node, y: Node, w: Node) -> Node:
    return b("conv1d.default", b("cat.default", [x, y], 1), w, None, [1], [0], [1], 7)


def _linear_on_cat(b: Build, x: Node, y: Node, w: Node) -> Node:
    return b("linear.default", b("cat.default", [x, y], 1), w)


def _flat_classifier(b: Build, x: Node, w: Node) -> Node:
    return b("linear.default", b("flatten.using_ints", b("avg_pool2d.default", x, [1, 1]), 1), w)


def _nested_cat(b: Build, x: Node, y: Node, z: Node) -> Node:
    inner = b("cat.default", [x, y], 1)
    seen = b("reshape.default", b("stack.default", [inner, inner], 1), [2, -1])
    return b("slice.Tensor", b("cat.default", [seen, z], 1), 1, 2, 12)


STRUCTURE: list[Case] = [
    chain("groups frozen", "nchw, oi.. -> nohw", _through_groups(2, "roll.default"), A(2, 6, 2, 2), W(4, 3, 1, 1)),
    chain("groups free", "nchw, o... -> nohw", _through_groups(2, "relu.default"), A(2, 6, 2, 2), W(4, 3, 1, 1)),
    chain("channel shuffle of equal parts", "nct, nct, oe. -> ndt, not", _shuffle, A(2, 4, 3), A(2, 4, 3), W(5, 4, 1)),
    chain("channel shuffle of uneven parts", "nat, nbt, oc. -> ndt, not", _shuffle, A(2, 6, 3), A(2, 2, 3), W(5, 4, 1)),
    chain("equal groups", "nc, nc -> n.c", _view_of_cat([2, 2, 4]), A(2, 4), A(2, 4)),
    chain("equal groups and back", "nc, nc -> nx", _view_of_cat([2, 2, 4], back=True), A(2, 4), A(2, 4)),
    chain("groups across parts", "nx, ny -> n.c", _view_of_cat([2, 2, 4]), A(2, 6), A(2, 2)),
    chain("a common suffix", "na, nb -> nx.", _view_of_cat([2, 5, 2]), A(2, 4), A(2, 6)),
    chain("no common suffix", "n., n. -> n..", _view_of_cat([2, 4, 2]), A(2, 3), A(2, 5)),
    chain("a frozen part in groups", ".. -> ...", _view_of_cat([2, 2, 4]), A(2, 4), X(2, 4)),
    chain("glu of equal parts", "nc, nc -> nc", _gate, A(2, 4), A(2, 4)),
    chain("glu of uneven parts", "na, nb -> nc", _gate, A(2, 3), A(2, 5)),
    chain("cut and joined", "nc, nc -> nc", _joined_again, A(2, 8), A(2, 8)),
    chain("cut and swapped", "nx, ny -> ny", _swapped, A(2, 8), A(2, 8)),
    chain("a slice before what widens", ".a -> .., ..", _slice_before_what_widens, X(2, 5), A(2, 3)),
    chain("a slice of both parts", "na, nb -> nx, ny", _slice_before_what_widens, A(2, 5), A(2, 3)),
    chain("pieces across parts", "na, nb -> nc, nd", _pieces_across, A(2, 2), A(2, 6)),
    chain("the same twice, in groups", "nct, oc. -> not", _twice_in_groups, A(2, 3, 2), W(4, 3, 1)),
    chain("depthwise on two parts", "na., nb., c.. -> nc.", _depthwise_on_cat, A(2, 3, 2), A(2, 4, 2), W(7, 1, 2)),
    chain("depthwise beside a frozen part", ".a., c.. -> .c.", _depthwise_on_cat, A(2, 3, 2), X(2, 4, 2), W(7, 1, 2)),
    chain("linear on a concatenation", "na, nb, oc -> no", _linear_on_cat, A(2, 3), A(2, 4), W(5, 7)),
    chain("linear beside a frozen part", ".a, oc -> .o", _linear_on_cat, A(2, 3), X(2, 4), W(5, 7)),
    chain("channels times space", "nc.., oi -> no", _flat_classifier, A(2, 3, 2, 2), W(5, 12)),
    chain("a cut through a concatenation of products", "na, nb, nc -> nd", _nested_cat, A(2, 3), A(2, 4), A(2, 2)),
]  # fmt: skip


def _normed(op: str, *, repeats: int = 1) -> Any:
    """Statistics over concatenated channels, each repeated."""

    def make(b: Build, x: Node, y: Node) -> Node:
        whole = b("repeat.default", b("cat.default", [x, y], 1), [1, repeats])
        extra = [[int(whole.meta["val"].shape[1])]] if op.startswith("layer_norm") else [1]
        return b(op, whole, *extra)

    return make


def _l2_normalised(b: Build, x: Node) -> Node:
    length = b("clamp_min.default", b("linalg_vector_norm.default", x, 2, [1], True), 0.1)
    return b("div.Tensor", x, b("expand_as.default", length, x))


def _response_norm(b: Build, x: Node, w: Node) -> Node:
    length = b("linalg_vector_norm.default", x, 2, [2, 3], True)
    share = b("div.Tensor", length, b("add.Tensor", b("mean.dim", length, [1], True), 1e-6))
    return b("mul.Tensor", b("mul.Tensor", x, share), b("view.default", w, [1, -1, 1, 1]))


def _standardised_weight(b: Build, x: Node, w: Node, v: Node) -> Node:
    o = int(w.meta["val"].shape[0])
    flat = b("view.default", w, [1, o, -1])
    standard = b("batch_norm.default", flat, v, None, None, None, True, 0.0, 1e-5, False)
    return b("conv2d.default", x, b("view.default", standard, list(w.meta["val"].shape)))


def _squeeze_excite(b: Build, x: Node, w: Node, v: Node) -> Node:
    pooled = b("mean.dim", x, [2, 3])
    gate = b("sigmoid.default", b("linear.default", b("silu.default", b("linear.default", pooled, w)), v))
    return b("mul.Tensor", x, b("unsqueeze.default", b("unsqueeze.default", gate, -1), -1))


def _attention(b: Build, x: Node, w: Node, v: Node) -> Node:
    n, length, width = (int(s) for s in x.meta["val"].shape)
    heads = b("reshape.default", b("linear.default", x, w), [n, length, 3, 2, -1])
    heads = b("unbind.int", b("permute.default", heads, [2, 0, 3, 1, 4]))
    mixed = b("scaled_dot_product_attention.default", *heads)
    return b("linear.default", b("reshape.default", b("transpose.int", mixed, 1, 2), [n, length, width]), v)


def _attention_by_hand(b: Build, x: Node, w: Node) -> Node:
    n, length, width = (int(s) for s in x.meta["val"].shape)
    q, k, v = b("chunk.default", b("linear.default", x, w), 3, -1)
    q, k, v = (b("transpose.int", b("view.default", t, [n, length, 2, width // 2]), 1, 2) for t in (q, k, v))
    q, k, v = (b("reshape.default", t, [n * 2, length, width // 2]) for t in (q, k, v))
    bias = b("zeros.default", [1, 1, 1], dtype=torch.float64)
    scores = b("softmax.int", b("baddbmm.default", bias, q, b("transpose.int", k, 1, 2)), -1)
    mixed = b("view.default", b("bmm.default", scores, v), [n, 2, length, width // 2])
    return b("reshape.default", b("transpose.int", mixed, 1, 2), [n, length, width])


def _channel_attention(b: Build, x: Node) -> Node:
    scores = b("softmax.int", b("matmul.default", b("transpose.int", x, 1, 2), x), -1)
    return b("matmul.default", x, b("transpose.int", scores, 1, 2))


def _windows(b: Build, x: Node, w: Node) -> Node:
    n, h, _, c = (int(s) for s in x.meta["val"].shape)
    cut = b("permute.default", b("view.default", x, [n, h // 2, 2, h // 2, 2, c]), [0, 1, 3, 2, 4, 5])
    tokens = b("linear.default", b("reshape.default", cut, [-1, 4, c]), w)
    heads = b("transpose.int", b("reshape.default", tokens, [n * h, 4, 3, 2]), 1, 2)
    rows = b("flatten.using_ints", heads, 0, 1)
    back = b("reshape.default", b("view.default", rows, [n, 4, 3, 4, -1]), [n, -1])
    return rows, back


def _grouped_queries(b: Build, q: Node, k: Node) -> Node:
    n, heads, length, width = (int(s) for s in k.meta["val"].shape)
    wide = b("expand.default", b("unsqueeze.default", k, 2), [n, heads, 2, length, width])
    return b("matmul.default", q, b("transpose.int", b("reshape.default", wide, [n, 2 * heads, length, width]), 2, 3))


def _tied_embedding(b: Build, w: Node, i: Node) -> Node:
    return b("linear.default", b("embedding.default", w, i), w)


WHOLE: list[Case] = [
    chain("layer norm of a concatenation", "na, nb -> nc", _normed("layer_norm.default"), A(2, 3), A(2, 4)),
    chain("layer norm beside a frozen part", ".. -> ..", _normed("layer_norm.default"), A(2, 3), X(2, 4)),
    chain("layer norm of repetitions", ".. -> ..", _normed("layer_norm.default", repeats=2), A(2, 3), X(2, 4)),
    chain("softmax of a concatenation, repeated", "na, nb -> nc", _normed("softmax.int", repeats=2), A(2, 3), A(2, 4)),
    chain("softmax beside a frozen part, repeated", ".. -> ..", _normed("softmax.int", repeats=2), A(2, 3), X(2, 4)),
    chain("deviation of a concatenation", "na, nb -> n", _normed("std.dim"), A(2, 3), A(2, 4)),
    chain("deviation beside a frozen part, repeated", ".. -> .", _normed("std.dim", repeats=3), X(2, 3), A(2, 4)),
    chain("mean beside a frozen part, repeated", ".a -> .", _normed("mean.dim", repeats=2), A(2, 3), X(2, 4)),
    chain("normalize", "nc -> nc", _l2_normalised, A(2, 5)),
    chain("response norm", "ncyx, c -> ncyx", _response_norm, A(2, 3, 2, 2), W(3)),
    chain("a standardised weight", "nc.., oc.., o -> no..", _standardised_weight, A(2, 3, 4, 4), W(5, 3, 2, 2), W(5)),
    chain("squeeze and excite", "ncyx, mc, cm -> ncyx", _squeeze_excite, A(2, 3, 2, 2), W(4, 3), W(3, 4)),
    chain("attention", "n.i, xi, oj -> n.o", _attention, A(2, 3, 4), W(12, 4), W(4, 4)),
    chain("attention by hand", ".li, xi -> .lo", _attention_by_hand, A(2, 3, 4), W(12, 4)),
    chain("attention over channels", "bnc -> bnc", _channel_attention, A(2, 3, 4)),
    chain("window partition", "h. -> x.., .z", _windows, X(2, 4, 4, 3), W(6, 3)),
    chain("a tied embedding", ".c -> ...", _tied_embedding, W(5, 3), K([[0, 4], [2, 1]])),
    chain("grouped queries", "nhld, ngsd -> nhls", _grouped_queries, A(2, 4, 3, 2), A(2, 2, 3, 2)),
]  # fmt: skip
