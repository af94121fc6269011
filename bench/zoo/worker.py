"""A process that checks models, and is replaced when it dies, hangs or has grown."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from bench.zoo.one import MARK

_GROWN = 3 * 2**30  # bytes of memory that a process may have taken before the next model gets a new one


class Worker:
    """Runs `bench.zoo.one` with the given options."""

    def __init__(self, options: Sequence[str], timeout: float, threads: int) -> None:
        self._command = [sys.executable, "-m", "bench.zoo.one", *options]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._timeout = timeout
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the worker
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._log.close()

    def check(self, name: str) -> dict[str, Any]:
        """The record of one model, whatever becomes of the process."""
        process = self._process = self._process or self._start()
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._timeout, give_up)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(name + "\n")
            process.stdin.flush()
            line = next((line for line in process.stdout if line.startswith(MARK)), None)
        except BrokenPipeError:
            line = None
        finally:
            timer.cancel()
        if line is None:
            code = process.wait()
            self._stop()
            self._log.seek(0)
            why = (
                f"more than {self._timeout:.0f} s" if late.is_set() else f"{self._log.read()[-2000:]} exit code {code}"
            )
            return {"name": name, "exact": False, "error": why}
        record: dict[str, Any] = json.loads(line.removeprefix(MARK))
        if record["peak"] > _GROWN:
            self._stop()
        return record

    def _start(self) -> subprocess.Popen[str]:
        self._log.seek(0)
        self._log.truncate()
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._environment,
        )

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):  # what it was told last never reached it
                self._process.communicate()
            self._process = None
