"""A deployed run leaves what the simulation of its configuration leaves, bit for bit."""

import json
from dataclasses import replace

import pytest
import small_run
from loopback import Loopback, check_same, client_of, deployed, quiet

from fedmezo_jax.deploy import envelopes
from fedmezo_jax.deploy.examples import deal_out
from fedmezo_jax.run import divergence
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.replay import largest_difference

RUNS = {
    "three clients": {},
    "signed": {"signed": True},
    "private": {"dp_epsilon": 8.0},
    "private examples": {"dp_epsilon": 8.0, "dp_unit": "example", "batch_size": 3, "directions_shared": True},
    "private mean": {"dp_epsilon": 8.0, "directions_shared": True},
    "secure sum": {"clients": 4, "directions_shared": True, "secure_sum": True},
    "secure sum of half, signed, first rate from the sum": {
        **{"clients": 7, "participation": 0.5, "directions_shared": True, "directions": 2, "secure_sum": True},
        **{"signed": True, "learning_rate": "auto", "server_optimizer": "adam"},
    },
    "secure sum with the clients' noise": {
        **{"clients": 4, "directions_shared": True, "secure_sum": True, "dp_epsilon": 8.0},
    },
    "secure sum of private examples": {
        **{"clients": 3, "directions_shared": True, "secure_sum": True, "dp_epsilon": 8.0, "dp_unit": "example"},
    },
    "half of eight": {"clients": 8, "participation": 0.5, "weighting": "samples", "server_optimizer": "momentum"},
    "shared directions": {"clients": 8, "directions_shared": True, "directions": 2, "personalize": "random"},
    "bounded norms": {"personalize": "round-wise", "aggregation": "norm-clip", "rounds": 3},
    "clipped": {"personalize": "model-diff", "on_divergence": "clip", "weight_decay": 0.1, "rounds": 3},
    "back-propagated slopes": {"estimator": "backward-gradient", "directions": 3},
    "back-propagated slopes of one example": {"estimator": "backward-gradient", "batch_size": 1, "clients": 5},
    "rolled back": {"on_divergence": "rollback", "learning_rate": 3.0},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "deployed") as folder:
        yield folder


def check(config, folder, fault=lambda client, request: None):
    """Runs both, and compares all that they leave and the adapter that each client has."""
    expected = fine_tune(config, folder / "simulated", check_rate=False, notify=quiet)
    deal_out(config, folder / "data")
    clients = [client_of(config, folder / "data", client) for client in range(config.clients)]
    result, transport = deployed(config, folder / "data", folder / "deployed", Loopback(clients, fault))
    check_same(result, expected, folder / "deployed", folder / "simulated")
    for client in transport.clients:
        assert client.rounds == config.rounds
        assert largest_difference(client.params, expected.params) is None
    return result


@pytest.mark.parametrize("name", RUNS)
def test_it_is_the_simulation_bit_for_bit(name, place, tmp_path, monkeypatch):
    if name == "clipped":
        monkeypatch.setattr(divergence, "CLIP", 0.5)  # so that a few steps are
    if name == "rolled back":
        monkeypatch.setattr(divergence, "DIVERGED_ABOVE", 1.0)
    result = check(small_run.configuration(place, **RUNS[name]), tmp_path)
    if name == "rolled back":
        assert any(record["rolled_back"] for record in result.metrics)
    if name == "clipped":
        assert any(record["clipped"] for record in result.metrics)


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": 1},
        {"batch_size": 1, "clients": 6, "participation": 0.5, "directions_shared": True},
        {"batch_size": 2, "pack": True},
    ],
)
def test_steps_of_several_widths(changed, place, tmp_path):
    """A step is as wide as the examples of the round's clients need, which no client knows by itself."""
    rows = (
        {
            "instruction": " ".join([example.instruction] * (1 + i % 40 // 13)),
            "output": example.response,
            "category": example.category,
        }
        for i, example in enumerate(small_run.examples())
    )
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(small_run.configuration(place, **changed), data=str(data), length_buckets=3)
    seen = []

    def note(client, request):
        if isinstance(start := envelopes.unpack_request(request), envelopes.Start):
            seen.append(start.step_widths)

    check(config, tmp_path, note)
    assert {len(widths) for widths in seen} == {config.local_steps}
    assert len(set(b"".join(seen))) > 1


def test_the_default_recipe_is_too(place, tmp_path):
    """Its first rate comes from the clients' slopes, its validation loss from examples of the server's own."""
    config = RunConfig(
        model=str(place / "model"),
        data="bundled",
        clients=3,
        participation=0.7,
        partition="length",
        rounds=4,
        local_steps=3,
        max_length=64,
        test_examples=10,
        lora_rank=2,
        layers="last:1",
    )
    result = check(config, tmp_path)
    assert {record["server_step"] for record in result.metrics} != {0.0}
