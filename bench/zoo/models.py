"""The models that sweeps run over, by name, with the side of a square image that is large enough to be hard."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpd_fx.models import resolve

CORE: dict[str, int] = {
    "torchvision:resnet18": 64,
    "torchvision:resnet50": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:densenet121": 64,
    "torchvision:googlenet": 96,
    "torchvision:shufflenet_v2_x1_0": 64,
    "torchvision:squeezenet1_1": 64,
    "torchvision:mnasnet1_0": 64,
    "torchvision:regnet_y_400mf": 64,
    "torchvision:resnext50_32x4d": 64,
    "torchvision:convnext_tiny": 64,
    "torchvision:vit_b_16": 224,
    "torchvision:swin_t": 96,
    "timm:deit_tiny_patch16_224": 224,
    "timm:mixer_s32_224": 224,
    "timm:resnet26d": 64,
    "timm:ghostnet_100": 64,
    "timm:repvgg_a0": 64,
}


def builder(name: str) -> Callable[[], nn.Module]:
    """A function that builds the model anew, without weights from anywhere."""

    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some models warn about their own default initialisation
            return resolve(name)

    return build


def image_inputs(side: int, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random float64 images as (args, kwargs)."""
    return (torch.randn(batch, 3, side, side, dtype=torch.float64),), {}
