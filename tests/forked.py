"""Calls in processes of their own that begin where the test is, so they need not import torch again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None


def _quiet(call: Callable[[], Any], log: Path) -> None:
    with log.open("a") as file:
        try:
            call()
        except BaseException:  # noqa: BLE001  all of it is reported
            traceback.print_exc(file=file)
            file.flush()
            os._exit(1)
    os._exit(0)  # without what pytest does at the end


def start(call: Callable[[], Any], log: Path) -> BaseProcess:
    """Run `call` in a process; its traceback goes to `log`."""
    assert _FORK is not None
    process = _FORK.Process(target=_quiet, args=(call, log))
    process.start()
    return process


def distributed(call: Callable[[int], Any], folder: Path, world: int = 2) -> None:
    """Run `call(rank)` in processes that find each other as `torchrun` would let them; fails where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def one(rank: int) -> None:
        from accelerate.state import AcceleratorState

        reset: Any = vars(AcceleratorState)["_reset_state"]
        reset.__func__(reset_partial_state=True)  # what the test's own process is
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        call(rank)

    log = folder / "errors.txt"
    processes = [start(lambda rank=rank: one(rank), log) for rank in range(world)]
    for process in processes:
        process.join(60)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, "a process waits for ever"
    assert all(process.exitcode == 0 for process in processes), log.read_text()
