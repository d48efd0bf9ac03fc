"""Before JAX connects the processes of a run: checks that each was given the same COUNT and an INDEX of its own.

JAX's coordination service ends a process with a wrong index by a signal, and waits in vain where the counts differ. So
the processes first tell process 0 what they were given, over plain TCP at the address where it will listen for JAX.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from contextlib import ExitStack, suppress

from fedmezo_jax.errors import UserError

_LINE_WITHIN = 5.0  # seconds, from a connection's start
_RETRY = 0.2  # seconds between two attempts to reach process 0
_READY = "ready"


def roll_call(address: str, count: int, index: int, timeout: float) -> None:
    """Returns when all processes have come and agree.

    Args:
        address: ``HOST:PORT`` of process 0.
        count: how many processes this one was told to expect.
        index: of this process, from 0 to ``count - 1``.
        timeout: seconds to wait for the others.

    Raises:
        UserError: two processes disagree, or the port cannot be listened on.
        TimeoutError: not all of them came in time.
    """
    deadline = time.monotonic() + timeout
    (_call if index == 0 else _answer)(address, count, index, deadline)


def listen(address: str) -> socket.socket:
    """Listens at the port of an address on all interfaces, as JAX's service does.

    Raises:
        UserError: another program listens there, or the system does not allow it.
    """
    port = int(address.rsplit(":", 1)[1])
    dual_stack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual_stack)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(
            f"process 0 cannot listen on port {port} ({os.strerror(error.errno)}): choose another port, and give it to "
            "all processes"
        ) from None


def _call(address: str, count: int, index: int, deadline: float) -> None:
    """Process 0: receives what the others were given, and answers all of them when it knows whether they agree."""
    connections: list[socket.socket] = []
    present: dict[int, socket.socket] = {}
    complaint = ""
    with ExitStack() as stack:
        server = stack.enter_context(listen(address))
        while len(present) + 1 < count and not complaint:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            connection = stack.enter_context(server.accept()[0])
            line = re.fullmatch(r"([0-9]{1,9}),([0-9]{1,9})\n", _line(connection, _LINE_WITHIN))
            if line is None:  # not a process of this program
                connection.close()
                continue
            other_count, other_index = map(int, line.groups())
            if other_count != count:
                complaint = (
                    f"--processes: process 0 was given a COUNT of {count} and process {other_index} one of "
                    f"{other_count}: give all processes the same"
                )
            present = {i: other for i, other in present.items() if not _has_gone(other)}
            if not complaint and (other_index == index or other_index in present):
                complaint = f"--processes: two processes were given the INDEX {other_index}: give each its own"
            present[other_index] = connection
            connections.append(connection)
        for connection in connections:
            _send(connection, f"{complaint or _READY}\n")
        for connection in connections:
            _line(connection, _LINE_WITHIN)  # until the other side has closed: its port is the one that stays busy
    if complaint:
        raise UserError(complaint)


def _answer(address: str, count: int, index: int, deadline: float) -> None:
    host, port = address.rsplit(":", 1)
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), left) as connection:
                _send(connection, f"{count},{index}\n")
                answer = _line(connection, max(deadline - time.monotonic(), 0.01)).removesuffix("\n")
        except OSError:
            answer = ""
        if answer == _READY:
            return
        if answer:
            raise UserError(answer)
        time.sleep(min(_RETRY, left))  # process 0 has not started yet
    raise TimeoutError


def _send(connection: socket.socket, text: str) -> None:
    with suppress(OSError):  # the other side may have gone
        connection.sendall(text.encode())


def _line(connection: socket.socket, within: float) -> str:
    """Receives a line; what was received so far if the other side closes or sends nothing more in time."""
    received = b""
    with suppress(OSError):
        connection.settimeout(within)
        while len(received) < 1000 and not received.endswith(b"\n") and (part := connection.recv(1000)):
            received += part
    return received.decode(errors="replace")


def _has_gone(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection: a process that was stopped, and may have been started again."""
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
