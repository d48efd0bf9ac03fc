"""The benchmark of deployments: its meters, and what it refuses."""

import json
import socket
import subprocess
import sys
import threading

import pytest

from experiments._network_meters import KINDS, Relay, memory_of_children
from experiments.benchmarks import deployment
from fedmezo_jax.errors import UserError


def test_a_relay_passes_on_and_counts_every_byte():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as connection, connection.makefile("rb") as stream:
                connection.sendall(2 * stream.read(100_000))

        thread = threading.Thread(target=answer)
        thread.start()
        relay = Relay(f"127.0.0.1:{server.getsockname()[1]}")
        host, port = relay.address.split(":")
        with socket.create_connection((host, int(port))) as client, client.makefile("rb") as stream:
            client.sendall(bytes(range(250)) * 400)
            assert stream.read() == bytes(range(250)) * 800
        thread.join()
    assert (relay.up, relay.down) == (100_000, 200_000)


def test_memory_is_that_of_the_processes_that_were_started_here():
    held = (
        "import sys; held = bytearray(200 << 20); held[::4096] = b'x' * len(held[::4096]); print(flush=True); input()"
    )
    command = [sys.executable, "-c", held, next(iter(KINDS))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        resident, together = memory_of_children()
        process.communicate(b"\n")
    assert 200 < resident[next(iter(KINDS.values()))] < 300
    assert together > 200
    assert memory_of_children() == ({}, 0.0)


@pytest.mark.parametrize("numbers", ["", "8,two", "1"])
@pytest.mark.parametrize("option", ["clients", "fedavg"])
def test_other_numbers_of_clients_are_refused(option, numbers, tmp_path):
    with pytest.raises(UserError, match=f"--{option} must be"):
        deployment.main(deployment.Config(**{option: numbers}, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_measured_is_kept_and_fedavg_is_left_out_where_it_is_not_asked_for(tmp_path, monkeypatch):
    """A command that ends in the middle goes on with the part of the row at which it ended."""
    asked, failing = [], ["simulated"]

    def part(name):
        def measured(clients, *rest):
            asked.append((name, clients))
            if name in failing:
                raise UserError("ended")
            return {"clients": clients} if name == "ours" else {}

        return measured

    monkeypatch.setattr(deployment, "measure", part("ours"))
    monkeypatch.setattr(deployment, "measure_simulated", part("simulated"))
    monkeypatch.setattr(deployment, "measure_fedavg", part("fedavg"))
    monkeypatch.setattr(deployment, "plot", lambda file, rows: None)
    config = deployment.Config(clients="3,50", fedavg="3", out=tmp_path / "out")
    with pytest.raises(UserError, match="ended"):
        deployment.main(config)
    failing.clear()
    deployment.main(config)
    kinds = [("ours", 3), ("simulated", 3), ("simulated", 3), ("fedavg", 3), ("ours", 50), ("simulated", 50)]
    assert asked == kinds
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [row["clients"] for row in rows] == [3, 50]
    assert rows[1]["fedavg_seconds"] is None


@pytest.mark.flower
def test_a_serialised_message_holds_its_payload(monkeypatch):
    """Bytes are what they are and a little more, and so are the arrays of an adapter."""
    pytest.importorskip("flwr")
    monkeypatch.syspath_prepend(deployment.FEDAVG)
    from fedavg_app import sizes

    assert sizes.of_bytes(1250) - sizes.of_bytes(250) in range(1000, 1010)
    assert 250 < sizes.of_bytes(250) < 600
    assert 4 * 8000 < sizes.of_arrays("[[1000, 4], [1000, 4]]") < 4 * 8000 + 2000  # equal arrays would be sent once
