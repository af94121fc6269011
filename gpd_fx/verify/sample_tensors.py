"""The tensors that a capture is checked with, and those of its wide graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor, fx

from gpd_fx.fxtools.attributes import fetch
from gpd_fx.numerics.precision import Precision
from gpd_fx.plan.plan import Plan


@dataclass(frozen=True)
class Source:
    """The tensors that a capture reads, in some precision, perturbed if there is a seed; made anew at each call."""

    capture: fx.GraphModule
    seed: int | None

    def tensors(self, precision: Precision) -> dict[str, Tensor]:
        """All of them; tied ones are one tensor."""
        same: dict[int, Tensor] = {}
        return {target: self._make(target, value, same, precision) for target, value in self._values()}

    def widened(self, plan: Plan, key: str, precision: Precision) -> dict[str, Tensor]:
        """Those of the wide graph, one made after the other."""
        wide: dict[int, Tensor] = {}
        out: dict[str, Tensor] = {}
        for target, value in self._values():
            if id(value) not in wide:
                shaped = plan.tensors[plan.analysis.canonical.get(target) or f"{key}:{target}"]
                made = self._make(target, value, {}, precision)
                wide[id(value)] = shaped.scale_(shaped.widen(made)) if shaped.scales else shaped.widen(made)
            out[target] = wide[id(value)]
        return out

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        for node in self.capture.graph.find_nodes(op="get_attr"):
            value = fetch(self.capture, str(node.target))
            if isinstance(value, Tensor):
                yield str(node.target), value

    def _make(self, target: str, value: Tensor, same: dict[int, Tensor], precision: Precision) -> Tensor:
        if id(value) not in same:
            plain = precision.exact(value.detach())
            same[id(value)] = plain if self.seed is None else _perturb(plain, crc32(f"{self.seed}/{target}".encode()))
        return same[id(value)]


def _perturb(tensor: Tensor, seed: int) -> Tensor:
    """Each value changed by up to a half, zeros made small and positive; integers as they are."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor
    real = tensor.real.dtype if tensor.is_complex() else tensor.dtype
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
    factor = drawn.add_(0.5).to(tensor.device, real)
    return factor.mul_(tensor.masked_fill(tensor == 0, 0.1)) if not tensor.is_complex() else factor * tensor
