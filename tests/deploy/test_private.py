"""Deployed runs whose noise comes from the operating system, and clients that count what they have answered."""

import numpy as np
import pytest
import small_run
from loopback import Loopback, client_of, deployed

from fedmezo_jax.deploy import envelopes
from fedmezo_jax.deploy.examples import deal_out
from fedmezo_jax.deploy.post import ticket
from fedmezo_jax.run import ledger, messages
from fedmezo_jax.run.replay import largest_difference, replay

UNITS = {
    "client": {},
    "client, shared directions": {"directions_shared": True},
    "example": {"dp_unit": "example", "batch_size": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "private") as folder:
        yield folder


def run(config, folder, **options):
    data = folder / "data"
    deal_out(config, data)
    clients = [client_of(config, data, client, **options) for client in range(config.clients)]
    return deployed(config, data, folder / "run", Loopback(clients), **options)


def numbers(file):
    return np.concatenate(
        [
            entry.mean if entry.mean is not None else messages.unpack_update(update).projected_gradients.ravel()
            for entry in ledger.entries(file)
            for update in entry.updates
        ]
    )


@pytest.mark.parametrize("unit", UNITS)
def test_the_noise_cannot_be_drawn_again_and_the_run_is_replayed(unit, place, tmp_path):
    config = small_run.configuration(place, dp_epsilon=8.0, rounds=2, **UNITS[unit])
    run(config, tmp_path / "seeded", seeded_noise=True)
    result, transport = run(config, tmp_path / "secret", seeded_noise=False)
    seeded, ours = (tmp_path / name / "run" / "run.ledger" for name in ("seeded", "secret"))
    assert "protects nobody" in ledger.read_header(seeded)["privacy"]
    assert "drawn from the operating system" in ledger.read_header(ours)["privacy"]
    assert not np.any(numbers(seeded) == numbers(ours))
    assert largest_difference(replay(ours).params, result.params) is None
    for client in transport.clients:
        assert largest_difference(client.params, result.params) is None


@pytest.mark.parametrize(
    ("unit", "without"),
    [
        ("client", [[], [1], [1]]),  # of six answers three are given
        ("example", [[1], [1], [1]]),  # no example is planned to be used twice
    ],
)
def test_a_client_answers_no_more_often_than_its_privacy_covers(unit, without, place, tmp_path, monkeypatch):
    """Asked again with a new ticket, it would draw new noise."""
    config = small_run.configuration(place, dp_epsilon=8.0, rounds=3, **UNITS[unit])
    asked = []
    handle = Loopback.send

    def twice(transport, client, message):
        request = envelopes.unpack_request(message)
        if isinstance(request, envelopes.Start) and client == 1:
            again = transport.clients[1].handle(envelopes.pack(request._replace(ticket=ticket())))
            asked.append(envelopes.unpack_response(again))
        return handle(transport, client, message)

    monkeypatch.setattr(Loopback, "send", twice)
    result, _ = run(config, tmp_path, seeded_noise=False)
    assert [[event["client"] for event in record["failed"]] for record in result.metrics] == without
    assert isinstance(asked[0], envelopes.Answer)
