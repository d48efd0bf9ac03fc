"""Learning rates, heterogeneity and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmezo_jax.core import aggregation
from fedmezo_jax.core.personalization import (
    STRATEGIES,
    RateConfig,
    heterogeneity_index,
    init_signals,
    learning_rates,
    observe,
)

KEY = jax.random.key(0, impl="threefry2x32")


def test_index_by_hand():
    np.testing.assert_allclose(heterogeneity_index(jnp.array([1.0, 2.0, 6.0])), [-2 / 3, -1 / 3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(heterogeneity_index(jnp.array([1.0, jnp.nan, 3.0])), [-1, 0, 1], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1.8453, 1e-20, 3e7])
@pytest.mark.parametrize("clients", [1, 2, 3, 7, 40])
def test_equal_signals_give_zero_and_not_nan(value, clients):
    np.testing.assert_array_equal(heterogeneity_index(jnp.full((clients,), value)), np.zeros(clients))


@given(hnp.arrays(np.float32, st.sampled_from([1, 2, 9]), elements=st.floats(0, 100, width=32)))
def test_rates_stay_within_their_band(signal):
    signals = init_signals(len(signal))._replace(
        losses=jnp.asarray(np.repeat(signal[:, None], 5, axis=1)), drift=jnp.asarray(signal)
    )
    for strategy in STRATEGIES:
        rates = np.asarray(learning_rates(RateConfig(1e-5, strategy, 0.5), signals, KEY))
        assert rates.shape == signal.shape
        assert np.all(rates >= 0.4999e-5)
        assert np.all(rates <= 1.5001e-5)


def test_nothing_known_means_one_rate_for_all():
    for strategy in ("frozen", "round-wise", "five-round", "model-diff", "shuffled"):
        rates = learning_rates(RateConfig(1e-3, strategy), init_signals(4), KEY)
        np.testing.assert_array_equal(rates, np.full(4, 1e-3, np.float32))


def test_random_rates_change_with_the_key():
    config = RateConfig(1e-3, "random")
    one, two = (learning_rates(config, init_signals(50), jax.random.key(k)) for k in (0, 1))
    assert len(np.unique(np.concatenate([one, two]))) == 100


def test_shuffled_deals_out_the_rates_of_model_diff():
    signals = init_signals(30)._replace(drift=jnp.arange(30.0) ** 2)
    meant, dealt, again = (
        np.asarray(learning_rates(RateConfig(1e-3, strategy), signals, jax.random.key(k)))
        for strategy, k in (("model-diff", 0), ("shuffled", 0), ("shuffled", 1))
    )
    np.testing.assert_array_equal(np.sort(dealt), np.sort(meant))
    assert not np.array_equal(dealt, meant)
    assert not np.array_equal(dealt, again)


def test_five_round_waits_for_five():
    signals = init_signals(3)
    config = RateConfig(1e-3, "five-round")
    everyone = jnp.arange(3)
    for t in range(5):
        np.testing.assert_array_equal(learning_rates(config, signals, KEY), np.full(3, 1e-3, np.float32))
        signals = observe(signals, everyone, jnp.array([1.0, 2.0, 3.0]) + t, None)
    np.testing.assert_allclose(learning_rates(config, signals, KEY), [0.5e-3, 1e-3, 1.5e-3], rtol=1e-5)
    signals = observe(signals, everyone, jnp.array([30.0, 0.0, 0.0]), None)
    assert np.argmax(learning_rates(config, signals, KEY)) == 0


def test_observe_touches_participants_only():
    signals = observe(init_signals(4), jnp.array([1, 3]), jnp.array([5.0, 7.0]), jnp.array([0.1, 0.2]))
    np.testing.assert_array_equal(np.isnan(signals.losses[:, 0]), [True, False, True, False])
    np.testing.assert_allclose(signals.drift[jnp.array([1, 3])], [0.1, 0.2])
    assert np.isnan(signals.drift[jnp.array([0, 2])]).all()


@given(hnp.arrays(np.float32, st.sampled_from([(1, 3), (2, 1), (5, 4)]), elements=st.floats(-10, 10, width=32)))
def test_client_drift_is_the_distance_to_the_mean(deltas):
    drift = aggregation.client_drift({"a": jnp.asarray(deltas), "b": {"c": jnp.asarray(deltas[:, :, None])}})
    expected = np.sqrt(2) * np.linalg.norm(deltas - deltas.mean(axis=0, dtype=np.float64), axis=1)
    np.testing.assert_allclose(drift, expected, atol=1e-4)


@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 50), st.data())
def test_participants_are_distinct_sorted_and_repeatable(seed, t, clients, data):
    count = data.draw(st.integers(1, clients))
    ids = aggregation.sample_participants(seed, t, clients, count)
    assert len(ids) == count
    assert np.all(np.diff(ids) > 0)
    assert ids.min() >= 0
    assert ids.max() < clients
    np.testing.assert_array_equal(ids, aggregation.sample_participants(seed, t, clients, count))


def test_everyone_takes_part_at_times():
    drawn = [tuple(aggregation.sample_participants(0, t, 10, 3)) for t in range(60)]
    assert set(np.concatenate(drawn)) == set(range(10))
    assert len(set(drawn)) > 40
