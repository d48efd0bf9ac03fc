"""Heartbeats between the processes of a run, which show that another process was stopped or cannot be reached.

A process that is killed closes its connections, which ends the collectives of the others. A process that is stopped, or
whose machine has failed, does not. JAX would then end the others by a signal and print its C++ stack.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax

_PER_TIMEOUT = 20
"""Heartbeats per timeout."""


def start(client: Any, own: int, count: int, timeout: float, give_up: Callable[[str], None]) -> Callable[[], None]:
    """Sends this process's heartbeats, and gives up if another process has sent none for ``timeout`` seconds.

    Sending and checking run in their own threads, so a slow compilation or transfer does not count as a failure.
    Silence is counted in intervals and not by the clock, so a process that was itself stopped for a while does not
    consider the others dead. Process 0 gives up last, because JAX ends the others when process 0 ends.

    Args:
        client: JAX's client of the key-value store, which is kept by process 0.
        own: index of this process.
        count: number of processes.
        timeout: seconds without a heartbeat after which a process counts as lost.
        give_up: called once, in another thread, with a message that names the silent process.

    Returns:
        A function that stops both threads; call it at the end of the program.
    """
    interval = timeout / _PER_TIMEOUT
    limit = _PER_TIMEOUT + (2 if own == 0 else 0)
    silence = [0] * count  # intervals since each process's last heartbeat was seen
    finished = threading.Event()

    def beat() -> None:
        last_beats: dict[str, str] = {}
        for number in itertools.count():
            with suppress(jax.errors.JaxRuntimeError):  # without an answer, the silence continues
                client.key_value_set(f"fedmezo/heartbeat/{own}", str(number), allow_overwrite=True)
                beats = dict(client.key_value_dir_get("fedmezo/heartbeat/"))
                for index in range(count):
                    name = f"fedmezo/heartbeat/{index}"
                    if beats.get(name) != last_beats.get(name):
                        silence[index] = 0
                last_beats = beats
            if finished.wait(interval):
                return

    def check() -> None:
        while not finished.wait(interval):
            for index in range(count):
                silence[index] += 1
            if max(silence) > limit:
                # If process 0 does not answer, this process does not see its own heartbeats either.
                lost = 0 if silence[own] > limit // 2 else silence.index(max(silence))
                give_up(
                    f"process {lost} has sent no heartbeat for {timeout} s: it has ended, was stopped or cannot be "
                    "reached: end it if it still runs, and start all processes again; a run that had begun continues "
                    "with --resume"
                )
                return

    threads = [threading.Thread(target=work, daemon=True) for work in (beat, check)]
    for thread in threads:
        thread.start()

    def stop() -> None:
        finished.set()
        for thread in threads:
            thread.join()

    return stop
