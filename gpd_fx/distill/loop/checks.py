"""What is tried before a run begins: whether a model takes the images and knows their classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpd_fx.errors import ArgumentError
from gpd_fx.losses import select_logits


def example_images(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    """Two random images, on the model's device and in its dtype."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.randn(2, *size).to(first.device, first.dtype)


def check_model(model: nn.Module, name: str, example: Tensor, classes: int) -> None:
    """Refuse a model that does not give as many logits as there are classes.

    Raises:
        ArgumentError: it does not take the images, or gives something else.
    """
    try:
        shape = _logits(model, example).shape
    except RuntimeError as error:
        raise ArgumentError(
            f"student {name!r} does not take images of {list(example.shape[1:])}: {error}; give input_size, or options "
            "of the model"
        ) from error
    if len(shape) != 2 or shape[1] != classes:
        raise ArgumentError(
            f"student {name!r} gives {list(shape[1:])} values an image, the data have {classes} classes; "
            f"give the model an option, as in {name.partition(',')[0]},num_classes={classes}"
        )


@torch.no_grad()
def _logits(model: nn.Module, example: Tensor) -> Tensor:
    training = model.training
    try:
        return select_logits(model.eval()(example))
    finally:
        model.train(training)
