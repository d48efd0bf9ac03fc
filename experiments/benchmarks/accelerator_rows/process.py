"""A process that measures, as the command sees it; :mod:`worker` is the same from within.

Every row is measured in such a process: one that runs out of memory, hangs or dies takes no other row with it, and one
that is still busy when the time is up can be ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else the peak in use is hard to see, and PyTorch has no room
    "HF_HUB_OFFLINE": "1",
}
_START = f"from {__package__}.worker import main; main()"


class FailedError(Exception):
    """A job ended without all of its rows; the message says why."""


class OutOfTimeError(Exception):
    """The time was up; the process has been ended."""


class Process:
    """A process on the first device that JAX finds, or on the CPU.

    Attributes:
        hello: platform, kind of device and version of JAX.
    """

    def __init__(self, log: Path, seconds: float, cpu: bool = False, compiled: Path | None = None):
        """Starts it, and waits until it has found its device.

        Args:
            log: file for what it prints.
            seconds: how long it is waited for.
            cpu: whether its device is the CPU.
            compiled: folder with compiled programs of other such processes; by default it compiles all by itself.

        Raises:
            FailedError: it found none.
            OutOfTimeError: the time was up.
        """
        cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        if compiled is not None:
            cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment = os.environ | _ENVIRONMENT | cache | ({"JAX_PLATFORMS": "cpu"} if cpu else {})
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        self._log = log
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        try:
            self.hello: dict[str, str] = self._answer(seconds)["hello"]
        except FailedError:
            self.close()
            raise

    def run(
        self, kind: str, wanted: Sequence[str], card: Mapping[str, Any], options: Mapping[str, Any], seconds: float
    ) -> Iterator[dict[str, Any]]:
        """Yields the rows of a job as they come.

        Args:
            kind: one of :data:`worker.KINDS`.
            wanted: names of the rows.
            card: the row of the card.
            options: arguments of the function that measures.
            seconds: time for all rows together.

        Raises:
            FailedError: the job failed, or the process died.
            OutOfTimeError: the time was up.
        """
        until = time.monotonic() + seconds
        self._ask({"kind": kind, "wanted": list(wanted), "card": dict(card), "options": dict(options)})
        while "row" in (answer := self._answer(until - time.monotonic())):
            yield answer["row"]
        if answer["end"] is not None:
            raise FailedError(answer["end"])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # of a request that it has not read
            self._process.stdin.close()

    def _ask(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, which the answer says
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.close()
            raise OutOfTimeError from None
        if line is None:
            raise FailedError(f"the process ended with code {self._process.wait()}: see {self._log}")
        return json.loads(line)

    def _read(self, stream: TextIO) -> None:
        with stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)
