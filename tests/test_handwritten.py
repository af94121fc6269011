"""The models of `bench.zoo.handwritten`: exact in both modes on another batch, and covered as their entries say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import gpd_fx
from bench.zoo.check import randomise, switch_off_randomness
from bench.zoo.entry import Entry
from bench.zoo.exact import Exact
from bench.zoo.handwritten import MODELS
from gpd_fx.verify.verification import relative_error


def another_batch(example: Any) -> Any:
    """Three samples in the place of two: new values, integers within the example's range."""
    generator = torch.Generator().manual_seed(3)

    def other(tensor: Tensor) -> Tensor:
        shape = (3, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=tensor.dtype)
        return torch.randint(int(tensor.max()) + 1, shape, generator=generator)

    return pytree.tree_map_only(Tensor, other, example)


@pytest.mark.parametrize(("name", "entry"), MODELS.items(), ids=list(MODELS))
def test_a_model_is_expanded_exactly_and_as_far_as_expected(name: str, entry: Entry) -> None:
    model = switch_off_randomness(randomise(entry.build().double()))
    args, kwargs = entry.inputs()
    teacher = gpd_fx.expand(model, 2.0, args, example_kwargs=kwargs)
    report = teacher.report()
    assert not [e for e in report.frozen if "its rule failed" in e.reason]
    assert report.coverage >= entry.coverage, report
    args, kwargs = another_batch((args, kwargs))
    for training in (False, True):
        source = copy.deepcopy(model).train(training)
        before = copy.deepcopy(dict(teacher.named_buffers()))
        with torch.no_grad(), Exact():
            expected = source(*args, **kwargs)
            outputs = teacher.train(training).both(*args, **kwargs)
            for buffer, value in before.items():
                teacher.get_buffer(buffer).copy_(value)
        for output in outputs:
            assert relative_error(expected, output) < 1e-12
