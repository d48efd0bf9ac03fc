"""Flower's processes of a run on this machine: a SuperLink with TLS, and SuperNodes with registered keys."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedmezo_jax.deploy import guard
from fedmezo_jax.deploy.flower import APP
from fedmezo_jax.errors import UserError

_START = 60.0
"""Seconds for a process to listen."""
_GRACE = 10.0
"""Seconds for a process to end by itself."""
_STATE, _SECRET = "state.db", "superexec.secret"
AGAIN = 20
"""How often in a row a process is started again. A SuperLink refuses a SuperNode whose predecessor has died until that
one's heartbeat has lapsed, after about a minute."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """Processes with a log each, which end with the block, and also where this process is killed."""

    def __init__(self, logs: Path, environment: Mapping[str, str]):
        """Starts none yet.

        Args:
            logs: folder of their logs.
            environment: what they have in their environment beside what this process has.
        """
        self._logs, self._environment = logs, {**os.environ, **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[object], tries: int = 0) -> None:
        """Starts one in a process group of its own.

        Args:
            name: of its log.
            command: program and arguments.
            tries: how often in a row it is started again if it ends at once; 0 never starts it again.
        """
        with (self._logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(tries), *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def call(self, command: Sequence[object]) -> str:
        """Runs one to its end, and returns what it prints.

        Raises:
            UserError: it fails.
        """
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=self._environment)
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())[-300:]
            raise UserError(f"{command[0]} has failed: {said}")
        return done.stdout

    def check(self, remedy: str = "") -> None:
        """Checks that all are running.

        Args:
            remedy: what to do if one is not, after "see its log".

        Raises:
            UserError: one has ended; names its log.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                log = self._logs / f"{name}.log"
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                said = f" ({' '.join(last)[:200]})" if last else ""
                raise UserError(f"{name} has ended with code {process.returncode}: see {log}{said}{remedy}")

    def __enter__(self) -> Processes:
        """Begins the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends them, the last one first."""
        for process in reversed(self._running.values()):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + _GRACE
        for process in reversed(self._running.values()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


class SuperLink:
    """The SuperLink of a run, with its state in a file: one that dies is started again and goes on.

    The server's process is started by a SuperExec beside it, and so outlives it.
    """

    def __init__(self, folder: Path, address: str, processes: Processes):
        """Starts nothing yet.

        Args:
            folder: of its certificates, as :func:`credentials.make_certificates` writes them.
            address: HOST:PORT where it listens.
            processes: where it is started, with ``FLWR_HOME`` as :func:`environment` gives it.
        """
        self._folder, self._processes = folder, processes
        self._host, self._port = split_address(address)
        home = folder / "flower"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{address}"\n'
            f"root-certificates = {json.dumps(str(folder / 'ca.crt'))}\n"
        )

    def start(self) -> None:
        """Starts it, without what an earlier one knew.

        Raises:
            UserError: it does not listen, or another program does.
        """
        folder = self._folder
        if _listens(self._host, self._port):
            raise UserError(f"another program listens at {self._host}:{self._port}: give another --address")
        for file in folder.glob(f"{_STATE}*"):
            file.unlink()
        _write_secret(folder / _SECRET)
        tls = ["--ssl-ca-certfile", folder / "ca.crt", "--ssl-certfile", folder / "server.crt"]
        tls += ["--ssl-keyfile", folder / "server.key"]
        where = ["--host", self._host, "--port", self._port]
        switches = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        apart = ["--isolation", "process", "--database", folder / _STATE]
        secret = ["--superexec-auth-secret-file", folder / _SECRET]
        command = [_program("flower-superlink"), *tls, *where, *switches, *apart, *secret]
        self._processes.start("superlink", command, AGAIN)
        until = time.monotonic() + _START
        while not _listens(self._host, self._port):
            self._processes.check()
            if time.monotonic() > until:
                raise UserError(f"the SuperLink does not listen at port {self._port} after {_START:g} s")
            time.sleep(0.2)
        here = ["--runtime-api-address", f"{self._host}:{self._port}", "--root-certificates", folder / "ca.crt"]
        self._processes.start("superexec", [_program("flower-superexec"), *here, *secret])

    def register(self, public_key: Path, name: str) -> str:
        """Lets the SuperNode with this key in; returns its id.

        Raises:
            UserError: the SuperLink does not take the key.
        """
        options = ["--name", name, "--format", "json"]
        said = self._processes.call([_program("flwr"), "supernode", "register", public_key, "local", *options])
        return str(json.loads(said)["node-id"])

    def run(self, app: Path, settings: Mapping[str, object]) -> None:
        """Starts a run of an app with these settings."""
        given = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
        self._processes.call([_program("flwr"), "run", app, "local", "--run-config", given, "--format", "json"])


def start_node(
    processes: Processes, name: str, server: str, authority: Path, key: Path, worker_socket: Path, programs: Path
) -> None:
    """Starts a client's SuperNode, which runs no program but those of :func:`write_programs`.

    Args:
        processes: where.
        name: of its log.
        server: HOST:PORT of the SuperLink.
        authority: certificate of the authority that has signed the SuperLink's.
        key: its private key.
        worker_socket: where the client's worker listens.
        programs: folder of the programs.
    """
    where = ["--superlink", server, "--root-certificates", authority, "--auth-supernode-private-key", key]
    worker = ["--node-config", f'socket="{worker_socket}"', "--port", free_port()]
    alone = ["/usr/bin/env", f"PATH={programs}"]
    processes.start(name, [*alone, _program("flower-supernode"), *where, *worker], AGAIN)


def write_programs(folder: Path) -> Path:
    """Makes the programs that a SuperNode may run, all others being unknown to it.

    Flower starts them by name. ``flwr-clientapp`` is our own (:mod:`fedmezo_app.installed`), which runs the app that is
    installed here and not the one that the server sends.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    app = [sys.executable, str(APP / "fedmezo_app" / "installed.py")]
    for name, command in (("flwr-clientapp", app), ("flower-superexec", [str(_program("flower-superexec"))])):
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (folder / name).chmod(0o700)
    return folder


def _write_secret(file: Path) -> None:
    """Makes what a SuperExec must know to be given the server's process."""
    file.unlink(missing_ok=True)
    file.touch(0o600)
    file.write_bytes(os.urandom(32))


def split_address(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        UserError: it is no HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{address}: is no HOST:PORT")
    return host, int(port)


def environment(folder: Path) -> dict[str, str]:
    """What Flower's processes need in their environment."""
    packages = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return quiet | {"FLWR_HOME": str(folder / "flower"), "PYTHONPATH": packages, "PATH": _path()}


def _path() -> str:
    """Flower's programs start one another by name."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def _program(name: str) -> Path:
    """A program of Flower, beside the interpreter that is running.

    Raises:
        UserError: it is not installed.
    """
    program = Path(sys.executable).parent / name
    if not program.exists():
        raise UserError(f"{name} is not installed: pip install 'fedmezo_jax[flower]'")
    return program


def _listens(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False
