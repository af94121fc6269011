"""Tables of addresses on their way to a device.

An allocator that gives the same memory every step, as CUDA's does, spares the copy: a plan keeps the last few tables by
their addresses. While a CUDA graph is captured nothing is kept, since its memory is the graph's own, and nothing can be
pinned: the graph gets a piece of memory that was pinned before, and reads it again at every replay.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from gpd_fx.kernels.compose.addresses import Rows

_MOST = 16
_PIECE = 1 << 20
"""Bytes that are pinned at a time, for captures to come."""
_LEAST = 16
"""Tables that there is room for in any case."""


class Pinned:
    """Pinned memory that is handed out once and never freed: nobody says when a graph that reads it is gone."""

    def __init__(self) -> None:
        self._full: list[Tensor] = []
        self._room = torch.empty(0, dtype=torch.int64)
        self._used = 0

    def reserve(self, count: int) -> None:
        """See to it that captures find room for some tables of so many numbers."""
        if len(self._room) - self._used < _LEAST * count:
            if self._used:
                self._full.append(self._room)
            size = max(_PIECE // 8, 2 * _LEAST * count)
            self._room, self._used = torch.empty(size, dtype=torch.int64, pin_memory=torch.cuda.is_available()), 0

    def take(self, table: Tensor) -> Tensor:
        """A copy of a table.

        Raises:
            RuntimeError: there is no room, and while a graph is captured none can be made.
        """
        end = self._used + len(table)
        if end > len(self._room):
            raise RuntimeError(
                f"a CUDA graph composes more than {_LEAST} times, which is what there is pinned memory for: "
                "capture fewer steps at a time, and run one between captures"
            )
        piece = self._room[self._used : end]
        self._used = end
        return piece.copy_(table)


PINNED = Pinned()


def refuse_capture(device: torch.device) -> None:
    """What is made once must not be made while a CUDA graph is captured.

    Raises:
        RuntimeError: one is.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is captured before the composition ran outside of one: run a step first, with the same "
            "gradients, then capture"
        )


class Sent:
    """The last tables of one plan, on their devices."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[int | None, int, tuple[int, ...]], Tensor] = OrderedDict()

    def send(self, rows: Rows, addresses: list[int], device: torch.device) -> Tensor:
        """The table with these addresses, on the device."""
        if device.type != "cuda":
            return rows.table(addresses)
        if torch.cuda.is_current_stream_capturing():
            return PINNED.take(rows.table(addresses)).to(device, non_blocking=True)
        PINNED.reserve(len(rows.template))
        # another stream would have to wait for the copy
        key = (device.index, torch.cuda.current_stream(device).cuda_stream, tuple(addresses))
        sent = self._found.get(key)
        if sent is None:
            sent = rows.table(addresses).pin_memory().to(device, non_blocking=True)
            self._found[key] = sent
            if len(self._found) > _MOST:
                self._found.popitem(last=False)
        else:
            self._found.move_to_end(key)
        return sent
