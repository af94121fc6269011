"""The static teacher: an ordinary trained model, or an ONNX file, that only ever answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.losses.feature_taps import Tap, watched, with_features
from gpd_fx.errors import ArgumentError
from gpd_fx.io.extras import need
from gpd_fx.io.models import load_weights, resolve
from gpd_fx.losses import select_logits


class StaticTeacher:
    """Logits of a model in eval mode, without gradients; its parameters are frozen.

    Attributes:
        module: the model, or None for an ONNX file.
    """

    def __init__(self, module: nn.Module, *, compiled: bool = False, select: Callable[[Any], Tensor] = select_logits):
        self.module: nn.Module | None = module.requires_grad_(False).eval()
        self._call: Callable[[Tensor], Any] = torch.compile(module) if compiled else module
        self._select = select
        self._taps: Mapping[str, Tap | None] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The logits of a batch."""
        return self._select(self._call(images)).detach()

    def pick(self, names: Sequence[str], example: Tensor) -> None:
        """From now on `features` are those of these modules or nodes.

        Raises:
            ArgumentError: a name means nothing, or the teacher is compiled or an ONNX file.
        """
        if self.module is None or self._call is not self.module:
            raise ArgumentError("features are taken from a static teacher that is neither compiled nor an ONNX file")
        self.module, self._taps = with_features(self.module, names, example)
        self._call = self.module

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The logits of a batch, and the features that were picked."""
        if not self._taps:
            return self(images), ()
        assert self.module is not None
        modules = [name for name, tap in self._taps.items() if tap is None]
        with watched(self.module, modules) as found:
            logits = self(images)
        values = [tap.take(name) for name, tap in self._taps.items() if tap is not None]
        return logits, tuple(each.detach() for each in (*found, *values))

    def to(self, device: torch.device) -> StaticTeacher:
        """Move to a device."""
        if self.module is not None:
            self.module.to(device)
        return self


class OnnxTeacher(StaticTeacher):
    """The same from an ONNX file, whose first output is the logits."""

    def __init__(self, path: Path) -> None:
        self.module, self._taps = None, {}
        runtime = need("onnxruntime", "a static teacher in an ONNX file", "onnx")
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session: Any = runtime.InferenceSession(
                str(path), options, providers=[name for name in wanted if name in runtime.get_available_providers()]
            )
        except Exception as error:
            raise ArgumentError(f"static_teacher {str(path)!r} cannot be read by ONNX Runtime: {error}") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ArgumentError(f"static_teacher {str(path)!r} has {len(inputs)} inputs; it must take images alone")
        self._input: str = inputs[0].name

    def __call__(self, images: Tensor) -> Tensor:
        """The logits of a batch."""
        return torch.as_tensor(run_session(self._session, self._input, images)).to(images.device)


def run_session(session: Any, name: str, images: Tensor) -> Any:
    """The first output of an ONNX Runtime session for a batch of images."""
    return session.run(None, {name: images.detach().float().cpu().contiguous().numpy()})[0]


def load_static(config: DistillConfig) -> StaticTeacher | None:
    """The static teacher that a configuration names.

    Raises:
        ArgumentError: it cannot be made, or would have random weights.
        CheckpointError: its weights cannot be loaded.
    """
    spec = config.static_teacher
    if spec is None:
        return None
    if spec.endswith(".onnx"):
        if config.static_weights is not None or config.static_compile:
            raise ArgumentError(f"static_teacher {spec!r} is an ONNX file: it has its weights, and is not compiled")
        return OnnxTeacher(Path(spec))
    model = resolve(spec)
    if config.static_weights is not None:
        load_weights(model, config.static_weights)
    elif spec.partition(":")[0] in ("torchvision", "timm"):
        raise ArgumentError(f"static_teacher {spec!r} would have random weights; name a file of them (static_weights)")
    return StaticTeacher(model, compiled=config.static_compile)


def given_static(
    config: DistillConfig, module: nn.Module | None, example: Tensor, classes: int
) -> StaticTeacher | None:
    """The static teacher that is given, or else named; it fits images like the example.

    Raises:
        ArgumentError: it cannot be made or does not fit, or there is none where features need one.
        CheckpointError: its weights cannot be loaded.
    """
    static = load_static(config) if module is None else StaticTeacher(module, compiled=config.static_compile)
    if static is not None:
        _check(static, example, classes)
    elif config.features:
        raise ArgumentError("features are compared with those of a static teacher; name one (static_teacher)")
    return static


def _check(static: StaticTeacher, example: Tensor, classes: int) -> None:
    try:
        shape = static(example).shape
    except Exception as error:
        raise ArgumentError(
            f"the static teacher does not take images of {list(example.shape[1:])}: {type(error).__name__}: {error}"
        ) from error
    if len(shape) != 2 or shape[1] != classes:
        raise ArgumentError(
            f"the static teacher gives {list(shape[1:])} values an image, the data have {classes} classes; it must "
            "have been trained on the same ones"
        )
