"""What the commands over Flower are made of, without Flower."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_jax.deploy import guard
from fedmezo_jax.deploy.credentials import read_server_keys, read_signing_key, write_key
from fedmezo_jax.deploy.flower import STATUS, FlowerTransport, has_died, read_status
from fedmezo_jax.deploy.local_network import Processes
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import run_folder

SERVER = """
import sys, time
from pathlib import Path
from fedmezo_jax.run import run_folder
from fedmezo_jax.deploy.flower import RUNNING, STATUS
with run_folder.lock(Path(sys.argv[1])):
    run_folder.write_json(Path(sys.argv[1]) / STATUS, RUNNING)
    time.sleep(600)
"""


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it has not become true in a minute")


def test_a_server_that_is_killed_is_told_from_one_that_runs(tmp_path):
    assert not has_died(tmp_path)  # before it has begun
    with subprocess.Popen([sys.executable, "-c", SERVER, tmp_path]) as server:
        wait_for(lambda: read_status(tmp_path))
        assert not has_died(tmp_path)
        server.kill()
    assert has_died(tmp_path)
    run_folder.write_json(tmp_path / STATUS, {"error": "one line"})
    assert not has_died(tmp_path)


def guarded(tries, *command):
    return [sys.executable, "-I", guard.__file__, str(tries), sys.executable, "-c", *command]


COUNT = "import os, sys; open(sys.argv[1], 'a').write('x'); {}"


@pytest.mark.parametrize(
    ("tries", "ending", "starts", "code"),
    [(0, "os.abort()", 1, 134), (1, "os.abort()", 2, 134), (1, "sys.exit(2)", 1, 2), (1, "sys.exit(0)", 2, 0)],
)
def test_a_command_is_started_again_where_that_can_help(tries, ending, starts, code, tmp_path):
    command = guarded(tries, COUNT.format(ending), tmp_path / "starts")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.wait() == code
    assert (tmp_path / "starts").read_text() == "x" * starts


def is_running(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


STARTER = """
import os, sys, time
from pathlib import Path
from fedmezo_jax.deploy.local_network import Processes
with Processes(Path(sys.argv[1]), {}) as processes:
    processes.start("one", [sys.executable, "-c", sys.argv[2], Path(sys.argv[1]) / "pid"], 5)
    time.sleep(600)
"""
SLEEPER = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()}.'); time.sleep(600)"


@pytest.mark.parametrize("number", ["kill", "terminate"])
def test_processes_end_however_their_starter_ends(number, tmp_path):
    with subprocess.Popen([sys.executable, "-c", STARTER, tmp_path, SLEEPER]) as starter:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("."))
        pid = int((tmp_path / "pid").read_text()[:-1])
        assert is_running(pid)
        getattr(starter, number)()
    wait_for(lambda: not is_running(pid))


def test_a_process_that_has_ended_is_named_with_its_last_line(tmp_path):
    with Processes(tmp_path, {}) as processes:
        processes.start("one", [sys.executable, "-c", "print('first'); print('last'); raise SystemExit(7)"])
        wait_for(lambda: processes._running["one"].poll() is not None)
        with pytest.raises(UserError, match=r"one has ended with code 7: see .*one\.log \(last\), and go on"):
            processes.check(", and go on")


def test_keys_that_sign_are_read_as_they_were_written(tmp_path):
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)) for i in range(3)]
    for i, key in enumerate(keys):
        write_key(tmp_path / f"{i}", key)
    read = read_server_keys(tmp_path / "0", [tmp_path / "1.pub", tmp_path / "2.pub"])
    assert read.private.private_bytes_raw() == bytes(32)
    assert read.public == b"".join(key.public_key().public_bytes_raw() for key in keys)
    assert read_signing_key(tmp_path / "2").private_bytes_raw() == bytes([2] * 32)
    assert (tmp_path / "0").stat().st_mode & 0o077 == 0


def test_other_files_are_no_keys_that_sign(tmp_path):
    write_key(tmp_path / "node", generate_private_key(SECP384R1()))
    write_key(tmp_path / "sign", Ed25519PrivateKey.generate())
    (tmp_path / "empty").write_bytes(b"")
    for name in ("node", "sign.pub", "empty", "absent"):
        with pytest.raises(UserError, match="ssh-keygen -t ed25519"):
            read_signing_key(tmp_path / name)
    for name in ("node.pub", "sign", "empty", "absent"):
        with pytest.raises(UserError, match=r"give the \.pub file"):
            read_server_keys(tmp_path / "sign", [tmp_path / name])


class BusyGrid:
    """Flower's grid at a SuperLink that does not take the first requests: it raises, or gives no id."""

    def __init__(self, *failures):
        self.failures, self.pushed = list(failures), []

    def push_messages(self, messages):
        self.pushed += messages
        failure = self.failures.pop(0) if self.failures else f"id-{len(self.pushed)}"
        if isinstance(failure, Exception):
            raise failure
        return [failure]

    def pull_messages(self, sent):
        metadata = [type("Metadata", (), {"reply_to_message_id": one}) for one in sent]
        return [type("Message", (), {"metadata": one})() for one in metadata]


@pytest.mark.parametrize("failures", [(), (None,), (RuntimeError("the push session may have expired"), None)])
def test_a_request_that_a_busy_superlink_does_not_take_is_sent_again(failures):
    grid = BusyGrid(*failures)
    transport = FlowerTransport(grid, [7, 8], 60.0, lambda *parts: parts, lambda message: b"answer")
    transport.send(1, b"request")
    assert grid.pushed == [(8, b"request", 60.0)] * (len(failures) + 1)
    assert transport.poll(1.0) == [(1, b"request", b"answer")]


def test_a_request_that_is_never_taken_is_lost():
    grid = BusyGrid(*[OSError("busy")] * 10)
    transport = FlowerTransport(grid, [7], 60.0, lambda *parts: parts, lambda message: b"answer")
    transport.send(0, b"request")
    assert len(grid.pushed) == 3
    assert transport.poll(0.2) == []
