"""Real processes: SuperLink, SuperNodes with registered keys, workers and the server, over TLS."""

import os
import random
import time

import pytest
import small_run
from flower_run import FlowerRun

from fedmezo_jax.run import run_folder

pytestmark = pytest.mark.flower
MOMENTS = int(os.environ.get("FEDMEZO_KILLS", 0))
"""At how many moments each kind of process is killed."""
SLOW = pytest.mark.skipif(not MOMENTS, reason="takes minutes: set FEDMEZO_KILLS to the number of moments to kill at")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("flwr")
    with small_run.place(tmp_path_factory, "flower") as folder:
        yield folder


@pytest.fixture
def run_of(place, tmp_path):
    """Makes a run, whose command does not outlive the test."""
    made = []

    def make(*options, **changed):
        config = small_run.configuration(place, precision="float32", **changed)
        run_folder.write_json(tmp_path / "config.json", config.__dict__)
        made.append(FlowerRun(tmp_path / "config.json", tmp_path / "deployed", *options))
        return made[0]

    yield make
    made[0].stop()


HALF = {"participation": 0.5, "dp_epsilon": 8.0}
RUNS = {
    "half of four, private": {"clients": 4} | HALF,
    "half of eight, private": {"clients": 8} | HALF,
    "secure sum of four": {"clients": 4, "secure_sum": True},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if "eight" in name else ()) for name in RUNS])
def test_a_run_over_flower_is_the_simulation_bit_for_bit(name, run_of, tmp_path, monkeypatch):
    """A mean along shared directions, by the server or by the clients, and noise from the seed; two of a worker."""
    run = run_of("--seeded-noise", "--clients-per-worker", "2", rounds=2, directions_shared=True, **RUNS[name])
    run.start()
    code, said = run.end()
    assert code == 0, said
    assert run.check_same_as_simulation(tmp_path / "simulated", monkeypatch) == []


def test_a_signed_run_whose_worker_and_command_are_killed(run_of, tmp_path, monkeypatch):
    """``--resume`` goes on with the run, and no round is lost or counted twice."""
    run = run_of(signed=True, rounds=2)
    run.start()
    run.wait_for_round(1)
    run.kill("worker", 1)
    run.stop()
    run.start()
    code, said = run.end()
    assert code == 2
    assert "holds a run already: give another folder, or --resume to go on with it" in said
    run.start("--resume")
    code, said = run.end()
    assert code == 0, said
    dropped = run.check_same_as_simulation(tmp_path / "simulated", monkeypatch)
    assert {client for _, client in dropped} <= {1}


@pytest.mark.skipif(
    "FEDMEZO_KILLS" not in os.environ, reason="minutes for each moment; their number is in FEDMEZO_KILLS"
)
@pytest.mark.parametrize("seed", range(int(os.environ.get("FEDMEZO_KILLS", 1))))
@pytest.mark.parametrize("name", ["worker", "supernode", "server", "superlink"])
def test_a_process_that_is_killed_at_any_moment(name, seed, run_of, tmp_path, monkeypatch):
    """It is the run in which clients dropped out until all was back; without the server there is a clear line."""
    draw = random.Random(f"{name} {seed}")
    rounds = 10 if name in ("worker", "supernode") else 4  # so that it is let in again after about a minute
    run = run_of("--round-seconds", "60", rounds=rounds)
    run.start()
    run.wait_for_round(1)
    time.sleep(draw.uniform(0, 10))
    client = draw.randrange(3) if name in ("worker", "supernode") else ""
    run.kill(name, client)
    code, said = run.end()
    if name == "server":
        assert code == 2
        assert said.strip().endswith("go on with --resume")
        run.start("--resume")
        code, said = run.end()
    assert code == 0, said
    assert len(run.logged("superlink", "starting it again")) == (name == "superlink")
    dropped = run.check_same_as_simulation(tmp_path / "simulated", monkeypatch)
    assert name == "superlink" or {client for _, client in dropped} <= {client}
    assert rounds - 1 not in {t for (t, _), _ in dropped}
    print(f"{name} {client} killed; dropped: {dropped}")
