"""Real processes: SuperLink, SuperNodes with registered keys, workers and the server, over TLS."""

import subprocess
import sys

import pytest
import small_run
from loopback import quiet, without_seconds

from fedmezo_jax.run import run_folder
from fedmezo_jax.run.config import read_config
from fedmezo_jax.run.job import fine_tune

pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("flwr")
    with small_run.place(tmp_path_factory, "flower") as folder:
        yield folder


def test_a_run_over_flower_is_the_simulation_bit_for_bit(place, tmp_path):
    config, out = small_run.configuration(place, precision="float32"), tmp_path / "deployed"
    run_folder.write_json(tmp_path / "config.json", config.__dict__)
    command = [sys.executable, "-m", "experiments.deploy", "local", "--config", tmp_path / "config.json", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    fine_tune(read_config(out / "config.json"), tmp_path / "simulated", check_rate=False, notify=quiet)
    for name in ("run.ledger", "adapter/adapter_model.safetensors"):
        assert (out / "run" / name).read_bytes() == (tmp_path / "simulated" / name).read_bytes()
    records = [run_folder.read_metrics(folder) for folder in (out / "run", tmp_path / "simulated")]
    assert without_seconds(records[0]) == without_seconds(records[1])
    assert not any(record["failed"] for record in records[0])
