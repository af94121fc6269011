"""Calls in processes of their own, forked from one that has imported everything and computed nothing.

The test's own process may not be forked: autograd's threads do not survive that.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


def _run(function: Callable[..., Any], args: tuple[Any, ...], log: Path) -> None:
    import torch

    torch.set_num_threads(1)
    with log.open("a") as file:
        try:
            function(*args)
        except BaseException:  # noqa: BLE001  all of it is reported
            traceback.print_exc(file=file)
            file.flush()
            os._exit(1)
    os._exit(0)


def start(log: Path, function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Run a function of a module in a process; its traceback goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    process = context.Process(target=_run, args=(function, args, log))
    process.start()
    return process


def _one(function: Callable[..., Any], args: tuple[Any, ...], names: dict[str, str]) -> None:
    os.environ.update(names)
    function(*args)


def distributed(folder: Path, function: Callable[..., Any], *args: Any, world: int = 2) -> None:
    """Run a function in processes that find each other as under `torchrun`; fails where it fails in one."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives them, as torchrun's does
    log = folder / "errors.txt"
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    processes = [
        start(log, _one, function, args, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    for process in processes:
        process.join(100)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert all(process.exitcode == 0 for process in processes), log.read_text() or "a process waits for ever"
