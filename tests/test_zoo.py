"""A few models of other libraries, in the way that `python -m bench.zoo` checks all of them."""

from __future__ import annotations

import pytest

from bench.zoo.check import check
from bench.zoo.models import entry_of

pytestmark = [pytest.mark.zoo, pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("torchvision:shufflenet_v2_x1_0", 1.5),  # channel shuffle
        ("torchvision:mobilenet_v3_small", 3.0),  # depthwise, squeeze and excitation
        ("timm:deit_tiny_patch16_224", 1.5),  # attention; layer norm makes the ratio whole
        ("timm:ghostnet_100", 2.0),  # concatenation and slicing of cheap features
    ],
)
def test_a_model_is_expanded_exactly_and_nearly_wholly(name: str, ratio: float) -> None:
    entry = entry_of(name)
    record = check(name, entry.build, entry.inputs(), ratios=[ratio], onnx=False)
    assert record.exact, record
    assert record.coverage >= 0.99
    assert record.factor > 1.7
