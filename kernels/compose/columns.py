"""The tables that the tile kernels read, column by column; `tables.py` fills them, `tile_parts.py` reads them."""

from __future__ import annotations

TASK = 7
"""What a task says of itself, integers: layer, kind, whether it is small, group, where its blocks start, part."""

GEO = 22
"""What is known of a layer, integers: sizes, where its maps start, how alpha is indexed, three lines, parts."""
GROUPS, OUTPUTS, TAPS, INPUTS, WIDTH = range(5)
ROW_MAP, COLUMN_MAP, STUDENT_TAP, ROW_GROUP, COLUMN_GROUP = range(5, 10)
LINE = 10  # length, first tap, step between taps
PARTS, PART, PART_PLACE = range(19, 22)  # how many, of how many lines, and where they are kept, in units of UNIT
UNIT = 64

DYN = 54
"""Addresses and strides of a layer's tensors; an address of zero: there is none."""
WEIGHT, TEACHER, STUDENT, D_WEIGHT, ROW_ALPHA, COLUMN_ALPHA = range(6)
STRIDE = 6  # of group, output, tap, input
FILTERED = 10  # three times v, P, F, dv, dP
SUMMED = 25  # v, P, F, dv, dP, dF
PRODUCT = 31  # v, P, K, dv, dP, dK
PRODUCT_STRIDE = 37  # of K: group, output, inner channel, tap
LINES = 41  # three times v, L, dv, dL
