"""What every estimator must satisfy, on a loss whose gradient is known."""

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.core import mezo
from fedmezo_jax.core.client import estimator_client

DIMENSION, STEPS, RATE = 12, 3, np.float32(0.05)
CURVATURE = np.linspace(0.5, 2.0, DIMENSION, dtype=np.float32)
KEY = jax.random.key(4, impl="threefry2x32")
START = {"w": np.linspace(-1, 1, DIMENSION, dtype=np.float32), "m": np.full((2, 3), 0.5, np.float32)}
TARGETS = np.random.RandomState(0).standard_normal((STEPS, DIMENSION)).astype(np.float32)


def quadratic(params, batch):
    """Gradient c·(w − target) in ``w``, and ``m`` itself in ``m``."""
    return 0.5 * jnp.sum(CURVATURE * (params["w"] - batch) ** 2) + 0.5 * jnp.sum(params["m"] ** 2)


def local_work(estimator, loss_of=lambda loss: loss):
    run = jax.jit(lambda *given: estimator_client(estimator)(loss_of(quadratic), *given))
    return run(START, TARGETS, KEY, RATE)


def check_reconstruction(estimator, loss_of=lambda loss: loss):
    """From θ at the start, the key and the scalars, another program without the loss makes the client's θ."""
    result = jax.device_get(local_work(estimator, loss_of))
    assert result.projected_gradients.shape[0] == result.losses.shape[0] == STEPS
    assert result.projected_gradients.dtype == np.float32
    coefficients = mezo.coefficients(RATE, result.projected_gradients)
    reconstruct = estimator_client(estimator).reconstruct
    assert reconstruct is not None
    rebuilt = jax.jit(reconstruct)(START, KEY, coefficients, RATE)
    for name in START:
        np.testing.assert_array_equal(rebuilt[name], result.params[name])
        assert np.abs(result.params[name] - START[name]).max() > 1e-3
    other = jax.jit(reconstruct)(START, jax.random.fold_in(KEY, 1), coefficients, RATE)
    assert np.abs(other["w"] - result.params["w"]).max() > 1e-3  # the key matters


def check_unbiased(estimator, loss_of=lambda loss: loss, samples=30_000):
    """Over many keys the mean of −Δθ at rate 1 is the gradient, within 4.5 standard errors in every entry."""
    loss = loss_of(quadratic)
    zeros = jax.tree.map(np.zeros_like, START)

    def one(key):
        gradients, _ = estimator.estimate(loss, START, TARGETS[0], key)
        return estimator.apply(zeros, key, -mezo.coefficients(np.float32(1), gradients), 0.0)

    moves = jax.jit(jax.vmap(one))(jax.random.split(KEY, samples))
    gradient = {"w": CURVATURE * (START["w"] - TARGETS[0]), "m": START["m"]}
    for name, expected in gradient.items():
        found = np.asarray(moves[name], np.float64)
        error = found.std(axis=0) / np.sqrt(samples)
        assert np.all(np.abs(found.mean(axis=0) - expected) < 4.5 * error)
        assert error.max() < 0.1
