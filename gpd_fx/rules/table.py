"""The op table: how each ATen overload treats axes. A new op is one line here.

`RULES` maps an overload, named as in `aten.<name>`, to a rule: a line of the notation, or one of the few generic
functions. Ops that `torch.Tag.pointwise` marks need no line. An op without a rule freezes what it touches.
"""

from __future__ import annotations

import operator
from functools import cache

import torch

from gpd_fx.private import OpOverload
from gpd_fx.rules import attention, concat, index, reduce, shape
from gpd_fx.rules.index import pointwise
from gpd_fx.rules.norm import layer_norm
from gpd_fx.rules.notation import Einsum
from gpd_fx.rules.site import Rule, Site, Value, op_name

_CONV = "n (g i){s}, (g o) i{s}, (g o) -> n (g o){s} | (g i){s}, (g o) i{s}, (g o) -> (g o){s}"
_CONV_T = "n (g i){s}, (g i) o{s}, (g o) -> n (g o){s} | (g i){s}, (g i) o{s}, (g o) -> (g o){s}"
_MATMUL = "* m k, * k n -> * m n | k, k -> | * m k, k -> * m | k, * k n -> * n"
_CHANNELS = Einsum("n c ..., c, c, c, c -> n c ...")
_SPATIAL1 = Einsum("* _ -> * _")
_SPATIAL2 = Einsum("* _ _ -> * _ _")
_SPATIAL3 = Einsum("* _ _ _ -> * _ _ _")


def _conv(pattern: str, dims: int) -> Rule:
    return Einsum(pattern.format(s=" _" * dims), groups="g")


def _with_indices(rule: Rule) -> Rule:
    """A pooling op that also returns indices within the pooled window's plane, which copies share."""

    def both(site: Site) -> Value:
        value = rule(site)
        return (value, value)

    return both


RULES: dict[str, Rule] = {
    # contractions
    "conv1d.default": _conv(_CONV, 1),
    "conv2d.default": _conv(_CONV, 2),
    "conv3d.default": _conv(_CONV, 3),
    "conv1d.padding": _conv(_CONV, 1),
    "conv2d.padding": _conv(_CONV, 2),
    "conv3d.padding": _conv(_CONV, 3),
    "conv_transpose1d.default": _conv(_CONV_T, 1),
    "conv_transpose2d.input": _conv(_CONV_T, 2),
    "conv_transpose3d.input": _conv(_CONV_T, 3),
    "linear.default": Einsum("* i, o i, o -> * o"),
    "matmul.default": Einsum(_MATMUL),
    "mm.default": Einsum("m k, k n -> m n"),
    "bmm.default": Einsum("b m k, b k n -> b m n"),
    "mv.default": Einsum("m k, k -> m"),
    "dot.default": Einsum("k, k ->"),
    "addmm.default": Einsum("m n, m k, k n -> m n | n, m k, k n -> m n"),
    "baddbmm.default": Einsum("b m n, b m k, b k n -> b m n"),
    "einsum.default": attention.einsum,
    "scaled_dot_product_attention.default": attention.scaled_dot_product,
    # normalisation
    "batch_norm.default": _CHANNELS,
    "instance_norm.default": Einsum("n c ..., c, c, c, c -> n c ..."),
    "group_norm.default": Einsum("n (g ~i) ..., (g i), (g i) -> n (g i) ...", num_groups="g"),
    "layer_norm.default": layer_norm,
    "rms_norm.default": layer_norm,
    "local_response_norm.default": Einsum("n _ ... -> n _ ..."),
    # pooling and resizing: along space only
    "adaptive_avg_pool1d.default": _SPATIAL1,
    "adaptive_avg_pool2d.default": _SPATIAL2,
    "adaptive_avg_pool3d.default": _SPATIAL3,
    "adaptive_max_pool2d.default": _with_indices(_SPATIAL2),
    "avg_pool1d.default": _SPATIAL1,
    "avg_pool2d.default": _SPATIAL2,
    "avg_pool3d.default": _SPATIAL3,
    "max_pool1d.default": _SPATIAL1,
    "max_pool2d.default": _SPATIAL2,
    "max_pool3d.default": _SPATIAL3,
    "max_pool2d_with_indices.default": _with_indices(_SPATIAL2),
    "upsample_nearest1d.vec": _SPATIAL1,
    "upsample_nearest2d.vec": _SPATIAL2,
    "upsample_nearest3d.vec": _SPATIAL3,
    "upsample_linear1d.vec": _SPATIAL1,
    "upsample_bilinear2d.vec": _SPATIAL2,
    "upsample_bicubic2d.vec": _SPATIAL2,
    "upsample_trilinear3d.vec": _SPATIAL3,
    "_upsample_bilinear2d_aa.vec": _SPATIAL2,
    "_upsample_bicubic2d_aa.vec": _SPATIAL2,
    "grid_sampler.default": Einsum("n c _ _, n _ _ _ -> n c _ _"),
    "pixel_shuffle.default": Einsum("* (c R S) _ _ -> * c _ _", upscale_factor="R"),
    "pixel_unshuffle.default": Einsum("* c _ _ -> * (c K) _ _"),
    "channel_shuffle.default": Einsum("n (G c) ... -> n (c G) ...", groups="G"),
    "im2col.default": Einsum("n c _ _ -> n (c K) _"),
    "col2im.default": Einsum("n (c K) _ -> n c _ _"),
    # reductions
    "mean.default": reduce.mean,
    "mean.dim": reduce.mean,
    "sum.default": reduce.total,
    "sum.dim_IntList": reduce.total,
    "linalg_vector_norm.default": reduce.norm,
    "norm.ScalarOpt_dim": reduce.norm,
    "amax.default": reduce.extreme,
    "amin.default": reduce.extreme,
    "any.dim": reduce.extreme,
    "all.dim": reduce.extreme,
    "max.dim": reduce.extreme_index,
    "min.dim": reduce.extreme_index,
    "argmax.default": reduce.extreme_index,
    "argmin.default": reduce.extreme_index,
    "softmax.int": reduce.softmax,
    "_softmax.default": reduce.softmax,
    "log_softmax.int": reduce.log_softmax,
    "logsumexp.default": reduce.logsumexp,
    "var.correction": reduce.variance,
    "var.dim": reduce.variance,
    "std.correction": reduce.deviation,
    "std.dim": reduce.deviation,
    "cumsum.default": reduce.scan,
    "cumprod.default": reduce.scan,
    # shapes
    "view.default": shape.reshape,
    "reshape.default": shape.reshape,
    "_unsafe_view.default": shape.reshape,
    "flatten.using_ints": shape.regroup,
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
    "swapaxes.default": shape.transpose,
    "swapdims.default": shape.transpose,
    "t.default": shape.transpose,
    "numpy_T.default": shape.transpose,
    "mT.default": shape.transpose,
    "movedim.int": shape.movedim,
    "movedim.intlist": shape.movedim,
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
    "split.Tensor": concat.split,
    "split.sizes": concat.split,
    "split_with_sizes.default": concat.split,
    "chunk.default": concat.split,
    "tensor_split.sections": concat.split,
    "slice.Tensor": concat.slice_axis,
    "narrow.default": concat.narrow,
    "pad.default": concat.pad,
    "constant_pad_nd.default": concat.pad,
    # indexing
    "embedding.default": index.embedding,
    "index.Tensor": index.index,
    "index_select.default": index.index_select,
    "gather.default": index.gather,
    "prelu.default": Einsum("n c ..., c -> n c ... | n, _ -> n"),
    # elementwise, though some torch versions do not tag them so
    **dict.fromkeys(
        [
            "celu.default",
            "elu.default",
            "fill.Scalar",
            "hardsigmoid.default",
            "hardswish.default",
            "hardtanh.default",
            "leaky_relu.default",
            "log_sigmoid.default",
            "mish.default",
            "relu6.default",
            "rrelu.default",
            "selu.default",
            "silu.default",
            "softplus.default",
            "softshrink.default",
            "tanhshrink.default",
            "masked_fill.Tensor",
            "where.Scalar",
            "where.ScalarOther",
            "where.ScalarSelf",
            "zero.default",
        ],
        pointwise,
    ),
    "alias.default": pointwise,
    "bernoulli.p": pointwise,
    "bernoulli_.float": pointwise,
    "clone.default": pointwise,
    "contiguous.default": pointwise,
    "copy.default": pointwise,
    "detach.default": pointwise,
    "dropout.default": pointwise,
    "feature_dropout.default": pointwise,
    "lift_fresh_copy.default": pointwise,
    "native_dropout.default": _with_indices(pointwise),
    "to.dtype": pointwise,
    "to.dtype_layout": pointwise,
    "to.device": pointwise,
    "to.other": shape.like_self,
    "type_as.default": shape.like_self,
    "_to_copy.default": pointwise,
}


@cache
def rule_of(target: object) -> Rule | None:
    """The rule of a node's target, or None. In-place ops have the rule of their functional form."""
    if target is operator.getitem or not isinstance(target, OpOverload):
        return None
    if target.namespace != "aten":
        return None
    name = op_name(target).removeprefix("aten.")
    plain, overload = name.split(".", 1)
    functional = f"{plain.removesuffix('_')}.{overload}"
    found = RULES.get(name) or RULES.get(functional)
    if found is None and (torch.Tag.pointwise in target.tags or _functional_is_pointwise(functional)):
        found = pointwise
    return found


def _functional_is_pointwise(name: str) -> bool:
    packet, overload = name.split(".", 1)
    op = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    return op is not None and torch.Tag.pointwise in op.tags
