"""Models of torchvision: all for classification by name, and those for other tasks with inputs of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torchvision
from torch import Tensor, nn
from torchvision.models import optical_flow, segmentation, video
from torchvision.models.detection import backbone_utils
from torchvision.models.optical_flow import raft
from torchvision.models.video import mvit

from bench.zoo.entry import Entry, normal

_BLANK = {"weights": None, "weights_backbone": None}  # some fetch a backbone's weights unless told not to


def classification() -> tuple[str, ...]:
    """The names of all classification models."""
    return tuple(f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models))


def _quietly(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def quiet() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some models warn about their own initialisation
            return build()

    return quiet


def _entry(build: Callable[..., nn.Module], options: dict[str, Any], *shapes: tuple[int, ...]) -> Entry:
    return Entry(_quietly(partial(build, **options)), normal(*shapes))


def _segmentation() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for name in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        for aux in (False, True):
            if aux and name.startswith("lraspp"):
                continue
            options = _BLANK | ({} if name.startswith("lraspp") else {"aux_loss": aux})
            found[f"{name}.aux" if aux else name] = _entry(getattr(segmentation, name), options, (3, 65, 65))
    return found


_VIDEO = {  # frames, height and width
    "r3d_18": (4, 32, 32),
    "mc3_18": (4, 32, 32),
    "r2plus1d_18": (4, 32, 32),
    "s3d": (16, 224, 224),  # the last pooling takes no less
    "swin3d_t": (4, 64, 64),
}


def _small_mvit(name: str) -> nn.Module:
    """With position tables for clips of 4 frames of 64 x 64; the zoo's are for 16 of 224 x 224."""
    full: Callable[..., nn.Module] = vars(mvit)["_mvit"]

    def small(**options: Any) -> nn.Module:
        return full(**(options | {"spatial_size": (64, 64), "temporal_size": 4}))

    with patch.object(mvit, "_mvit", small):
        return getattr(video, name)(weights=None)


class Flow(nn.Module):
    """RAFT with two steps of refinement, and its grid, which is always float32, in the images' dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.raft = optical_flow.raft_small(weights=None)

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        grid = raft.make_coords_grid
        with patch.object(raft, "make_coords_grid", lambda *args, **options: grid(*args, **options).to(first.dtype)):
            return self.raft(first, second, num_flow_updates=2)


def _mobilenet_fpn() -> nn.Module:
    return backbone_utils.mobilenet_backbone("mobilenet_v3_large", weights=None, fpn=True)


MODELS: dict[str, Entry] = {
    **{f"torchvision:segmentation.{name}": entry for name, entry in _segmentation().items()},
    **{
        f"torchvision:video.{name}": _entry(getattr(video, name), {"weights": None}, (3, *clip))
        for name, clip in _VIDEO.items()
    },
    **{
        f"torchvision:video.{name}": _entry(_small_mvit, {"name": name}, (3, 4, 64, 64))
        for name in ("mvit_v1_b", "mvit_v2_s")
    },
    "torchvision:optical_flow.raft_small": _entry(Flow, {}, (3, 128, 128), (3, 128, 128)),
    "torchvision:detection.resnet18_fpn": _entry(
        backbone_utils.resnet_fpn_backbone,
        {"backbone_name": "resnet18", "weights": None, "trainable_layers": 5},
        (3, 64, 96),
    ),
    "torchvision:detection.mobilenet_v3_large_fpn": _entry(_mobilenet_fpn, {}, (3, 64, 96)),
}
