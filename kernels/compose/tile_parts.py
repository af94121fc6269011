"""What the tile kernels read of a layer: its tables, by the numbers of `columns.py`, and its tensors through them."""

from __future__ import annotations

import triton
import triton.language as tl

from gpd_fx.kernels.compose import columns

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportGeneralTypeIssues=false
# Triton gives its arguments and results no types, or those that they have outside of a kernel.

TASK = tl.constexpr(columns.TASK)
GEO = tl.constexpr(columns.GEO)
DYN = tl.constexpr(columns.DYN)
GROUPS = tl.constexpr(columns.GROUPS)
OUTPUTS = tl.constexpr(columns.OUTPUTS)
TAPS = tl.constexpr(columns.TAPS)
INPUTS = tl.constexpr(columns.INPUTS)
WIDTH = tl.constexpr(columns.WIDTH)
ROW_MAP = tl.constexpr(columns.ROW_MAP)
COLUMN_MAP = tl.constexpr(columns.COLUMN_MAP)
STUDENT_TAP = tl.constexpr(columns.STUDENT_TAP)
ROW_GROUP = tl.constexpr(columns.ROW_GROUP)
COLUMN_GROUP = tl.constexpr(columns.COLUMN_GROUP)
LINE = tl.constexpr(columns.LINE)
PARTS = tl.constexpr(columns.PARTS)
PART = tl.constexpr(columns.PART)
PART_PLACE = tl.constexpr(columns.PART_PLACE)
UNIT = tl.constexpr(columns.UNIT)
WEIGHT = tl.constexpr(columns.WEIGHT)
TEACHER = tl.constexpr(columns.TEACHER)
STUDENT = tl.constexpr(columns.STUDENT)
D_WEIGHT = tl.constexpr(columns.D_WEIGHT)
ROW_ALPHA = tl.constexpr(columns.ROW_ALPHA)
COLUMN_ALPHA = tl.constexpr(columns.COLUMN_ALPHA)
STRIDE = tl.constexpr(columns.STRIDE)
FILTERED = tl.constexpr(columns.FILTERED)
SUMMED = tl.constexpr(columns.SUMMED)
PRODUCT = tl.constexpr(columns.PRODUCT)
PRODUCT_STRIDE = tl.constexpr(columns.PRODUCT_STRIDE)
LINES = tl.constexpr(columns.LINES)


@triton.jit
def exists(address, offset):
    """Whether there is a tensor, in the shape of `offset`: the interpreter cannot combine a mask with a number."""
    return (address + tl.zeros_like(offset)) != 0


@triton.jit
def read(address, offset, mask, dtype: tl.constexpr):
    """Elements in float32; zero where masked, and where there is no tensor."""
    there = mask & exists(address, offset)
    return tl.load(address.to(tl.pointer_type(dtype)) + offset, mask=there, other=0.0).to(tl.float32)


@triton.jit
def write(address, offset, value, mask, dtype: tl.constexpr):
    """Write elements; nothing where masked, and where there is no tensor."""
    there = mask & exists(address, offset)
    tl.store(address.to(tl.pointer_type(dtype)) + offset, value.to(dtype), mask=there)


@triton.jit
def factor(address, offset, mask, dtype: tl.constexpr):
    """Elements in float32; one where there is no tensor."""
    return tl.where(address != 0, read(address, offset, mask, dtype), 1.0)


@triton.jit
def sizes(geo):
    """Outputs, inputs, taps, and the inner width of the product."""
    return tl.load(geo + OUTPUTS), tl.load(geo + INPUTS), tl.load(geo + TAPS), tl.load(geo + WIDTH)


@triton.jit
def stride(dyn, column: tl.constexpr):
    """A stride; no tensor of a layer has more elements than 32 bits count."""
    return tl.load(dyn + column).to(tl.int32)


@triton.jit
def place_of(dyn, g, o, i):
    """Where an element of the weight lies, at the first tap."""
    return g * stride(dyn, STRIDE) + o * stride(dyn, STRIDE + 1) + i * stride(dyn, STRIDE + 3)


@triton.jit
def kernel_place_of(dyn, g, o, c, k):
    """Where an element of a product's kernel lies."""
    rows = g * stride(dyn, PRODUCT_STRIDE) + o * stride(dyn, PRODUCT_STRIDE + 1)
    return rows + c * stride(dyn, PRODUCT_STRIDE + 2) + k * stride(dyn, PRODUCT_STRIDE + 3)


@triton.jit
def both_networks(dyn, geo, maps, g, o, i, mask_o, mask_i, dtype: tl.constexpr):
    """What a tile is to both networks at its first tap; any of o and i may be the column.

    Alpha, where the elements lie in the teacher and in the student, and which of them the student has.
    """
    outputs, inputs, _, _ = sizes(geo)
    alpha = factor(tl.load(dyn + ROW_ALPHA), g * tl.load(geo + ROW_GROUP) + o, mask_o, dtype) * factor(
        tl.load(dyn + COLUMN_ALPHA), g * tl.load(geo + COLUMN_GROUP) + i, mask_i, dtype
    )
    row, column, student = g * outputs + o, g * inputs + i, tl.load(dyn + STUDENT)
    row_map = tl.load(maps + tl.load(geo + ROW_MAP) + row, mask=mask_o & exists(student, row), other=-1)
    column_map = tl.load(maps + tl.load(geo + COLUMN_MAP) + column, mask=mask_i & exists(student, column), other=-1)
    return alpha, place_of(dyn, g, o, i), row_map + column_map, (row_map >= 0) & (column_map >= 0)


@triton.jit
def upstream(dyn, geo, alpha, here, there, shared, k, mask, dtype: tl.constexpr):
    """The gradient of M at a tap of a tile, from both networks: the tile is as `both_networks` has it."""
    of_teacher = read(tl.load(dyn + TEACHER), here + k * stride(dyn, STRIDE + 2), mask, dtype)
    of_student = read(tl.load(dyn + STUDENT), there + k * tl.load(geo + STUDENT_TAP), mask & shared, dtype)
    return alpha * of_teacher + of_student


@triton.jit
def on_line(geo, number: tl.constexpr, k):
    """Whether tap k lies on a line, the line's length, and where on it."""
    length = tl.load(geo + LINE + 3 * number)
    step = tl.maximum(tl.load(geo + LINE + 3 * number + 2), 1)
    ahead = k - tl.load(geo + LINE + 3 * number + 1)
    place = ahead // step
    return (ahead >= 0) & (place * step == ahead) & (place < length), length, place
