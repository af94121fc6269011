"""What only a CUDA device can tell: the kernels that a call launches, and its time as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernels_launched(run: Callable[[], object]) -> int | None:
    """How many kernels a call launches; copies and fills by the driver do not count. None without a profiler."""
    run()
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
    except RuntimeError:  # a driver may keep its counters to itself
        return None
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events) or None


def record(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
    """A call as a CUDA graph: what replays it, and the tensors that a replay writes.

    Raises:
        RuntimeError: the call does something that capture does not allow, such as waiting for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # autotuning and lazy initialisation come before the capture
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return graph.replay, kept
