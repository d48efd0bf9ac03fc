"""The accountant's ε against what an attacker achieves: an empirical lower bound, which must not exceed it.

A client that sends the longest vector allowed is there or not. The attacker sees the means of all its rounds and goes
by their sum along that vector, the best test there is. From the counts of 20,000 trials of each case, with a confidence
of 99.9 %: ε ≥ log((true positives − δ)/false positives).
"""

import numpy as np
import pytest
from scipy import stats

from fedmezo_jax.privacy import accountant, mechanism

TRIALS, CONFIDENCE, DELTA, NORM, ROUNDS = 20_000, 0.999, 1e-5, 2.0, 4


def lower_bound(noise):
    draw, canary = np.random.default_rng(0), np.full(4, 100.0)

    def seen(vectors):
        means = [mechanism.noisy_mean(vectors, 3, NORM, noise, draw, 4).sum() for _ in range(TRIALS * ROUNDS)]
        return np.reshape(means, (TRIALS, ROUNDS)).sum(axis=1)

    without, with_canary = seen([]), seen([canary])
    bounds = []
    for threshold in np.quantile(without, [0.5, 0.8, 0.9, 0.95, 0.98]):
        found, mistaken = np.sum(with_canary > threshold), np.sum(without > threshold)
        rate = stats.binomtest(int(found), TRIALS).proportion_ci(CONFIDENCE).low
        mistakes = stats.binomtest(int(mistaken), TRIALS).proportion_ci(CONFIDENCE).high
        bounds.append(np.log((rate - DELTA) / mistakes))
    return max(bounds)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_no_attack_does_better_than_the_accountant_says(epsilon):
    noise = accountant.noise_multiplier(epsilon, DELTA, ROUNDS)
    achieved = lower_bound(noise)
    assert 0.15 * epsilon < achieved <= epsilon


def test_with_a_fifth_of_the_noise_the_audit_finds_it():
    assert lower_bound(accountant.noise_multiplier(1.0, DELTA, ROUNDS) / 5) > 1.0
