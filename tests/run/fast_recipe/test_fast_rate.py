"""The rate that nobody sets, the steps that the server takes, and the ledger that follows."""

import itertools
import math

import jax
import numpy as np
import pytest
from fast_runs import FACTORS, ROUNDS, TAKEN, recorded, start

from fedmezo_jax.core import mezo
from fedmezo_jax.core.federated import RoundReport
from fedmezo_jax.core.random import client_key, run_key
from fedmezo_jax.run import automatic_rate, ledger, messages
from fedmezo_jax.run.prepare import OpenModel, prepare
from fedmezo_jax.run.replay import largest_difference, replay


def test_the_ledger_replays_bit_for_bit_after_every_round(run):
    with recorded() as thetas:
        again = replay(run.folder / "run.ledger")
    assert largest_difference(again.params, run.result.params) is None
    assert len(thetas) == len(run.thetas) == ROUNDS
    for ours, theirs in zip(run.thetas, thetas, strict=True):
        assert largest_difference(ours, theirs) is None


def test_every_rate_follows_from_the_first_one_and_the_recorded_steps(run):
    rate = np.float32(ledger.read_header(run.folder / "run.ledger")["first_rate"])
    for entry, record in zip(run.entries, run.result.metrics, strict=True):
        assert entry.step in FACTORS
        assert entry.step == record["server_step"]
        assert entry.learning_rates.dtype == np.float32
        np.testing.assert_array_equal(entry.learning_rates, rate)
        rate = rate * np.float32(FACTORS[entry.step])


def test_the_first_step_moves_each_entry_by_two_thousandths(steady):
    """√(mean of (Δθ)²) = η·√(E[g²]/n). The round's later steps are at a θ that has moved by as little, so that their g
    are a few percent off those that the rate was measured by.
    """
    (first, *_) = steady.entries
    gradients = np.array([messages.unpack_update(message).projected_gradients for message in first.updates])
    assert gradients.shape == (3, 2, 4)
    move = float(first.learning_rates[0]) * math.sqrt(np.mean(gradients**2) / 4)
    assert move == pytest.approx(2e-3, rel=0.1)


def test_the_loss_goes_down_and_the_rate_up(steady):
    assert steady.result.loss_after < steady.result.loss_before - 0.5
    assert steady.entries[-1].learning_rates[0] > 2 * steady.entries[0].learning_rates[0]


def test_nothing_is_compiled_after_the_first_round(setup, tmp_path):
    jax.clear_caches()  # other tests of this process have compiled the same programs
    compiled = start(tmp_path / "run", setup).compiled
    assert compiled[0] > 0
    assert compiled == [compiled[0]] * ROUNDS


def test_the_validation_loss_never_rises(setup, steady, bold):
    for run in (steady, bold):
        losses = [setup.task.validate(theta) for theta in run.states]
        assert all(after <= before for before, after in itertools.pairwise(losses))
        assert losses[-1] < losses[0]
    assert min(entry.step for entry in bold.entries) < 1  # the rate was too high indeed
    assert max(entry.learning_rates[0] for entry in bold.entries) > 10 * steady.entries[-1].learning_rates[0]


def test_validation_examples_are_in_neither_training_nor_test_rows(config, setup):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenModel, "first", 0)
        task = prepare(config).task
    train_rows, validation, test = (
        {row.tobytes() for row in np.asarray(rows.tokens)} for rows in (task.train, task.validation, task.test)
    )
    assert len(validation) == len(setup.task.validation.labels) == 32
    assert not validation & (train_rows | test)
    np.testing.assert_array_equal(np.sort(np.concatenate(task.parts)), np.arange(len(task.train.labels)))


_direction = jax.jit(lambda zero, key: mezo.shift(zero, mezo.Perturbation(key, 1.0, "rademacher")))


def whole_update(theta, entry, config):
    """θ after the whole of a round's update, in float64: each client's Δ = −Σ_h (η/n)·Σ_k g_hk·z_hk, their mean, and
    the server's learning rate.
    """
    moved = jax.tree.map(lambda leaf: leaf.astype(np.float64), theta)
    zero = jax.tree.map(np.zeros_like, theta)
    for id, rate, message in zip(entry.ids, entry.learning_rates, entry.updates, strict=True):
        gradients = messages.unpack_update(message).projected_gradients
        for h, k in np.ndindex(*gradients.shape):
            key = jax.random.fold_in(client_key(run_key(config.seed), entry.round, int(id)), h)
            size = config.server_learning_rate * float(rate) * float(gradients[h, k]) / gradients.shape[1]
            z = _direction(zero, jax.random.fold_in(key, k))
            moved = jax.tree.map(lambda leaf, z, size=size: leaf - size / len(entry.ids) * np.asarray(z), moved, z)
    return moved


def test_theta_moves_by_as_much_of_the_update_as_was_taken(config, scripted):
    """Against a computation in float64; the run rounds some dozens of sums to float32."""
    assert [entry.step for entry in scripted.entries] == TAKEN
    first_rate = scripted.entries[0].learning_rates[0]
    for entry, before, after in zip(scripted.entries, scripted.states[:-1], scripted.thetas, strict=True):
        whole = whole_update(before, entry, config)
        for old, all_of_it, new in zip(*map(jax.tree.leaves, (before, whole, after)), strict=True):
            assert np.abs(all_of_it - old).max() > 5e-3 * entry.learning_rates[0] / first_rate
            np.testing.assert_allclose(new, old + entry.step * (all_of_it - old), rtol=0, atol=2e-6)
        if not entry.step:
            assert largest_difference(before, after) is None


def test_the_next_rate_is_lower_after_a_round_that_was_not_taken_whole(scripted):
    rates = [float(entry.learning_rates[0]) for entry in scripted.entries]
    for step, (rate, following) in zip(TAKEN, itertools.pairwise(rates), strict=False):
        assert (following < rate) == (step < 1)


def test_a_round_in_which_all_clients_diverge_is_not_taken(lost):
    first, second, third, *_ = lost.entries
    assert (first.step > 0, second.step, second.attempt) == (True, 0.0, 0)
    assert not second.weights.any()
    assert largest_difference(*lost.thetas[:2]) is None
    np.testing.assert_array_equal(third.learning_rates, second.learning_rates * np.float32(FACTORS[0.0]))
    assert third.step > 0
    assert lost.result.metrics[1]["train_loss"] is None


def test_a_first_rate_beyond_all_reason_ends_no_run(setup, steady, tmp_path, monkeypatch):
    monkeypatch.setattr(automatic_rate, "FIRST_MOVE", 1e36)
    run = start(tmp_path / "run", setup)
    assert {entry.step for entry in run.entries} == {0.0}
    assert largest_difference(run.result.params, jax.device_get(setup.params)) is None
    assert run.result.loss_after == run.result.loss_before
    assert largest_difference(replay(run.folder / "run.ledger").params, run.result.params) is None


@pytest.mark.parametrize("step", FACTORS)
def test_no_number_of_rounds_takes_the_rate_out_of_float32(step):
    """An infinite rate times a projected gradient of 0 is NaN, and no rate can be raised from 0."""
    rate = np.float32(1e-2)
    for _ in range(1000):
        rate = automatic_rate.next_rate(rate, step)
    assert rate.dtype == np.float32
    assert np.finfo(np.float32).tiny < rate < np.inf  # some devices take subnormal numbers for 0


@pytest.mark.parametrize("gradient", [0.0, 1e-44, 1e38, math.nan, math.inf])
def test_the_first_rate_is_a_number_whatever_is_measured(gradient):
    report = RoundReport(np.ones((3, 2)), np.full((3, 2, 4), gradient, np.float32), np.zeros(3, np.float32))
    rate = automatic_rate.first_rate(report, 100)
    assert np.finfo(np.float32).tiny < rate < np.finfo(np.float32).max
    assert float(np.float32(rate)) == pytest.approx(rate, rel=1e-6)
