"""Runs that are private in each example: the noise, what is spent, replay, and what is refused."""

import numpy as np
import pytest
import small_run
from scipy import stats

from fedmezo_jax.core.per_example import NoisyBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import clients, example_privacy, ledger, ledger_checks, messages, rounds
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import round_examples
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.ledger_header import config_hash
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.replay import largest_difference, replay

CLIENTS, ROUNDS = 5, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "examples") as folder:
        yield folder


def configuration(place, **changed):
    given = {"clients": CLIENTS, "participation": 0.6, "rounds": ROUNDS, "dp_epsilon": 4.0, "dp_unit": "example"}
    given |= {"learning_rate": "auto", "batch_size": 5, "directions": 2, "partition": "dirichlet"}
    return small_run.configuration(place, **given | changed)


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "own"])
def run(request, place):
    config = configuration(place, directions_shared=request.param, aggregation="median")
    folder, lines = place / f"run-{request.param}", []
    result = fine_tune(config, folder, notify=lines.append)
    return config, folder, result, lines


def most_uses(config, setup, rounds):
    """For each client Σ over rounds of the squared uses of its most used example, from the batches themselves."""
    counts = np.zeros((config.clients, len(setup.task.train[0])), np.int64)
    for t in range(rounds):
        ids, picks = round_examples(config, setup.task, t)
        for i, picked in zip(ids, picks, strict=True):
            counts[i] += np.bincount(picked.ravel(), minlength=counts.shape[1]) ** 2
    return counts.max(axis=1)


def exact_delta(epsilon, noise, uses):
    """Balle and Wang, arXiv 1805.06530, Theorem 8."""
    mu = uses**0.5 / noise
    return stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))


def test_a_client_s_noise_keeps_to_epsilon_for_the_example_that_it_uses_most(run):
    config, _, _, _ = run
    setup = prepare(config)
    counts = setup.example_counts
    assert len(set(counts)) > 1  # so that clients differ in their noise
    for i, uses in enumerate(most_uses(config, setup, ROUNDS)):
        noise = example_privacy.noise_multiplier(config, i, int(counts[i]))
        assert exact_delta(4.0, noise, uses) == pytest.approx(1e-5, rel=0.02)


def test_every_step_of_every_client_has_noise_of_its_own_and_of_that_size(place, monkeypatch):
    config = configuration(place, directions_shared=True, local_steps=40, rounds=2, clients=3, participation=1.0)
    setup, added = prepare(config), []

    def spy(*given):
        batch = add_noise(*given)
        added.append(batch)
        return batch

    add_noise = example_privacy.add_noise
    monkeypatch.setattr(clients.example_privacy, "add_noise", spy)
    clients.SimulatedClients(setup)._cohort(0, 0)
    (batch,) = added
    assert isinstance(batch, NoisyBatch)
    assert batch.noise.shape == (3, 40, 2)
    assert len(np.unique(batch.noise)) == batch.noise.size
    for i in range(3):
        sigma = example_privacy.noise_multiplier(config, i, int(setup.example_counts[i]))
        scaled = batch.noise[i] / (sigma * example_privacy.norm_of(config))
        assert stats.kstest(scaled.ravel(), "norm").pvalue > 1e-3


def test_the_ledger_has_each_client_s_noisy_numbers_and_no_losses(run):
    _, folder, _, lines = run
    for entry in ledger.entries(folder / "run.ledger"):
        assert entry.mean is None
        updates = [messages.unpack_update(update) for update in entry.updates]
        assert not any(update.losses.any() for update in updates)
    assert any("differential privacy of each example" in line and "protects nobody" in line for line in lines)


def test_what_is_spent_is_that_of_the_most_used_example_and_ends_at_epsilon(run):
    config, folder, _, _ = run
    setup = prepare(config)
    spent = [entry.epsilon for entry in ledger.entries(folder / "run.ledger")]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(4.0, abs=0.02)
    for t in (0, 2):
        deltas = [
            exact_delta(spent[t], example_privacy.noise_multiplier(config, i, int(count)), uses)
            for i, (count, uses) in enumerate(zip(setup.example_counts, most_uses(config, setup, t + 1), strict=True))
            if uses
        ]
        assert max(deltas) == pytest.approx(1e-5, rel=0.05)


def test_it_is_replayed_bit_for_bit(run):
    _, folder, result, _ = run
    assert largest_difference(replay(folder / "run.ledger").params, result.params) is None


def test_a_ledger_that_says_otherwise_is_refused(run, tmp_path):
    """Of other numbers of examples other noise would have been enough."""
    config, folder, _, _ = run
    source = folder / "run.ledger"

    def rewritten(name, change_header=lambda header: {}, change=lambda entry: entry):
        header = ledger.read_header(source)
        header |= change_header(header)
        book = ledger.create(tmp_path / name, header | {"config_hash": config_hash(header["config"])})
        for entry in ledger.entries(source):
            book.append(change(entry))
        return tmp_path / name

    def counts(values):
        return lambda header: {"example_counts": np.asarray(values, "<u4").tobytes()}

    assert len(list(ledger_checks.entries(rewritten("same"), config))) == ROUNDS
    for name, file, named in (
        ("less", rewritten("less", change=lambda entry: entry._replace(epsilon=entry.epsilon / 2)), "is spent"),
        ("other", rewritten("other", counts([3] * CLIENTS)), "is spent"),
        ("none", rewritten("none", counts([0] * CLIENTS)), "cannot have 0"),
        ("huge", rewritten("huge", counts([2**32 - 1] * CLIENTS)), "cannot have"),
        ("short", rewritten("short", counts([3])), "example_counts"),
    ):
        with pytest.raises(UserError, match=named):
            list(ledger_checks.entries(file, ledger_checks.run_config(ledger.read_header(file), tmp_path / name)))


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(run, place):
    config, whole, _, _ = run
    folder = place / f"stopped-{config.directions_shared}"

    def stop(record):
        if record["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(config, folder, on_round=stop, notify=lambda line: None)
    fine_tune(config, folder, resume=True, notify=lambda line: None)
    assert (folder / "run.ledger").read_bytes() == (whole / "run.ledger").read_bytes()


def test_the_run_ends_before_an_example_is_used_more_often_than_planned(place, monkeypatch):
    """A round that is tried again with other clients can make one take part more often than was planned."""
    config = configuration(place, participation=0.2, rounds=5, attempts=50)
    monkeypatch.setattr(
        rounds.client_failures,
        "absent",
        # Everyone fails but client 0.
        lambda seed, t, attempt, clients, dropout, deadline: dict.fromkeys(range(1, clients), "dropped out"),
    )
    with pytest.raises(
        UserError, match=r"client \d is used more often than planned, which --dp-epsilon does not cover"
    ):
        fine_tune(config, place / "ended", notify=lambda line: None)
    assert all(entry.epsilon <= 4.0 for entry in ledger.entries(place / "ended" / "run.ledger"))


def test_it_goes_with_a_secure_sum(place):
    """Then the record holds the mean of the clients' noisy numbers."""
    result = fine_tune(
        configuration(place, secure_sum=True, directions_shared=True, participation=1.0, rounds=2), place / "secret"
    )
    for entry in ledger.entries(place / "secret" / "run.ledger"):
        assert entry.mean.shape == (6,)
        assert entry.epsilon > 0
    assert largest_difference(replay(place / "secret" / "run.ledger").params, result.params) is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"algorithm": "fedavg"}, "--algorithm"),
        ({"personalize": "model-diff"}, "--personalize"),
        ({"on_divergence": "rollback"}, "--on-divergence"),
        ({"secure_sum": True, "directions_shared": True, "aggregation": "median"}, "--aggregation"),
    ],
)
def test_what_would_need_losses_or_single_vectors_is_refused_by_name(options, named):
    with pytest.raises(UserError, match=named):
        RunConfig(**{"dp_epsilon": 1.0, "dp_unit": "example"} | options)
