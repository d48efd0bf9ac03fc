"""ε and noise against the exact theorem of the Gaussian mechanism, and the mechanism's own promises."""

import numpy as np
import pytest
from scipy import optimize, stats

from fedmezo_jax.privacy import accountant, mechanism


def exact_delta(epsilon, noise, participations):
    """Of k Gaussian mechanisms, which are one with σ/√k (Balle and Wang, arXiv 1805.06530, Theorem 8)."""
    mu = participations**0.5 / noise
    loss = epsilon / mu
    return stats.norm.cdf(mu / 2 - loss) - np.exp(epsilon + stats.norm.logcdf(-mu / 2 - loss))


@pytest.mark.parametrize("noise", [0.7, 2.0, 10.0])
@pytest.mark.parametrize("participations", [1, 7, 50])
def test_what_is_spent_is_the_exact_epsilon_rounded_up(noise, participations):
    exact = optimize.brentq(lambda epsilon: exact_delta(epsilon, noise, participations) - 1e-5, 1e-6, 1e4)
    assert exact <= accountant.spent(noise, 1e-5, participations) <= exact * (1 + 1e-3) + 2e-3


def test_nothing_is_spent_before_the_first_round():
    assert accountant.spent(1.0, 1e-5, 0) == 0


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_noise_is_the_least_that_keeps_to_epsilon(epsilon):
    noise = accountant.noise_multiplier(epsilon, 1e-5, 20)
    assert exact_delta(epsilon, noise, 20) <= 1e-5
    assert exact_delta(epsilon, 0.99 * noise, 20) > 1e-5
    assert accountant.spent(noise, 1e-5, 20) <= epsilon


def test_the_client_that_takes_part_most_often_counts():
    assert accountant.most_participations([np.array([0, 2]), np.array([2, 3]), np.array([2])], 4) == 3
    assert accountant.most_participations([], 4) == 0


def test_a_client_moves_the_mean_by_no_more_than_its_norm():
    """The sensitivity that the accountant assumes, whatever the client sends; the noise is the same in both."""
    vectors = [np.full(5, 3.0), np.full(5, 1e30), np.full(5, np.nan), np.array([0.1, 0, 0, 0, 0])]

    def mean(kept):
        return mechanism.noisy_mean(kept, 4, 2.0, 1.5, np.random.default_rng(0), 5).astype(np.float64)

    for i in range(4):
        moved = np.linalg.norm(mean(vectors) - mean(vectors[:i] + vectors[i + 1 :]))
        assert moved <= 2.0 / 4 * (1 + 1e-6)
    np.testing.assert_allclose(mechanism.clip(vectors[0], 2.0), np.full(5, 2 / 5**0.5))
    np.testing.assert_array_equal(mechanism.clip(vectors[3], 2.0), vectors[3])


def test_the_noise_has_the_standard_deviation_that_the_accountant_assumes():
    draw = np.random.default_rng(1)
    means = [mechanism.noisy_mean([], 10, 2.0, 1.5, draw, 50) for _ in range(200)]
    assert np.std(means) == pytest.approx(2.0 * 1.5 / 10, rel=0.03)
    alone = [mechanism.noisy(np.zeros((5, 10)), 2.0, 1.5, draw) for _ in range(200)]
    assert np.std(alone) == pytest.approx(2.0 * 1.5, rel=0.03)
    assert stats.kstest(np.ravel(means) / 0.3, "norm").pvalue > 1e-4


def test_every_round_attempt_and_client_has_noise_of_its_own():
    sources = [(0, 0, -1), (1, 0, -1), (0, 1, -1), (0, 0, 0), (0, 0, 1)]
    drawn = {mechanism.simulated_noise(3, *source).standard_normal() for source in sources}
    assert len(drawn) == len(sources)
    assert mechanism.simulated_noise(3, 0, 0).standard_normal() in drawn


def test_a_deployed_run_draws_normal_noise_that_does_not_come_again():
    one, other = (mechanism.system_noise(0, 0).standard_normal((200, 50)) for _ in range(2))
    assert one.shape == (200, 50)
    assert stats.kstest(one.ravel(), "norm").pvalue > 1e-4
    assert not np.any(one == other)
