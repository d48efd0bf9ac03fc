"""A worker of several clients: each answers at its own socket, and they share the base model and its programs."""

import socket
import threading
from pathlib import Path

import jax
import pytest
import small_run
from loopback import Loopback, check_same, deployed, quiet

from experiments.deploy import Config, clients_of, main
from fedmezo_jax.core import federated
from fedmezo_jax.deploy.examples import deal_out
from fedmezo_jax.deploy.flower import answer_at
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.job import fine_tune


def test_clients_of_one_worker_leave_the_simulation_s_run(tmp_path, tmp_path_factory):
    with small_run.place(tmp_path_factory, "worker") as place:
        run = small_run.configuration(place, precision="float32", rounds=2)
        deal_out(run, tmp_path / "data")
        expected = fine_tune(run, tmp_path / "simulated", check_rate=False, notify=quiet)
        files = tuple(tmp_path / f"data/client-{client}.jsonl" for client in range(3))
        clients = clients_of(Config("worker", run, client=(0, 1, 2), examples=files))
        federated._work.clear_cache()
        result, _ = deployed(run, tmp_path / "data", tmp_path / "deployed", Loopback(clients))
    check_same(result, expected, tmp_path / "deployed", tmp_path / "simulated")
    assert federated._work._cache_size() == 1
    bases = [jax.tree.leaves(client._own.base) for client in clients]
    assert all(leaf is first for leaves in bases for leaf, first in zip(leaves, bases[0], strict=True))


class Echo:
    """A client that answers with its name and the request."""

    def __init__(self, name):
        self.name = name

    def handle(self, request):
        if request == b"illegible":
            raise UserError("illegible")
        return self.name + request


def ask(path, request):
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(path))
        stream.sendall(len(request).to_bytes(8, "little") + request)
        with stream.makefile("rb") as answer:
            return answer.read(int.from_bytes(answer.read(8), "little"))


def test_each_client_answers_at_its_own_socket_whatever_others_send(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    clients = dict(zip(paths, (Echo(b"a"), Echo(b"b")), strict=True))
    threading.Thread(target=answer_at, args=(clients,), daemon=True).start()
    while not paths[-1].exists():
        pass
    assert ask(paths[0], b"1") == b"a1"
    assert ask(paths[1], b"illegible") == b""
    with socket.socket(socket.AF_UNIX) as cut_off:
        cut_off.connect(str(paths[0]))
        cut_off.sendall(bytes(3))
    with socket.socket(socket.AF_UNIX) as first:  # both have asked before the first one is answered
        first.connect(str(paths[0]))
        first.sendall((1).to_bytes(8, "little") + b"2")
        assert ask(paths[1], b"3") == b"b3"
        assert first.makefile("rb").read() == (2).to_bytes(8, "little") + b"a2"
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o600, 0o600]


TWO = {"client": (0, 1), "examples": (Path("a"), Path("b")), "socket": (Path("s"), Path("t"))}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"client": (1, 1)}, "worker: --client takes different ids, from 0"),
        ({"client": ()}, "worker: --client takes different ids, from 0"),
        ({"socket": (Path("s"),)}, "worker: give one --socket for each --client, not 1"),
        ({"examples": ()}, "worker: give one --examples for each --client, not 0"),
        ({"signing_key": (Path("k"),)}, "worker: give one --signing-key for each --client, not 1"),
    ],
)
def test_each_client_needs_what_is_its_own(changed, said):
    with pytest.raises(UserError, match=said):
        main(Config("worker", RunConfig(), **TWO | changed))


def test_a_worker_has_at_least_one_client(tmp_path):
    with pytest.raises(UserError, match="--clients-per-worker must be at least 1, not 0"):
        main(Config("local", RunConfig(), out=tmp_path / "out", clients_per_worker=0))
