"""Keys and certificates are renewed as docs/deployment.md says, in the middle of a run."""

import shutil
import signal

import pytest
import small_run
from flower_network import FlowerNetwork, refused
from flower_run import check_same_as_simulation

from fedmezo_jax.deploy.credentials import make_node_key

pytestmark = pytest.mark.flower


def test_a_run_goes_on_with_other_certificates_and_without_a_revoked_key(tmp_path_factory, tmp_path, monkeypatch):
    """Client 1 has lost its key and gets another; client 2 has the old certificate and is told so."""
    pytest.importorskip("flwr")
    with small_run.place(tmp_path_factory, "renewal") as folder:
        network = FlowerNetwork(small_run.configuration(folder, precision="float32", rounds=5), tmp_path)
        try:
            network.start_server()
            for client in (0, 1):
                network.serve(client)
                network.start_node(client)
            shutil.copy(network.network / "ca.crt", tmp_path / "ca.crt")
            other = network.client(2, tmp_path / "client-2", authority=tmp_path / "ca.crt")
            network.wait_for((network.run / "metrics.jsonl").exists)
            network.server.send_signal(signal.SIGTERM)
            said = network.server.communicate()[0].strip()
            assert said.endswith("stopped by SIGTERM; go on with --resume")

            (network.network / "server.key").unlink()
            lost, network.keys[1] = network.keys[1], tmp_path / "new-1"
            make_node_key(network.keys[1])
            network.start_server("--resume")
            stranger = network.client(1, tmp_path / "revoked", node_key=lost)
            assert "has another certificate than at the start" in refused(other)
            assert "does not let this client in" in refused(stranger)
            for client in (0, 1):
                network.start_node(client)
            network.client(2, tmp_path / "client-2")
            said = network.server.communicate()[0]
            assert network.server.returncode == 0, said
            check_same_as_simulation(network.out, tmp_path / "simulated", monkeypatch)
        finally:
            network.stop()
