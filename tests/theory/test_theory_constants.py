"""Bounds and fits against cases worked by hand, and the predicted descent against simulated steps on a quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmezo_jax.core import mezo
from fedmezo_jax.theory import constants


def test_envelope_finds_the_line_that_bounds_exact_points():
    x = np.array([0.5, 1.0, 2.0, 7.0])
    slope, intercept = constants.envelope(x, 3 * x + 0.25)
    assert (slope, intercept) == pytest.approx((3, 0.25), rel=1e-6)


def test_envelope_is_above_all_points_and_tight():
    draw = np.random.default_rng(0)
    x = draw.uniform(1e-4, 3e-4, 60)  # the magnitudes of squared gradients
    y = 5 * x + 2e-4 * draw.uniform(size=60)
    slope, intercept = constants.envelope(x, y)
    slack = slope * x + intercept - y
    assert slack.min() > -1e-12
    assert np.sum(slack < 1e-10) >= 2  # a line that could still be lowered touches fewer
    assert slope >= 0 <= intercept


def test_envelope_keeps_the_least_slope():
    slope, intercept = constants.envelope([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], 1.0)
    assert (slope, intercept) == pytest.approx((1, 4))
    slope, intercept = constants.envelope([1.0, 2.0, 3.0], [5.0, 4.0, 3.0])
    assert (slope, intercept) == pytest.approx((0, 5))


def test_gamma_and_zeta_have_their_limits():
    assert constants.gamma(10**7, 30.0) == pytest.approx(31, rel=1e-5)
    assert constants.gamma(10**7, 30.0, 5) == pytest.approx(31 / 5, rel=1e-5)
    assert constants.gamma(8, 8.0) == pytest.approx((64 + 6) / 10)
    assert constants.zeta(8, 8.0) == pytest.approx(10 / (70 * 8))


def test_conditions_and_schedule_by_hand():
    limits = constants.rate_limits(smoothness=2.0, c_g=4.0, d=100, clients=3, steps=10)
    assert limits == pytest.approx((1 / 1200, 3 / 240, 0.01))
    assert constants.schedule(4.0, 8, 2, 25) == pytest.approx((0.4, 1.0))
    assert constants.rate_iid(4.0, 4, 4, 4) == pytest.approx(1)
    assert constants.rate_non_iid(4.0, 4, 4, 4, 12.0, 6.0) == pytest.approx((8 / 32, 36 / 48))
    assert constants.rate_non_iid(4.0, 4, 4, 4, 0.0, 6.0)[1] == np.inf


def test_power_law_of_exact_and_noisy_points():
    x = np.array([1, 2, 4, 8, 16.0])
    slope, error = constants.power_law(x, 7 * x**-0.5)
    assert slope == pytest.approx(-0.5)
    assert error < 1e-7
    noisy = x**-0.5 * np.exp(0.3 * np.array([1, -1, 1, -1, 1]))
    assert constants.power_law(x, noisy).error > 0.05


def test_predicted_descent_equals_simulated_steps():
    """f(θ) = ½ θᵀHθ, batches that shift it: −η‖∇f‖² + …, to within the simulation's standard error."""
    draw = np.random.default_rng(1)
    width, count, rate = 12, 40_000, 0.02
    root = draw.normal(size=(width, width))
    h = root @ np.diag(np.linspace(-0.5, 2, width)) @ root.T / width
    theta, shifts = draw.normal(size=width), draw.normal(size=(5, width))
    shifts -= shifts.mean(axis=0)

    def f(params, shift):
        return 0.5 * params @ jnp.asarray(h, jnp.float32) @ params + shift @ params

    def step(key, shift):
        moved = mezo.step(
            mezo.pair_loss_of(f), jnp.asarray(theta, jnp.float32), shift, key, rate, mezo.MezoConfig(1e-2)
        ).params
        return f(moved, jnp.zeros(width))

    keys = jax.random.split(jax.random.key(0), count)
    batches = jnp.asarray(shifts[np.arange(count) % 5], jnp.float32)
    after = np.asarray(jax.jit(jax.vmap(step))(keys, batches), np.float64) - 0.5 * theta @ h @ theta
    each = h @ theta + shifts
    noisy, curvature = np.mean(np.sum(each**2, axis=1)), np.mean(np.einsum("bi,ij,bj->b", each, h, each))
    gradient = np.sum((h @ theta) ** 2)
    predicted = constants.descent_second_order(rate, gradient, noisy, np.trace(h), curvature)
    error = after.std() / np.sqrt(count)
    assert abs(after.mean() - predicted) < 4 * error
    assert abs(predicted + rate * gradient) > 10 * error  # the second-order term matters here
    values = np.linalg.eigvalsh(h)
    rank = np.maximum(values, 0).sum() / values.max()
    # The bound is for z on a sphere, where γ is a little smaller; Gaussian directions add 2/(d + 2) to it.
    bound = constants.descent_bound(rate, gradient, noisy, values.max(), (rank + 2))
    assert after.mean() < bound
