"""Steps that are private in each example: against each example's own slopes, and what one may move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmezo_jax.core import mezo
from fedmezo_jax.core.estimators import BackwardGradient, ForwardGradient, TwoPoint
from fedmezo_jax.core.per_example import NoisyBatch, PerExample, clip_norm

KEY = jax.random.key(4, impl="threefry2x32")
START = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}
TARGETS = (
    np.random.RandomState(0).normal(size=(5, 3, 4)).astype(np.float32) * np.array([1, 2, 0.1, 5, 1])[:, None, None]
)
TARGETS = TARGETS.astype(np.float32)
DIRECTIONS = 4
NOISE = np.array([0.5, -1.0, 0.0, 2.0], np.float32)


def loss(params, targets):
    return jnp.mean(jnp.sum(jnp.square(params["w"] - targets), axis=(1, 2)))


ESTIMATORS = {
    "forward gradient": (ForwardGradient(mezo.MezoConfig(directions=DIRECTIONS)), mezo.point_loss_of(loss), 1e-4),
    "backward gradient": (BackwardGradient(mezo.MezoConfig(directions=DIRECTIONS)), loss, 1e-4),
    "two points": (TwoPoint(mezo.MezoConfig(1e-2, DIRECTIONS)), mezo.pair_loss_of(loss), 1e-3),
}


def slopes(estimator):
    """``[B, n]`` float64: ⟨2(w − target_b), z_k⟩, with z_k taken from the update."""
    zeros = {"w": np.zeros_like(START["w"])}
    found = []
    for k in range(DIRECTIONS):
        moved = estimator.apply(zeros, KEY, -np.eye(DIRECTIONS, dtype=np.float32)[k], 0.0)
        found.append(np.asarray(moved["w"], np.float64))
    gradients = 2 * (START["w"] - TARGETS.astype(np.float64))
    return np.einsum("bij,kij->bk", gradients, np.stack(found))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_step_is_the_noisy_mean_of_bounded_slopes(name):
    estimator, loss_of_pair, tolerance = ESTIMATORS[name]
    each = slopes(estimator)
    norms = np.linalg.norm(each, axis=1, keepdims=True)
    norm = float(np.median(norms))  # some are shortened and some are not
    expected = (np.sum(each * np.minimum(1, norm / norms), axis=0) + NOISE) / len(TARGETS)
    private = PerExample(estimator, norm)
    found = jax.jit(lambda batch: private.estimate(loss_of_pair, START, batch, KEY))(NoisyBatch(TARGETS, NOISE))
    np.testing.assert_allclose(found.projected_gradients, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.loss, loss(START, TARGETS), rtol=1e-3)


@pytest.mark.parametrize("lie", [1.0, -1e4, np.nan, np.inf])
def test_an_example_moves_the_sum_by_no_more_than_its_norm(lie):
    estimator, point_loss, _ = ESTIMATORS["forward gradient"]
    private, without = PerExample(estimator, 0.7), np.delete(TARGETS, 3, axis=0)
    changed = TARGETS.copy()
    changed[3] *= lie
    one = private.estimate(point_loss, START, NoisyBatch(changed, NOISE), KEY).projected_gradients * len(TARGETS)
    other = private.estimate(point_loss, START, NoisyBatch(without, NOISE), KEY).projected_gradients * len(without)
    moved = float(np.linalg.norm(one - other))
    assert moved == pytest.approx(0.7 if np.isfinite(lie) else 0, abs=1e-4)


def test_a_vector_is_shortened_and_never_lengthened():
    np.testing.assert_allclose(clip_norm(jnp.array([3.0, 4.0]), 1.0), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(clip_norm(jnp.array([0.3, 0.4]), 1.0), np.array([0.3, 0.4], np.float32))
    np.testing.assert_array_equal(clip_norm(jnp.zeros(2), 1.0), [0, 0])
