"""Example inputs are inferred from what a model says about itself, or refused with a reason."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpd_fx
from gpd_fx.capture.example_inputs import example_inputs, prepare
from gpd_fx.errors import CaptureError, InputError


class Chain(nn.Module):
    """A sequence that also takes attributes."""

    def __init__(self, *layers: nn.Module, **attributes: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def head(channels: int, side: int, dims: int = 2) -> tuple[nn.Module, ...]:
    """Layers that only fit images of one size."""
    return nn.Flatten(), nn.Linear(channels * side**dims, 5)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Chain(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)), (2, 3, 224, 224)),
        (Chain(nn.Conv2d(1, 4, 3, padding=1), *head(4, 28)), (2, 1, 28, 28)),
        (Chain(nn.Conv2d(3, 4, 3, padding=1), *head(4, 32)), (2, 3, 32, 32)),
        (Chain(nn.Conv2d(3, 4, 3, padding=1), *head(4, 48), image_size=48), (2, 3, 48, 48)),
        (Chain(nn.Conv2d(3, 4, 3, padding=1), *head(4, 40), img_size=40), (2, 3, 40, 40)),
        (Chain(nn.Conv2d(3, 4, 3), default_cfg={"input_size": (3, 17, 19)}), (2, 3, 17, 19)),
        (Chain(nn.Conv2d(2, 4, 3), pretrained_cfg={"input_size": (2, 9, 9)}), (2, 2, 9, 9)),
        (Chain(nn.Conv1d(2, 4, 3)), (2, 2, 224)),
        (Chain(nn.Conv3d(1, 2, 3)), (2, 1, 16, 16, 16)),
        (Chain(nn.Linear(7, 4), nn.BatchNorm1d(4)), (2, 7)),
        (Chain(nn.Linear(7, 4), nn.MultiheadAttention(4, 2).out_proj), (2, 7)),
        (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), (2, 8)),
    ],
)
def test_floating_inputs(model: nn.Module, shape: tuple[int, ...]) -> None:
    (inputs,) = example_inputs(model.eval())
    assert inputs.shape == shape
    model(inputs)


def test_tokens() -> None:
    (ids,) = example_inputs(Chain(nn.Embedding(11, 4), nn.Linear(4, 2)))
    assert ids.shape == (2, 16)
    assert not ids.is_floating_point()
    assert 0 <= int(ids.min()) <= int(ids.max()) < 11


class Described(nn.Module):
    """What models of Hugging Face say about themselves."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(9, 4), nn.Conv2d(1, 4, 2)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *, input_ids: Tensor | None = None, pixel_values: Tensor | None = None) -> Tensor:
        if input_ids is not None:
            return self.embed(input_ids)
        assert pixel_values is not None
        return self.conv(pixel_values)


def test_keyword_inputs() -> None:
    text = Described(config=SimpleNamespace(vocab_size=9), dummy_inputs={"input_ids": torch.tensor([[7, 100, 3]] * 2)})
    args, kwargs = prepare(text, None, None)
    assert args == ()
    assert torch.equal(kwargs["input_ids"], torch.tensor([[7, 1, 3]] * 2))
    image = Described(main_input_name="pixel_values", config=SimpleNamespace(image_size=6, num_channels=1))
    assert prepare(image, None, None)[1]["pixel_values"].shape == (2, 1, 6, 6)
    sides = Described(main_input_name="pixel_values", config=SimpleNamespace(image_size=(4, 6), num_channels=1))
    assert prepare(sides, None, None)[1]["pixel_values"].shape == (2, 1, 4, 6)
    with pytest.raises(
        InputError, match=r"Described takes keyword inputs \(pixel_values\); pass example_inputs and exam"
    ):
        example_inputs(image)


def test_a_wrong_description_is_passed_over() -> None:
    model = Chain(nn.Conv2d(3, 4, 3, padding=1), *head(4, 32), default_cfg={"input_size": (1, 5, 5)})
    assert example_inputs(model)[0].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_device_are_the_models(dtype: torch.dtype) -> None:
    (inputs,) = example_inputs(Chain(nn.Conv2d(3, 4, 3)).to(dtype))
    assert inputs.dtype == dtype
    (inputs,) = example_inputs(Chain(nn.Linear(3, 4)).to("meta"))
    assert inputs.device.type == "meta"


def test_trying_changes_nothing() -> None:
    model = Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model.get_submodule("layers.1").eval()
    before = copy.deepcopy(model)
    example_inputs(model)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_given_inputs_are_taken_as_they_are() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    args, kwargs = prepare(nn.Identity(), [x], {"y": y})
    assert args == (x,)
    assert kwargs == {"y": y}
    assert prepare(nn.Identity(), (), None) == ((), {})


def test_nothing_to_go_by() -> None:
    with pytest.raises(InputError, match=r"cannot tell what Identity takes as input; pass example_inputs=\(\.\.\.\)"):
        example_inputs(nn.Identity())


def test_control_flow_is_not_taken_for_a_wrong_guess() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h if h.sum() > 0 else -h

    with pytest.raises(
        CaptureError, match=r"cannot capture Branches in eval mode at File .*, in forward.*torch\.where"
    ):
        gpd_fx.expand(Branches())
