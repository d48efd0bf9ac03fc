"""The contracts of the three seams, each over all its implementations: estimators, transforms, aggregators."""

from typing import get_args

import estimator_contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmezo_jax.core import aggregation, estimators, mezo, transforms
from fedmezo_jax.core.estimators import BackwardGradient, ForwardGradient, TwoPoint

MU = 1e-2
ESTIMATORS = {
    "two points": TwoPoint(mezo.MezoConfig(MU)),
    "two points along three directions": TwoPoint(mezo.MezoConfig(MU, 3)),
    "two points along signs": TwoPoint(mezo.MezoConfig(MU, 2, "rademacher")),
    "two points with decay": TwoPoint(mezo.MezoConfig(MU, weight_decay=0.1)),
    "a tangent": ForwardGradient(mezo.MezoConfig()),
    "tangents along four directions": ForwardGradient(mezo.MezoConfig(directions=4)),
    "tangents along signs with decay": ForwardGradient(mezo.MezoConfig(MU, 2, "rademacher", 0.1)),
    "a gradient": BackwardGradient(mezo.MezoConfig()),
    "a gradient along four directions": BackwardGradient(mezo.MezoConfig(directions=4)),
    "a gradient along signs with decay": BackwardGradient(mezo.MezoConfig(MU, 2, "rademacher", 0.1)),
}
LOSSES = {TwoPoint: mezo.pair_loss_of, ForwardGradient: mezo.point_loss_of, BackwardGradient: lambda loss: loss}


def loss_of(name):
    """What makes of a plain loss the one that the estimator of this name takes."""
    return LOSSES[type(ESTIMATORS[name])]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_seeds_and_scalars_alone_reconstruct_the_client_bit_for_bit(name):
    estimator_contract.check_reconstruction(ESTIMATORS[name], loss_of(name))


def test_each_name_of_the_command_line_has_an_estimator_that_takes_its_loss():
    assert tuple(estimators.ESTIMATORS) == get_args(estimators.EstimatorName)
    losses = {"pair_loss": mezo.pair_loss_of, "point_loss": mezo.point_loss_of, "loss": lambda loss: loss}
    for named in estimators.ESTIMATORS.values():
        estimator_contract.check_reconstruction(named.make(mezo.MezoConfig(MU, 2)), losses[named.loss])


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if "decay" not in name])
def test_the_mean_move_is_the_gradient(name):
    estimator_contract.check_unbiased(ESTIMATORS[name], loss_of(name))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("kind", [ForwardGradient, BackwardGradient])
def test_slopes_are_exact_and_share_one_evaluation_of_the_loss(kind, distribution):
    """⟨∇L, z⟩ with z taken from the update, for all directions at once; the loss is traced once, without an axis."""
    evaluated = []

    def counted(params, batch):
        evaluated.append(params["w"].shape)
        return estimator_contract.quadratic(params, batch)

    estimator = kind(mezo.MezoConfig(directions=5, distribution=distribution))
    key = estimator_contract.KEY
    start, target = estimator_contract.START, estimator_contract.TARGETS[0]
    found = estimator.estimate(LOSSES[kind](counted), start, target, key)
    gradient = {"w": estimator_contract.CURVATURE * (start["w"] - target), "m": start["m"]}
    zeros = jax.tree.map(np.zeros_like, start)
    for k in range(5):
        z = estimator.apply(zeros, key, -np.eye(5, dtype=np.float32)[k], 0.0)
        expected = sum(np.vdot(gradient[name], z[name]) for name in gradient)
        np.testing.assert_allclose(found.projected_gradients[k], expected, rtol=1e-5)
    np.testing.assert_allclose(found.loss, estimator_contract.quadratic(start, target), rtol=1e-6)
    assert evaluated == [start["w"].shape]


def test_a_local_step_is_the_step_of_the_paper():
    """Of two local steps the first is ``mezo.step`` with its key."""
    config = mezo.MezoConfig(MU, 2, weight_decay=0.1)
    result = estimator_contract.local_work(TwoPoint(config), mezo.pair_loss_of)
    key = jax.random.fold_in(estimator_contract.KEY, 0)
    loss = mezo.pair_loss_of(estimator_contract.quadratic)
    step = mezo.step(loss, estimator_contract.START, estimator_contract.TARGETS[0], key, 0.05, config)
    np.testing.assert_allclose(result.projected_gradients[0], step.estimate.projected_gradients, rtol=1e-4)
    np.testing.assert_allclose(result.losses[0], step.estimate.loss, rtol=1e-6)


# Transforms

GRADIENTS = np.array([-7.0, -0.5, 0.0, 0.25, np.nan, 3.0, np.inf], np.float32)
TRANSFORMS = {
    "clip at 2": (transforms.clip(2.0), [-2.0, -0.5, 0.0, 0.25, 0.0, 2.0, 2.0]),
    "clip at infinity": (transforms.clip(np.inf), [-7.0, -0.5, 0.0, 0.25, 0.0, 3.0, np.inf]),
    "a chain of nothing": (transforms.chain(), GRADIENTS),
    "a chain": (
        transforms.chain(transforms.clip(4.0), jax.tree_util.Partial(jnp.negative), transforms.clip(2.0)),
        [2.0, 0.5, 0.0, -0.25, 0.0, -2.0, -2.0],
    ),
    "a chain in another order": (
        transforms.chain(jax.tree_util.Partial(jnp.abs), transforms.clip(1.0)),
        [1.0, 0.5, 0.0, 0.25, 0.0, 1.0, 1.0],
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_a_function_of_projected_gradients_alone(name):
    transform, expected = TRANSFORMS[name]
    found = transform(jnp.asarray(GRADIENTS))
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32))
    assert found.dtype == np.float32
    compiled = jax.jit(lambda transform, gradients: transform(gradients))  # as an argument of the round
    np.testing.assert_array_equal(compiled(transform, GRADIENTS), found)
    each = [np.asarray(transform(GRADIENTS[k : k + 1])) for k in range(len(GRADIENTS))]
    np.testing.assert_array_equal(np.concatenate(each), found)


def test_another_limit_compiles_nothing_anew():
    traced = []
    compiled = jax.jit(lambda transform, gradients: (traced.append(1), transform(gradients))[1])
    for limit in (1.0, 2.0, np.inf):
        compiled(transforms.chain(transforms.clip(np.float32(limit))), GRADIENTS)
    assert len(traced) == 1


# Aggregators

AGGREGATORS = {
    "weighted mean": (aggregation.WeightedMean(), lambda values, weights: np.average(values, 0, weights)),
    "median": (aggregation.aggregator_of("median", 0.25), lambda values, weights: np.sort(values, 0)[1:3].mean(0)),
    "trimmed mean": (
        aggregation.aggregator_of("trimmed-mean", 0.25),
        lambda values, weights: np.sort(values, 0)[1:-1].mean(0),
    ),
}
DRAW = np.random.default_rng(5)
WEIGHTS = aggregation.shares(np.array([1.0, 2.0, 3.0, 10.0]))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_agrees_with_plain_numpy(name):
    aggregator, oracle = AGGREGATORS[name]
    coefficients = DRAW.standard_normal((4, 3, 2)).astype(np.float32)
    found = aggregator.combine_coefficients(WEIGHTS, coefficients)
    assert (found.shape, found.dtype) == ((3, 2), np.float32)
    np.testing.assert_allclose(found, oracle(coefficients.astype(np.float64), WEIGHTS), rtol=1e-6, atol=1e-7)

    params = {"w": DRAW.standard_normal((2, 3)).astype(np.float32), "b": np.ones(4, np.float32)}
    uploads = [jax.tree.map(lambda leaf: leaf + DRAW.standard_normal(leaf.shape, np.float32), params) for _ in range(4)]
    update = aggregator.combine_params(params, WEIGHTS, iter(uploads))
    for leaf in params:
        moves = np.stack([upload[leaf] for upload in uploads]).astype(np.float64) - params[leaf]
        np.testing.assert_allclose(update[leaf], oracle(moves, WEIGHTS), rtol=1e-5, atol=1e-6)


def test_shares_sum_to_one_and_keep_zeros():
    share = aggregation.shares(np.array([0, 1, 3], np.float32))
    np.testing.assert_array_equal(share, np.array([0, 0.25, 0.75], np.float32))
    assert share.dtype == np.float32
