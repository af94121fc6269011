"""How well networks do on the test images, and statistics of batch norm measured anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpd_fx.errors import ArgumentError
from gpd_fx.losses import cross_entropy

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Call = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Score:
    """Of one network over all test images.

    Attributes:
        top1: share of images whose class is the one of the largest logit.
        top5: share of images whose class is among the five largest logits, or among all where there are fewer.
        loss: mean cross-entropy.
        images: how many.
    """

    top1: float
    top5: float
    loss: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """The score as values that JSON can hold."""
        return asdict(self)


@torch.no_grad()
def score(
    call: Call,
    batches: Iterable[Any],
    device: torch.device,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Score]:
    """The scores of all networks that `call` gives logits of.

    Args:
        call: images to logits by the networks' names.
        batches: pairs of images and class numbers, all on this process's part.
        device: where the images go.
        total: adds a tensor up over all processes.

    Raises:
        ArgumentError: there is no batch.
    """
    sums: Tensor | None = None
    names: list[str] = []
    for images, target in batches:
        goal = target.to(device)
        outputs = call(images.to(device))
        names = list(outputs)
        rows = [_sums(logits.float(), goal) for logits in outputs.values()]
        sums = torch.stack(rows) if sums is None else sums + torch.stack(rows)
    if sums is None:
        raise ArgumentError("there is no image to evaluate on; every process needs one")
    values = total(sums).tolist()
    return {
        name: Score(top1 / count, top5 / count, loss / count, round(count))
        for name, (top1, top5, loss, count) in zip(names, values, strict=True)
    }


def _sums(logits: Tensor, target: Tensor) -> Tensor:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == target.unsqueeze(1)
    loss = cross_entropy(logits, target) * len(target)
    parts = (best[:, 0].sum(), best.any(1).sum(), loss, torch.tensor(len(target), device=logits.device))
    return torch.stack([part.double() for part in parts])


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Measure the running statistics of all batch norms of `model` anew, as plain means over `batches`.

    Everything else is in eval mode meanwhile. Returns the number of batches; without any the statistics stay.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, _NORMS)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    training, momenta = {layer: layer.training for layer in model.modules()}, [norm.momentum for norm in norms]
    count = 0
    model.eval()
    try:
        for images in batches:
            count += 1
            for norm in norms:
                norm.train()
                norm.momentum = 1 / count  # the mean so far moves by its share towards this batch's
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for layer, mode in training.items():
            layer.training = mode
    return count


def percent(value: float) -> str:
    """A share for a table."""
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
