"""The zeroth-order step against gradients that are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmezo_jax.core import mezo

DIMENSION = 20
CURVATURE = np.linspace(0.5, 2.0, DIMENSION, dtype=np.float32)
THETA = np.linspace(-1.0, 1.0, DIMENSION, dtype=np.float32)


def quadratic(params, batch):
    return 0.5 * jnp.sum(CURVATURE * (params["w"] - batch) ** 2)


def key(seed=0):
    return jax.random.key(seed, impl="threefry2x32")


def estimates(distribution, directions, samples):
    """``samples`` gradient estimates, read off the moves of steps at rate 1."""
    config = mezo.MezoConfig(1e-2, directions, distribution)
    pair_loss = mezo.pair_loss_of(quadratic)

    def estimate(k):
        return THETA - mezo.step(pair_loss, {"w": jnp.asarray(THETA)}, 0.0, k, 1.0, config).params["w"]

    return np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(key(), samples)))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_mean_of_the_estimate_is_the_gradient(distribution):
    gradient = CURVATURE * THETA
    samples = estimates(distribution, 1, 40_000)
    standard_error = samples.std(axis=0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - gradient) < 4.5 * standard_error)
    assert standard_error.max() < 0.05


@pytest.mark.parametrize(("distribution", "spread"), [("gaussian", DIMENSION + 1), ("rademacher", DIMENSION - 1)])
@pytest.mark.parametrize("directions", [1, 4])
def test_squared_error_falls_with_directions_as_theory_says(distribution, spread, directions):
    """E‖ĝ − ∇f‖² = (d ± 1)/n·‖∇f‖²: the fourth moment of z's entries is 3 (Gaussian) or 1 (Rademacher)."""
    gradient = CURVATURE * THETA
    squared = ((estimates(distribution, directions, 20_000) - gradient) ** 2).sum(axis=1)
    expected = spread / directions * (gradient**2).sum()
    assert squared.mean() == pytest.approx(expected, rel=0.05)


def test_error_grows_with_the_square_of_the_perturbation_scale():
    """On Σ w³ the two-point slope exceeds ∇f·z by exactly μ²·Σ z³."""

    def cubic(params, batch):
        return jnp.sum(params["w"] ** 3)

    params = {"w": jnp.asarray(THETA)}
    direction = np.asarray(mezo.shift({"w": jnp.zeros(DIMENSION)}, mezo.Perturbation(key(), 1.0))["w"], np.float64)
    slope = np.sum(3 * THETA.astype(np.float64) ** 2 * direction)
    for scale in (0.1, 0.3, 1.0):
        plus, minus = mezo.pair_loss_of(cubic)(params, None, mezo.Perturbation(key(), scale))
        error = (float(plus) - float(minus)) / (2 * scale) - slope
        assert error == pytest.approx(scale**2 * np.sum(direction**3), rel=1e-3)


def test_a_step_at_rate_zero_leaves_every_bit():
    params = {"w": jax.random.normal(key(1), (DIMENSION,)), "m": jax.random.normal(key(2), (3, 5))}

    def loss(p, batch):
        return jnp.sum(p["w"]) * jnp.sum(p["m"] ** 2)

    config = mezo.MezoConfig(1e-1, directions=3)
    done = jax.jit(lambda p: mezo.step(mezo.pair_loss_of(loss), p, None, key(), 0.0, config))(params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(done.params), strict=True):
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


def test_step_is_reconstructed_from_its_key_and_projected_gradients():
    config = mezo.MezoConfig(1e-2, directions=3, weight_decay=0.1)
    params = {"w": jnp.asarray(THETA)}
    done = mezo.step(mezo.pair_loss_of(quadratic), params, 1.0, key(), 1e-2, config)
    shrunk = THETA * np.float32(1 - 1e-3)
    for k, gradient in enumerate(np.asarray(done.estimate.projected_gradients)):
        leaf = jax.random.fold_in(jax.random.fold_in(key(), k), _crc(b"w"))
        shrunk = shrunk - 1e-2 * gradient / 3 * np.asarray(jax.random.normal(leaf, (DIMENSION,)))
    np.testing.assert_allclose(done.params["w"], shrunk, atol=1e-6)
    coefficients = mezo.coefficients(np.float32(1e-2), np.asarray(done.estimate.projected_gradients))
    np.testing.assert_allclose(mezo.apply_step(params, key(), coefficients, 1e-2, config)["w"], shrunk, atol=1e-6)


@pytest.mark.parametrize("directions", [1, 2, 3, 7])
def test_coefficients_have_the_same_bits_on_the_host_and_compiled(directions):
    draw = np.random.RandomState(directions)
    gradients = draw.standard_normal((5000, directions)).astype(np.float32)
    rate = np.float32(1.3e-3)
    host = mezo.coefficients(rate, gradients)
    np.testing.assert_array_equal(host, jax.jit(mezo.coefficients)(rate, gradients))
    np.testing.assert_allclose(host, 1.3e-3 * gradients.astype(np.float64) / directions, rtol=3e-7)
    assert host.dtype == np.float32


def _crc(name):
    import binascii

    return binascii.crc32(name)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_rows_drawn_alone_equal_the_tree_bit_for_bit(distribution):
    tree = {"q": {"A": jnp.zeros((4, 3, 2)), "B": jnp.zeros((4, 2, 5))}, "v": {"A": jnp.zeros((4, 3, 2))}}
    perturbation = mezo.Perturbation(key(7), 1.0, distribution)
    whole = jax.jit(mezo.shift)(tree, perturbation)
    for row in range(4):
        alone = jax.jit(mezo.shift_row)(jax.tree.map(lambda leaf, r=row: leaf[r], tree), perturbation, row)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b[row])
    flat = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(whole)])
    assert len(np.unique(np.abs(flat))) == (len(flat) if distribution == "gaussian" else 1)


def test_another_leaf_does_not_change_a_leafs_direction():
    leaf = jnp.zeros((2, 6))
    one = mezo.shift({"b": leaf}, mezo.Perturbation(key(), 1.0))
    two = mezo.shift({"a": leaf, "b": leaf}, mezo.Perturbation(key(), 1.0))
    np.testing.assert_array_equal(one["b"], two["b"])
    assert not np.any(np.asarray(two["a"]) == np.asarray(two["b"]))


def test_vmap_draws_what_a_loop_draws():
    tree = {"w": jnp.zeros((3, 8))}
    keys = jax.random.split(key(), 5)
    together = jax.vmap(lambda k: mezo.shift(tree, mezo.Perturbation(k, 1.0)))(keys)["w"]
    for k, z in zip(keys, together, strict=True):
        np.testing.assert_array_equal(z, mezo.shift(tree, mezo.Perturbation(k, 1.0))["w"])
