"""A run over Flower: the transport, the server's settings, and the worker that answers beside SuperNodes.

Nothing here imports Flower, which is in the app alone (``flower_app/``).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import filelock

from fedmezo_jax.deploy.client import Client
from fedmezo_jax.deploy.credentials import read_server_keys
from fedmezo_jax.deploy.server import Patience, serve
from fedmezo_jax.deploy.transport import Reply, Transport
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import run_folder
from fedmezo_jax.run.compilation_cache import keep_compiled
from fedmezo_jax.run.config import read_config
from fedmezo_jax.run.run_folder import write_json

APP = Path(__file__).parent / "flower_app"
"""What ``flwr run`` takes."""
STATUS = "status.json"
"""The file beside the settings in which the server says that it runs, and in the end how the run ended."""
RUNNING: Mapping[str, Any] = {"running": True}
_PAUSE, _TRIES = 0.1, 3
"""Seconds between two looks for replies; and how often a request is handed to a SuperLink that does not take it."""


class FlowerTransport:
    """A :class:`~fedmezo_jax.deploy.transport.Transport` over Flower's grid, which it polls itself.

    ``grid.send_and_receive`` would wait three seconds each time.
    """

    def __init__(
        self,
        grid: Any,
        nodes: Sequence[int],
        seconds: float,
        packed: Callable[[int, bytes, float], Any],
        unpacked: Callable[[Any], bytes | None],
    ):
        """Sends nothing yet.

        Args:
            grid: Flower's.
            nodes: for each client the id of its SuperNode, as registering its key gave it.
            seconds: after which Flower forgets a message.
            packed: makes Flower's message for a node from a request.
            unpacked: reads a reply; None if it tells of an error.
        """
        self._grid, self._nodes, self._seconds = grid, nodes, seconds
        self._packed, self._unpacked = packed, unpacked
        self._sent: dict[str, tuple[int, bytes]] = {}

    def send(self, client: int, request: bytes) -> None:
        """See :class:`Transport`. A request that the SuperLink does not take is lost."""
        for _ in range(_TRIES):
            message = self._packed(self._nodes[client], request, self._seconds)
            try:
                (sent,) = self._grid.push_messages([message])
            except Exception as error:  # of many kinds, where the SuperLink is busy
                print(f"notice: a request to client {client} was not sent: {error!r}", flush=True)
                continue
            if sent:
                self._sent[sent] = client, request
                return

    def poll(self, seconds: float) -> list[Reply]:
        """See :class:`Transport`. A SuperNode that has died is told of under the message that it had got."""
        until = time.monotonic() + seconds
        while True:
            replies = []
            for message in self._grid.pull_messages(list(self._sent)) if self._sent else []:
                if sent := self._sent.pop(message.metadata.reply_to_message_id, None):
                    replies.append(Reply(*sent, self._unpacked(message)))
            if replies or time.monotonic() >= until:
                return replies
            time.sleep(_PAUSE)

    def clock(self) -> float:
        """See :class:`Transport`."""
        return time.monotonic()


def write_settings(file: Path, **settings: Any) -> None:
    """Writes what :func:`serve_from_file` reads, an argument for each entry."""
    write_json(file, settings)


def serve_from_file(file: str, transport_of: Callable[[Sequence[int], float], Transport]) -> None:
    """The server of a run by a file of settings; how it ended is then in :data:`STATUS` beside that.

    Args:
        file: an object with the entries ``config`` (a ``config.json``), ``out`` (the run's folder), ``files`` (the
            server's examples), ``nodes`` (the clients' SuperNodes), ``options`` (of :func:`server.serve`),
            ``patience`` (:class:`server.Patience`), ``cache`` (for compiled programs) and ``keys`` (None, or of
            :func:`credentials.read_server_keys`).
        transport_of: makes the transport to these nodes, for messages that are of use for so many seconds.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with run_folder.lock(Path(file).parent):
        write_json(Path(file).with_name(STATUS), RUNNING)
        _serve(Path(file), transport_of)


def _end_with(parent: int) -> None:
    """Ends this process when Flower's has ended that started it: nobody else would."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)  # what is on the disk can be resumed at any moment


def read_status(folder: Path) -> dict[str, Any] | None:
    """What the server whose settings are in this folder has said; None before it has begun."""
    file = folder / STATUS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def has_died(folder: Path) -> bool:
    """Whether the server whose settings are in this folder has ended without saying how."""
    if read_status(folder) != RUNNING:
        return False
    try:
        with run_folder.lock(folder):
            return read_status(folder) == RUNNING
    except filelock.Timeout:
        return False


def _serve(file: Path, transport_of: Callable[[Sequence[int], float], Transport]) -> None:
    settings = json.loads(file.read_text(encoding="utf-8"))
    status, lines = file.with_name(STATUS), []
    keep_compiled(Path(settings["cache"]))
    patience = Patience(**settings["patience"])

    def notify(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    try:
        transport = transport_of([int(node) for node in settings["nodes"]], max(patience))
        files = [Path(name) for name in settings["files"]]
        config = read_config(Path(settings["config"]))
        options = settings["options"] | {"patience": patience, "notify": notify}
        if keys := settings["keys"]:
            options["keys"] = read_server_keys(Path(keys["private"]), [Path(name) for name in keys["clients"]])
        result = serve(config, settings["out"], transport, files, **options)
        ended: Mapping[str, Any] = {"loss_before": result.loss_before, "loss_after": result.loss_after}
    except UserError as error:
        ended = {"error": str(error)}
    except KeyboardInterrupt:
        write_json(status, {"error": "the server was stopped: go on with --resume"})
        raise
    except BaseException as error:
        write_json(status, {"error": f"the server has ended with an error of the program: {error!r}"})
        raise
    write_json(status, dict(ended) | {"notices": lines})


def answer_at(clients: Mapping[Path, Client]) -> None:
    """Answers the requests that come in at each client's Unix socket, one after the other, until the process is ended.

    Only the owner of the process may connect.

    Raises:
        UserError: a socket cannot be made.
    """
    with ExitStack() as stack, selectors.DefaultSelector() as requests:
        for path, client in clients.items():
            requests.register(stack.enter_context(_listener(path)), selectors.EVENT_READ, client)
        while True:
            for ready, _ in requests.select():
                try:
                    _answer(cast(socket.socket, ready.fileobj), ready.data)
                except (OSError, UserError) as error:  # the app was ended meanwhile, or nothing legible came
                    print(f"notice: {error}", flush=True)


def _answer(listener: socket.socket, client: Client) -> None:
    connection, _ = listener.accept()
    with connection, connection.makefile("rwb") as stream:
        answer = client.handle(stream.read(int.from_bytes(stream.read(8), "little")))
        stream.write(len(answer).to_bytes(8, "little") + answer)
        stream.flush()


def _listener(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise UserError(f"--socket {path}: {error.strerror or error}: give a shorter path in a folder") from None
    path.chmod(0o600)
    listener.listen()
    return listener
