"""Runs with a secure sum: the record is what the protocol gives, and holds no single client's numbers."""

from dataclasses import replace

import numpy as np
import pytest
import small_run
from secure_round import SecureRound

from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import fixed_point
from fedmezo_jax.run import ledger, ledger_checks, messages, secure_sum_messages
from fedmezo_jax.run.client_failures import TOO_FEW
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.privacy_plan import plan_of
from fedmezo_jax.run.replay import largest_difference, replay


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "secret") as folder:
        yield folder


def configuration(place, **changed):
    return small_run.configuration(place, **{"clients": 5, "directions_shared": True, "secure_sum": True} | changed)


def entries_of(config, folder):
    fine_tune(config, folder, notify=lambda line: None)
    return list(ledger.entries(folder / "run.ledger"))


def gradients_in_clear(config, folder):
    """What the clients' numbers are in the first round, ``[P, H·n]``: the same run without secrets."""
    entry = entries_of(replace(config, secure_sum=False, dp_epsilon=None, rounds=1), folder)[0]
    return np.stack([messages.unpack_update(update).projected_gradients.ravel() for update in entry.updates])


@pytest.fixture(scope="module")
def run(place):
    config, lines = configuration(place, learning_rate="auto"), []
    return config, place / "run", fine_tune(config, place / "run", notify=lines.append), lines


def test_the_record_holds_the_mean_that_the_protocol_gives(place):
    config = configuration(place)
    first = entries_of(config, place / "fixed")[0]
    vectors = gradients_in_clear(config, place / "clear")
    parties = SecureRound(5, config.threshold, vectors=np.stack([fixed_point.encode(row, 5) for row in vectors]))
    np.testing.assert_array_equal(first.mean, (fixed_point.decode(parties.total()) / 5).astype(np.float32))
    assert first.updates == [None] * 5


def test_the_bytes_are_those_of_the_protocol_s_messages(run):
    config, _, result, _ = run
    parties = SecureRound(5, config.threshold, size=3)
    unmasking = parties.unmask(2)
    sent = secure_sum_messages.sent(
        parties.adverts[2], parties.sent[2], parties.masked[2], parties.signatures[2], unmasking
    )
    heard = secure_sum_messages.heard(parties.adverts, parties.boxes(2), parties.arrived, parties.signatures)
    up, down = sum(map(len, sent)), sum(map(len, heard))
    record = result.metrics[0]
    assert record["client_uplink_bytes"] == [up] * 5
    assert all(down < size < down + 150 for size in record["client_downlink_bytes"])  # with the start and the mean


def test_it_learns_is_replayed_bit_for_bit_and_says_what_it_is(run):
    _, folder, result, lines = run
    assert result.loss_after < result.loss_before
    assert largest_difference(replay(folder / "run.ledger").params, result.params) is None
    assert all(record["train_loss"] is None for record in result.metrics)
    assert any("no single client's numbers, where at least 4 of 5 stay" in line for line in lines)
    assert "makes the same sum in the clear" in ledger.read_header(folder / "run.ledger")["privacy"]


def test_a_round_that_too_few_stay_in_is_tried_again(place, tmp_path):
    config = configuration(place, dropout=0.3, attempts=20)
    entries = entries_of(config, place / "few")
    failed = [(entry.round, attempt, client, why) for entry in entries for attempt, client, why in entry.failed]
    assert any(why == TOO_FEW for *_, why in failed)
    assert all(np.sum(entry.weights) >= 4 for entry in entries)
    alone = ledger.create(tmp_path / "run.ledger", ledger.read_header(place / "few" / "run.ledger"))
    weights = np.array([1, 0, 0, 0, 0], np.float32)
    lost = [(attempt, id, "dropped out") for attempt in range(entries[0].attempt) for id in range(5)]
    lost += [(entries[0].attempt, id, "dropped out") for id in range(1, 5)]
    alone.append(entries[0]._replace(weights=weights, failed=lost))
    with pytest.raises(UserError, match="1 clients are too few for a secure sum"):
        list(ledger_checks.entries(tmp_path / "run.ledger", config))


def test_the_clients_noise_adds_up_to_what_the_accountant_asks_for(place):
    """Of P clients each adds σC/√t, so that the sum has √(P/t) times the noise that t of them make, which is σC."""
    config = configuration(place, dp_epsilon=4.0, directions=80, rounds=1)
    plan, (first,) = plan_of(config), entries_of(config, place / "noisy")
    vectors = gradients_in_clear(config, place / "not-noisy")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    clipped = vectors * np.minimum(1, plan.norm / norms)
    noise = (5 * first.mean.astype(np.float64) - clipped.sum(axis=0)) / (plan.noise * plan.norm)
    assert noise.size == 240
    assert np.std(noise) == pytest.approx((5 / 4) ** 0.5, rel=0.15)  # three standard errors


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"directions_shared": False}, "--directions-shared"),
        ({"aggregation": "krum"}, "--aggregation"),
        ({"aggregation": "norm-clip"}, "--aggregation"),
        ({"personalize": "model-diff"}, "--personalize"),
        ({"on_divergence": "rollback", "learning_rate": 1.0}, "--on-divergence"),
        ({"algorithm": "fedavg", "directions_shared": False}, "--algorithm"),
        ({"clients": 2}, "--secure-sum"),
    ],
)
def test_what_takes_single_vectors_is_refused_by_name(options, named):
    with pytest.raises(UserError, match=named):
        RunConfig(**{"secure_sum": True, "directions_shared": True} | options)
