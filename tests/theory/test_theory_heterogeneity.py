"""Measures of heterogeneity against cases whose truth is known."""

import jax.numpy as jnp
import numpy as np

from fedmezo_jax.theory import heterogeneity


def test_gradients_of_a_quadratic():
    centres = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    theta = jnp.arange(5.0)
    found = heterogeneity.gradients(lambda p, batch: 0.5 * jnp.mean((p - batch) ** 2) * 5, theta, centres)
    np.testing.assert_allclose(found, theta - np.mean(centres, axis=1), atol=1e-6)


def test_disparity_without_noise_is_the_squared_distance_from_the_mean():
    each = np.array([[3.0, 0], [-1, 2], [-2, 1]])  # mean (0, 1)
    np.testing.assert_allclose(heterogeneity.disparity(jnp.asarray(each), jnp.asarray(each)), [10, 2, 4], rtol=1e-6)


def test_disparity_has_no_bias_from_noise():
    """The plain squared norm of one noisy estimate would be too large by 7/8 of the noise's variance, here 35."""
    draw = np.random.default_rng(1)
    truth = draw.normal(size=(8, 40))
    centred = truth - truth.mean(axis=0)
    found = [
        heterogeneity.disparity(*(jnp.asarray(truth + draw.normal(size=truth.shape)) for _ in range(2)))
        for _ in range(400)
    ]
    error = np.std(found, axis=0) / 20
    assert (np.abs(np.mean(found, axis=0) - np.sum(centred**2, axis=1)) < 4 * error).all()
    assert error.max() < 2
