"""A run over several processes: how they find each other, agree on what to do, and end together.

All of them run the same program on the same configuration and decide alike from the same numbers. Once it runs, nothing
lies between them but the mesh's collectives; before that, and around files, they tell each other how it went through
the key-value store of JAX's own coordination service, whose every answer has a time limit.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the store has no public name; Orbax takes it from here too

from fedmezo_jax.errors import UserError

T = TypeVar("T")
_turns = itertools.count()
_timeout = 300
_LOST = re.compile(r"gloo|nccl|connection|unavailable|deadline|coordination|heartbeat|peer|socket|barrier", re.I)


def join(text: str | None, timeout: int) -> None:
    """Connects this process with the others of its run; to be called before anything touches a device.

    Args:
        text: ``ADDRESS:PORT,COUNT,INDEX``: where process 0 listens, how many processes there are, and which of them
            this one is, from 0; ``auto``: all of it from the launcher, as ``jax.distributed.initialize`` finds it
            (SLURM, Open MPI, GKE and other Kubernetes, TPU pods); None: as ``auto`` where a launcher's environment
            tells of several processes, and else alone.
        timeout: seconds after which a process that does not answer is given up.

    Raises:
        UserError: the text says something else, or the processes did not find each other.
    """
    global _timeout
    settings: dict[str, Any] = {}
    if text is None and not _launched():
        return
    if text not in (None, "auto"):
        found = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text)
        if found is None or int(found[3]) >= int(found[2]):
            raise UserError(f"--processes {text}: give it as ADDRESS:PORT,COUNT,INDEX with INDEX below COUNT, or auto")
        count, index = int(found[2]), int(found[3])
        settings = {"coordinator_address": found[1], "num_processes": count, "process_id": index}
        settings["cluster_detection_method"] = "deactivate"
    _timeout = timeout
    complaint = (
        f"--processes {text or 'auto'}: not all processes have come together within {timeout} s: start all of them, "
        "with the same address and count"
    )
    # JAX ends a process that waited in vain by a signal and its C++ stack: it is not let come to that.
    watch = threading.Timer(timeout, _give_up, [complaint])
    watch.daemon = True
    watch.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM and go on
    limits = ("initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds")
    try:
        jax.distributed.initialize(**settings, **dict.fromkeys(limits, timeout + 60))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{complaint} ({_first_line(error)})") from None
    finally:
        watch.cancel()


def _give_up(complaint: str) -> None:
    print("error:", complaint, file=sys.stderr, flush=True)
    os._exit(2)


def _launched() -> bool:
    """Whether a launcher's environment tells of several processes."""
    counts = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    several = any(count.isdecimal() and int(count) > 1 for count in counts)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "JAX_COORDINATOR_ADDRESS" in os.environ


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def together(make: Callable[[], T]) -> T:
    """``make()``, and then a wait for the others' to be done; what one process refuses, all do.

    Raises:
        UserError: ``make`` raised it here or in another process, or another process did not answer in time.
    """
    if jax.process_count() == 1:
        return make()
    try:
        made, refusal = make(), ""
    except UserError as error:
        made, refusal = None, str(error)
    for index, theirs in enumerate(_exchange(refusal)):
        if theirs:
            raise UserError(theirs if refusal else f"process {index}: {theirs}")
    return made  # pyright: ignore[reportReturnType]


def agree(said: Mapping[str, Any]) -> None:
    """Checks that all processes were started alike.

    Args:
        said: what must be the same everywhere.

    Raises:
        UserError: it is not; names what differs, in every process in the same words.
    """
    everyone = [json.loads(text) for text in _exchange(json.dumps(said, default=str))]
    for index, theirs in enumerate(everyone):
        ours = everyone[0]
        if odd := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            described = ", ".join(f"{key} ({ours.get(key)} in process 0, {theirs.get(key)} there)" for key in odd)
            raise UserError(f"process {index} was started otherwise: {described}: start all processes alike")


def _exchange(text: str) -> list[str]:
    """Every process's text, in their order."""
    client, turn = distributed.global_state.client, next(_turns)
    if client is None:
        return [text]
    client.key_value_set(f"fedmezo/{turn}/{jax.process_index()}", f"{text} ")  # the store takes no empty value
    texts = []
    for index in range(jax.process_count()):
        try:
            texts.append(client.blocking_key_value_get(f"fedmezo/{turn}/{index}", _timeout * 1000)[:-1])
        except jax.errors.JaxRuntimeError:
            raise UserError(
                f"process {index} has not answered within {_timeout} s: see what it printed, then start all again; "
                "a run that had begun goes on with --resume"
            ) from None
    return texts


@contextmanager
def told() -> Iterator[None]:
    """Turns the runtime's error about a process that can no longer be reached into a line that says so."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _LOST.search(str(error)):
            raise
        raise UserError(
            f"another process has ended or can no longer be reached ({_first_line(error)}): start all of them again, "
            "with --resume"
        ) from None


def leave(code: int) -> None:
    """Ends a process that has failed. Returns where it is the only one.

    An ordinary exit would wait for processes that may be gone; and the first one, through which the others hear, leaves
    last.
    """
    client = distributed.global_state.client
    if client is None:
        return
    with suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier("fedmezo/leave", 3000)
    os._exit(code)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
