"""The op table: how each ATen overload treats axes, and what else follows from the op. A new op is one line here.

`RULES` maps an overload, named as in `aten.<name>`, to a rule: a line of the notation, or one of the few generic
functions. An `Entry` adds to the rule which argument is a layer's kernel, what the op contracts, and how it is kept
from drawing random numbers. Ops that `torch.Tag.pointwise` marks need no line. An op without a rule freezes what it
touches.
"""

from __future__ import annotations

import operator
from functools import cache

import torch

from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.fxtools.torch_internals import OpOverload
from gpd_fx.rules import (
    attention,
    concat,
    index,
    norm,
    reduce,
    shape,
    work,
)
from gpd_fx.rules.convolution import convolution
from gpd_fx.rules.entry import Entry, Kernel, Randomness
from gpd_fx.rules.index import pointwise
from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.recurrent import recurrent
from gpd_fx.rules.site import Rule

aten = torch.ops.aten
_MATMUL = "* m k, * k n -> * m n | k, k -> | * m k, k -> * m | k, * k n -> * n"
_SPATIAL1 = Einsum("* _ -> * _")
_SPATIAL2 = Einsum("* _ _ -> * _ _")
_SPATIAL3 = Einsum("* _ _ _ -> * _ _ _")


def _conv(dims: int, numeric: OpOverload) -> Entry:
    return Entry(convolution(dims), Kernel(groups="groups", numeric=numeric), work.convolution)


def _transposed(dims: int) -> Entry:
    kernel = Kernel(transposed=True, groups="groups")
    return Entry(convolution(dims, transposed=True), kernel, work.transposed_convolution)


def _recurrent(gates: int) -> Entry:
    return Entry(recurrent(gates), work=work.recurrent, random=Randomness({"dropout": 0.0}))


RULES: dict[str, Rule] = {
    # contractions
    "conv1d.default": _conv(1, aten.conv1d.default),
    "conv2d.default": _conv(2, aten.conv2d.default),
    "conv3d.default": _conv(3, aten.conv3d.default),
    "conv1d.padding": _conv(1, aten.conv1d.default),
    "conv2d.padding": _conv(2, aten.conv2d.default),
    "conv3d.padding": _conv(3, aten.conv3d.default),
    "conv_transpose1d.default": _transposed(1),
    "conv_transpose2d.input": _transposed(2),
    "conv_transpose3d.input": _transposed(3),
    "linear.default": Entry(Einsum("* i, o i, o -> * o"), Kernel(), work.contracted("input")),
    "matmul.default": Entry(Einsum(_MATMUL), work=work.matmul),
    "mm.default": Entry(Einsum("m k, k n -> m n"), work=work.contracted("self")),
    "bmm.default": Entry(Einsum("b m k, b k n -> b m n"), work=work.contracted("self")),
    "mv.default": Einsum("m k, k -> m"),
    "dot.default": Einsum("k, k ->"),
    "vdot.default": Einsum("k, k ->"),
    "outer.default": Einsum("m, n -> m n"),
    "ger.default": Einsum("m, n -> m n"),
    "addmm.default": Entry(Einsum("m n, m k, k n -> m n | n, m k, k n -> m n"), work=work.contracted("mat1")),
    "addmv.default": Einsum("m, m k, k -> m"),
    "baddbmm.default": Entry(Einsum("b m n, b m k, b k n -> b m n"), work=work.contracted("batch1")),
    "bilinear.default": Einsum("* i, * j, o i j, o -> * o"),
    "einsum.default": Entry(attention.einsum, work=work.einsum),
    "inner.default": Entry(attention.inner, work=work.contracted("self")),
    "tensordot.default": Entry(attention.tensordot, work=work.tensordot),
    "kron.default": shape.kron,
    "scaled_dot_product_attention.default": Entry(
        attention.scaled_dot_product, work=work.attention, random=Randomness({"dropout_p": 0.0})
    ),
    "lstm.input": _recurrent(4),
    "gru.input": _recurrent(3),
    "rnn_tanh.input": _recurrent(1),
    "rnn_relu.input": _recurrent(1),
    # normalisation
    "batch_norm.default": norm.batch_norm,
    "instance_norm.default": norm.instance_norm,
    "group_norm.default": Einsum("n (g ~i) ..., (g i), (g i) -> n (g i) ...", num_groups="g"),
    "layer_norm.default": norm.layer_norm,
    "rms_norm.default": norm.layer_norm,
    "_weight_norm.default": norm.weight_norm,
    "cosine_similarity.default": norm.cosine_similarity,
    "pairwise_distance.default": norm.pairwise_distance,
    "cdist.default": norm.cdist,
    # pooling and resizing: along space only; indices are those within a plane, which copies share
    "adaptive_avg_pool1d.default": _SPATIAL1,
    "adaptive_avg_pool2d.default": _SPATIAL2,
    "adaptive_avg_pool3d.default": _SPATIAL3,
    "adaptive_max_pool1d.default": _SPATIAL1,
    "adaptive_max_pool2d.default": _SPATIAL2,
    "adaptive_max_pool3d.default": _SPATIAL3,
    "avg_pool1d.default": _SPATIAL1,
    "avg_pool2d.default": _SPATIAL2,
    "avg_pool3d.default": _SPATIAL3,
    "max_pool1d.default": _SPATIAL1,
    "max_pool2d.default": _SPATIAL2,
    "max_pool3d.default": _SPATIAL3,
    "max_pool1d_with_indices.default": _SPATIAL1,
    "max_pool2d_with_indices.default": _SPATIAL2,
    "max_pool3d_with_indices.default": _SPATIAL3,
    "max_unpool2d.default": Einsum("* _ _, * _ _ -> * _ _"),
    "upsample_nearest1d.vec": _SPATIAL1,
    "upsample_nearest2d.vec": _SPATIAL2,
    "upsample_nearest3d.vec": _SPATIAL3,
    "_upsample_nearest_exact1d.vec": _SPATIAL1,
    "_upsample_nearest_exact2d.vec": _SPATIAL2,
    "_upsample_nearest_exact3d.vec": _SPATIAL3,
    "upsample_linear1d.vec": _SPATIAL1,
    "upsample_bilinear2d.vec": _SPATIAL2,
    "upsample_bicubic2d.vec": _SPATIAL2,
    "upsample_trilinear3d.vec": _SPATIAL3,
    "_upsample_bilinear2d_aa.vec": _SPATIAL2,
    "_upsample_bicubic2d_aa.vec": _SPATIAL2,
    "grid_sampler.default": Einsum("n c _ _, n _ _ _ -> n c _ _ | n c _ _ _, n _ _ _ _ -> n c _ _ _"),
    "pixel_shuffle.default": Einsum("* (c R S) _ _ -> * c _ _", upscale_factor="R"),
    "pixel_unshuffle.default": Einsum("* c _ _ -> * (c K) _ _"),
    "channel_shuffle.default": Einsum("n (G c) ... -> n (c G) ...", groups="G"),
    "im2col.default": Einsum("* c _ _ -> * (c K) _"),
    "col2im.default": Einsum("* (c K) _ -> * c _ _"),
    # reductions
    "mean.default": reduce.mean,
    "mean.dim": reduce.mean,
    "sum.default": reduce.total,
    "sum.dim_IntList": reduce.total,
    "linalg_vector_norm.default": reduce.norm,
    "linalg_norm.default": reduce.matrix_norm,
    "linalg_norm.ord_str": reduce.matrix_norm,
    "linalg_matrix_norm.str_ord": reduce.matrix_norm,
    "norm.Scalar": reduce.norm,
    "norm.ScalarOpt_dim": reduce.norm,
    **dict.fromkeys(
        [
            "all.default",
            "all.dim",
            "all.dims",
            "amax.default",
            "amin.default",
            "any.default",
            "any.dim",
            "any.dims",
            "max.default",
            "min.default",
        ],
        reduce.extreme,
    ),
    "max.dim": reduce.extreme_index,
    "min.dim": reduce.extreme_index,
    "softmax.int": reduce.softmax,
    "_softmax.default": reduce.softmax,
    "log_softmax.int": reduce.log_softmax,
    "_log_softmax.default": reduce.log_softmax,
    "logsumexp.default": reduce.logsumexp,
    **dict.fromkeys(
        [
            f"{name}.{overload}"
            for name in ("std", "std_mean", "var", "var_mean")
            for overload in ("correction", "default", "dim")
        ],
        reduce.variance,
    ),
    # along dimensions that stay as they are
    **dict.fromkeys(
        ["cummax.default", "cummin.default", "cumprod.default", "cumsum.default", "logcumsumexp.default"],
        reduce.fixed("it is scanned in order"),
    ),
    **dict.fromkeys(
        ["argsort.default", "kthvalue.default", "median.dim", "sort.default", "sort.stable", "topk.default"],
        reduce.fixed("its elements are put in order"),
    ),
    **dict.fromkeys(
        [
            f"fft_{name}.default"
            for name in ("fft", "fft2", "fftn", "ifft", "ifft2", "irfft", "irfft2", "rfft", "rfft2")
        ],
        reduce.fixed("it is transformed"),
    ),
    "argmax.default": reduce.fixed("indices into it are returned"),
    "argmin.default": reduce.fixed("indices into it are returned"),
    "index_fill.int_Scalar": reduce.fixed("some of its indices are filled"),
    "prod.dim_int": reduce.fixed("its elements are multiplied with each other"),
    "triu.default": Einsum("* _ _ -> * _ _"),
    "tril.default": Einsum("* _ _ -> * _ _"),
    "diagonal.default": shape.diagonal,
    "unfold.default": shape.windows,
    "view_as_complex.default": Einsum("* _ -> *"),
    "view_as_real.default": Einsum("* -> * _"),
    # shapes
    "view.default": shape.reshape,
    "reshape.default": shape.reshape,
    "_unsafe_view.default": shape.reshape,
    "flatten.using_ints": shape.regroup,
    "ravel.default": shape.regroup,
    "squeeze.default": shape.regroup,
    "squeeze.dim": shape.regroup,
    "squeeze.dims": shape.regroup,
    "unsqueeze.default": shape.regroup,
    "unflatten.int": shape.unflatten,
    "view_as.default": shape.like_other,
    "reshape_as.default": shape.like_other,
    "expand_as.default": shape.like_other,
    "expand.default": shape.expand,
    "permute.default": shape.permute,
    "transpose.int": shape.transpose,
    "transpose_.default": shape.transpose,
    "swapaxes.default": shape.transpose,
    "swapdims.default": shape.transpose,
    "t.default": shape.transpose,
    "mT.default": shape.transpose,
    "mH.default": shape.transpose,
    "adjoint.default": shape.transpose,
    "matrix_H.default": shape.transpose,
    "numpy_T.default": shape.reverse,
    "movedim.int": shape.movedim,
    "movedim.intlist": shape.movedim,
    "moveaxis.int": shape.movedim,
    "moveaxis.intlist": shape.movedim,
    "repeat.default": shape.repeat,
    "tile.default": shape.repeat,
    "repeat_interleave.self_int": shape.repeat_interleave,
    "unbind.int": shape.unbind,
    "select.int": shape.select,
    "stack.default": shape.stack,
    "roll.default": shape.rearrange,
    "flip.default": shape.rearrange,
    "glu.default": shape.glu,
    "sym_size.int": shape.symbolic_size,
    "zeros.default": shape.create,
    "ones.default": shape.create,
    "full.default": shape.create,
    "empty.memory_format": shape.create,
    "new_zeros.default": shape.create,
    "new_ones.default": shape.create,
    "new_full.default": shape.create,
    "new_empty.default": shape.create,
    "zeros_like.default": shape.like_self,
    "ones_like.default": shape.like_self,
    "full_like.default": shape.like_self,
    "empty_like.default": shape.like_self,
    # concatenation
    "cat.default": concat.cat,
    "concat.default": concat.cat,
    "concatenate.default": concat.cat,
    "vstack.default": concat.join_along(0),
    "hstack.default": concat.join_along(1),
    "column_stack.default": concat.join_along(1),
    "dstack.default": concat.join_along(2),
    "split.Tensor": concat.split,
    "split.sizes": concat.split,
    "split_with_sizes.default": concat.split,
    "chunk.default": concat.split,
    "tensor_split.sections": concat.split,
    "tensor_split.indices": concat.split,
    "slice.Tensor": concat.slice_axis,
    "narrow.default": concat.narrow,
    "pad.default": concat.pad,
    "constant_pad_nd.default": concat.pad,
    # indexing
    "embedding.default": index.embedding,
    "index.Tensor": index.index,
    "index_select.default": index.index_select,
    "gather.default": index.gather,
    "prelu.default": index.prelu,
    # elementwise, though torch (or an older one) does not tag them so
    **dict.fromkeys(
        [
            "__and__.Scalar",
            "__and__.Tensor",
            "__or__.Scalar",
            "__or__.Tensor",
            "_conj.default",
            "_to_copy.default",
            "alias.default",
            "complex.default",
            "contiguous.default",
            "copy.default",
            "detach.default",
            "fill.Scalar",
            "fill.Tensor",
            "hardswish.default",
            "imag.default",
            "leaky_relu.default",
            "lift_fresh_copy.default",
            "log_sigmoid.default",
            "masked_fill.Tensor",
            "polar.default",
            "real.default",
            "resolve_conj.default",
            "resolve_neg.default",
            "to.device",
            "to.dtype",
            "to.dtype_layout",
            "where.Scalar",
            "where.ScalarOther",
            "where.ScalarSelf",
            "zero.default",
        ],
        pointwise,
    ),
    # elementwise and random
    **dict.fromkeys(
        [
            "alpha_dropout.default",
            "dropout.default",
            "feature_alpha_dropout.default",
            "feature_dropout.default",
            "native_dropout.default",
        ],
        Entry(pointwise, random=Randomness({"p": 0.0, "train": False})),
    ),
    "bernoulli.p": Entry(pointwise, random=Randomness(ones=aten.full_like.default)),
    "bernoulli_.float": Entry(pointwise, random=Randomness(ones=aten.fill_.Scalar)),
    "rrelu.default": Entry(pointwise, random=Randomness({"training": False})),
    "to.other": shape.like_self,
    "type_as.default": shape.like_self,
}


@cache
def rule_of(target: object) -> Rule | None:
    """The rule of a node's target, or None. In-place ops have the rule of their functional form."""
    if target is operator.getitem or not isinstance(target, OpOverload):
        return None
    name = op_name(target).removeprefix("aten.")
    plain, _, overload = name.rpartition(".")
    functional = f"{plain.removesuffix('_')}.{overload}"
    found = RULES.get(name) or RULES.get(functional)
    if found is None and target.namespace == "aten":
        pointwise_too = torch.Tag.pointwise in target.tags or _functional_is_pointwise(functional)
        return pointwise if pointwise_too else None
    return found


def entry_of(target: object) -> Entry | None:
    """All that the table says of a node's target; None for an op without a rule."""
    rule = rule_of(target)
    return rule if rule is None or isinstance(rule, Entry) else Entry(rule)


def _functional_is_pointwise(name: str) -> bool:
    packet, overload = name.split(".", 1)
    op = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    return op is not None and torch.Tag.pointwise in op.tags
