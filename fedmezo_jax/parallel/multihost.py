"""A run over several processes: how they connect, agree on what to do, and end together.

All processes run the same program on the same configuration and make the same decisions from the same numbers. During
the rounds they communicate only through the mesh's collectives. Before that, and around files, they exchange short
texts through the key-value store of JAX's coordination service. These waits have no time limit, because a slow
compilation or a slow disk is not a failure. Instead every process sends heartbeats (:mod:`heartbeats`) through the same
store, and a process ends itself if it misses those of another.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import jax
from jax._src import clusters, distributed  # the store has no public name; Orbax imports it from here too

from fedmezo_jax.errors import UserError
from fedmezo_jax.parallel import heartbeats
from fedmezo_jax.parallel.roll_call import listen, roll_call

T = TypeVar("T")
_turns = itertools.count()
_aborting = threading.Event()
_NO_LIMIT = 7 * 24 * 3600 * 1000
"""Milliseconds, longer than any wait: the store's functions require a limit."""
_GRACE = 5
"""Seconds that a process has to end by itself after another one has failed."""
_LOST = re.compile(r"gloo|nccl|connection|unavailable|deadline|coordination|heartbeat|peer|socket|barrier", re.I)


def join(text: str | None, timeout: int) -> None:
    """Connects this process with the others of its run. Call it before any device is used.

    Args:
        text: ``ADDRESS:PORT,COUNT,INDEX`` (where process 0 listens, the number of processes, and the index of this
            process from 0); ``auto`` to take all of these from the launcher, as ``jax.distributed.initialize`` does
            (SLURM, Open MPI, GKE and other Kubernetes, TPU pods); or None, which means ``auto`` if the environment of a
            launcher shows several processes, and a single process otherwise.
        timeout: seconds to wait for a process that does not answer.

    Raises:
        UserError: the text has another form, or the processes could not connect.
    """
    if text is None and not _launched():
        return
    process = _place(text) if text not in (None, "auto") else None
    all_of_them = f"all {process[1]} processes" if process else "all processes"
    complaint = (
        f"--processes {text or 'auto'}: not {all_of_them} have come together within {timeout} s: start all of them, "
        "with the same address and count, and each with its own index"
    )
    # After a timeout JAX ends the process by a signal and prints its C++ stack; this timer ends it cleanly before.
    watch = threading.Timer(timeout, _give_up, [complaint])
    watch.daemon = True
    watch.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM and continue
    try:
        address, count, index = process or _detect(timeout)
        if process:
            roll_call(*process, timeout)
        elif index == 0 and address and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:  # there JAX listens elsewhere
            listen(address).close()  # where it cannot, JAX ends with a segmentation fault
        jax.distributed.initialize(
            address,
            count,
            index,
            cluster_detection_method="deactivate" if process else None,
            initialization_timeout=timeout + 60,
            shutdown_timeout_seconds=timeout + 60,
            heartbeat_timeout_seconds=2 * timeout + 60,  # later than our own heartbeats
        )
    except TimeoutError:
        raise UserError(complaint) from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{complaint} ({_first_line(error)})") from None
    finally:
        watch.cancel()
    _watch(timeout)


def _place(text: str) -> tuple[str, int, int]:
    """The address of process 0, the number of processes, and the index of this one, from ``--processes``."""
    match = re.fullmatch(r"(\S+:([0-9]{1,5})),([0-9]{1,9}),([0-9]{1,9})", text)
    if match is None or not 0 < int(match[2]) < 2**16 or int(match[4]) >= int(match[3]):
        raise UserError(
            f"--processes {text}: give it as ADDRESS:PORT,COUNT,INDEX with PORT from 1 to 65535 and INDEX below COUNT, "
            "or auto"
        )
    return match[1], int(match[3]), int(match[4])


def _detect(timeout: int) -> tuple[str | None, int | None, int | None]:
    """Address, count and index from the launcher's environment, as ``jax.distributed.initialize`` finds them."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        address, None, None, None, None, timeout
    )
    return address, count, index


def _watch(timeout: int) -> None:
    """Watches the other processes until the program ends; the end waits for all of them."""
    state = distributed.global_state
    client = state.client
    assert client is not None

    def give_up(complaint: str) -> None:
        if not _aborting.is_set():
            _give_up(complaint)

    stop = heartbeats.start(client, state.process_id, state.num_processes, timeout, give_up)
    follower = threading.Thread(target=_follow, args=(client, state.process_id), daemon=True)
    follower.start()

    def end() -> None:
        error: BaseException | None = getattr(sys, "last_value", None)
        if error is not None:  # after an unhandled exception the others must not wait for this process
            sys.stdout.flush()
            abort(1, f"error: it has ended with an error of the program: {_first_line(error)}")
        with suppress(jax.errors.JaxRuntimeError):
            client.wait_at_barrier("fedmezo/end", _NO_LIMIT)
        stop()
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"fedmezo/abort/{state.process_id}", " ", allow_overwrite=True)
        follower.join(_GRACE)

    atexit.register(end)


def _give_up(complaint: str) -> None:
    print("error:", complaint, file=sys.stderr, flush=True)
    os._exit(2)


def _launched() -> bool:
    """Whether the environment of a launcher shows several processes."""
    counts = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    several = any(count.isdecimal() and int(count) > 1 for count in counts)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "JAX_COORDINATOR_ADDRESS" in os.environ


def is_coordinator() -> bool:
    """Returns whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def all_or_none(make: Callable[[], T]) -> T:
    """Returns ``make()`` after all processes have finished it; if it fails in one process, it fails in all.

    Raises:
        UserError: ``make`` raised it here or in another process.
    """
    if jax.process_count() == 1:
        return make()
    try:
        result, own_error = make(), ""
    except UserError as error:
        result, own_error = None, str(error)
    for index, peer_error in enumerate(_exchange(own_error)):
        if peer_error:
            raise UserError(peer_error if own_error else f"process {index}: {peer_error}")
    return result  # pyright: ignore[reportReturnType]


def check_same_config(config: Mapping[str, Any]) -> None:
    """Checks that all processes were started with the same configuration.

    Args:
        config: the values that must be the same everywhere.

    Raises:
        UserError: they differ; every process raises the same message, which names the differences.
    """
    configs = [json.loads(text) for text in _exchange(json.dumps(config, default=str))]
    for index, peer_config in enumerate(configs):
        first_config = configs[0]
        if differing := sorted(
            key for key in first_config.keys() | peer_config.keys() if first_config.get(key) != peer_config.get(key)
        ):
            differences = ", ".join(
                f"{key} ({first_config.get(key)} in process 0, {peer_config.get(key)} there)" for key in differing
            )
            raise UserError(
                f"process {index} was started with other settings: {differences}: start all processes alike"
            )


def _exchange(text: str) -> list[str]:
    """Every process's text, in the order of the processes."""
    client, turn = distributed.global_state.client, next(_turns)
    if client is None:
        return [text]
    client.key_value_set(f"fedmezo/{turn}/{jax.process_index()}", f"{text} ")  # the store does not accept empty values
    keys = [f"fedmezo/{turn}/{index}" for index in range(jax.process_count())]
    return [client.blocking_key_value_get(key, _NO_LIMIT)[:-1] for key in keys]


@contextmanager
def report_peer_failure() -> Iterator[None]:
    """Turns the runtime's error about a process that can no longer be reached into a ``UserError``."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _LOST.search(str(error)):
            raise
        raise UserError(
            f"another process has ended or can no longer be reached ({_first_line(error)}): start all of them again, "
            "with --resume"
        ) from None


def abort(code: int, message: str) -> None:
    """Ends a process that has failed, and the others with it. With a single process it does nothing.

    An ordinary exit would wait for processes that may be gone. The others are notified first, because a process that
    waits in a collective cannot notice the failure itself.

    Args:
        code: exit code of all processes.
        message: the message that this process has printed; the others print it too, unless they fail themselves.
    """
    state = distributed.global_state
    if state.client is None:
        return
    _aborting.set()
    message = re.sub("^error:", f"error: process {state.process_id}:", message)
    with suppress(jax.errors.JaxRuntimeError):
        for index in range(state.num_processes):
            state.client.key_value_set(f"fedmezo/abort/{index}", f"{code} {message}", allow_overwrite=True)
    _leave(code)


def _leave(code: int) -> None:
    """Ends this process when all processes are ready to end, or after a while if some cannot be reached.

    Process 0 ends last, because JAX ends the others by a signal as soon as they lose their connection to it.
    """
    state = distributed.global_state
    assert state.client is not None
    with suppress(jax.errors.JaxRuntimeError):
        state.client.wait_at_barrier("fedmezo/abort", 2 * _GRACE * 1000)
    if state.process_id == 0:
        time.sleep(1)
    os._exit(code)


def _follow(client: Any, own: int) -> None:
    """Ends this process after another one has called :func:`abort`, unless it fails by itself meanwhile."""
    try:
        abort_text = client.blocking_key_value_get(f"fedmezo/abort/{own}", _NO_LIMIT)
    except jax.errors.JaxRuntimeError:
        return  # the program has ended, or process 0 cannot be reached
    code, _, message = abort_text.partition(" ")
    if message and not _aborting.wait(_GRACE):
        _aborting.set()
        print(message, file=sys.stderr, flush=True)
        _leave(int(code))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
