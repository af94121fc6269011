"""The models that sweeps run over: how each is built, and inputs that are small but hard."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.zoo.entry import Entry, Inputs
from gpd_fx.fxtools.fake_tensors import fake_call
from gpd_fx.io.models import resolve

SIDES = (64, 96, 128, 224, 256, 384)

CORE = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:efficientnet_b0",
    "torchvision:densenet121",
    "torchvision:googlenet",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:squeezenet1_1",
    "torchvision:mnasnet1_0",
    "torchvision:regnet_y_400mf",
    "torchvision:resnext50_32x4d",
    "torchvision:convnext_tiny",
    "torchvision:vit_b_16",
    "torchvision:swin_t",
    "timm:deit_tiny_patch16_224",
    "timm:mixer_s32_224",
    "timm:resnet26d",
    "timm:ghostnet_100",
    "timm:repvgg_a0",
)


def entry_of(name: str) -> Entry:
    """How the model of a sweep's name is built, and its inputs.

    A name is `own:NAME`, `hf:NAME`, `torchvision:NAME`, `timm:NAME` or anything else that `gpd_fx.models` resolves.
    """
    from bench.zoo import handwritten, huggingface, torchvision_models

    listed = handwritten.MODELS | huggingface.MODELS | torchvision_models.MODELS
    return (
        listed[name] if name in listed else Entry(lambda: _resolve(name), lambda: inputs_for(_resolve(name).double()))
    )


def _resolve(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some models warn about their own default initialisation
        return resolve(name)


def _own() -> tuple[str, ...]:
    from bench.zoo.handwritten import MODELS

    return tuple(MODELS)


def _hugging_face() -> tuple[str, ...]:
    from bench.zoo.huggingface import MODELS

    return tuple(MODELS)


def _torchvision() -> tuple[str, ...]:
    from bench.zoo.torchvision_models import MODELS, classification

    return (*classification(), *MODELS)


def _timm() -> tuple[str, ...]:
    from bench.zoo.timm_models import names

    return tuple(f"timm:{name}" for name in names())


GROUPS: dict[str, Callable[[], tuple[str, ...]]] = {
    "core": lambda: CORE,
    "own": _own,
    "hf": _hugging_face,
    "torchvision": _torchvision,
    "timm": _timm,
    "all": lambda: tuple(dict.fromkeys([*_own(), *_hugging_face(), *_torchvision(), *_timm(), *CORE])),
}


def inputs_for(model: nn.Module, dtype: torch.dtype = torch.float64) -> Inputs:
    """Random images, a batch of 2, of the smallest side that the model takes in both modes."""
    config = getattr(model, "pretrained_cfg", None)
    channels = 3
    sides = SIDES
    if isinstance(config, dict) and "input_size" in config:
        channels, height, _ = config["input_size"]
        sides = (height,) if config.get("fixed_input_size") else (*SIDES, height)
    for side in sides:
        example = (torch.randn(2, channels, side, side, dtype=dtype),)
        if all(_takes(model.train(mode), example) for mode in (True, False)):
            return example, {}
    raise ValueError(f"{type(model).__name__} takes no square image of side {sides}")


def _takes(model: nn.Module, example: tuple[Any, ...]) -> bool:
    try:
        fake_call(model, example, {})
    except Exception:  # noqa: BLE001  whatever a model raises on an image that is too small
        return False
    return True
