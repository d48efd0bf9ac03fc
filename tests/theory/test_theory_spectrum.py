"""Traces, norms and effective ranks against matrices whose spectra are known, and products against whole Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama.checkpoints.layout import base_shapes
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.theory import spectrum


def matrix(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues along random axes."""
    values = np.asarray(eigenvalues, np.float64)
    axes = np.linalg.qr(np.random.default_rng(seed).normal(size=(values.size, values.size)))[0]
    return jnp.asarray(axes * values @ axes.T, jnp.float32)


def probes(product, mask, steps, count, seed=1):
    keys = jax.random.split(jax.random.key(seed), count)
    runs = jax.jit(jax.vmap(lambda key: spectrum.lanczos(product, spectrum.random_signs(key, mask), steps)))(keys)
    return [spectrum.read(spectrum.Tridiagonal(*run), int(mask.sum())) for run in zip(*runs, strict=True)]


SPECTRA = {
    "flat": np.full(40, 3.0),
    "powers": 0.8 ** np.arange(60),
    "indefinite": np.concatenate([[-9.0, 5.0, 4.0], np.linspace(-0.5, 1, 57)]),
    "spiked": np.concatenate([[100.0], np.full(99, 0.1)]),
    "negative": -np.linspace(1, 2, 30),
    "ends after two steps": np.repeat([-3.0, -1.0], 20),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name):
    values = SPECTRA[name]
    h = matrix(values)
    found = probes(lambda v: h @ v, jnp.ones(values.size), 25, 200)
    for quantity, truth in (
        ("trace", values.sum()),
        ("absolute_trace", np.abs(values).sum()),
        ("positive_trace", np.maximum(values, 0).sum()),
    ):
        mean, error = spectrum.estimate([getattr(probe, quantity) for probe in found])
        assert abs(mean - truth) <= 4 * error + 1e-4 * np.abs(values).sum(), quantity
    for probe in found:
        assert probe.largest == pytest.approx(values.max(), rel=1e-3)
        assert probe.norm == pytest.approx(np.abs(values).max(), rel=1e-3)
        nearest = np.abs(np.abs(values) - probe.norm).min()
        assert nearest <= probe.norm_residual + 1e-4 * probe.norm
    ranks = spectrum.effective_ranks(found)
    assert ranks["plain"] == pytest.approx(values.sum() / np.abs(values).max(), rel=0.15)
    assert ranks["absolute"] == pytest.approx(np.abs(values).sum() / np.abs(values).max(), rel=0.1)
    if values.max() > 0:
        assert ranks["positive"] == pytest.approx(values[values > 0].sum() / values.max(), rel=0.1)
    else:
        assert np.isnan(ranks["positive"])


def test_full_lanczos_run_has_all_eigenvalues():
    values = np.array([-4.0, -1, 0.5, 1, 2, 3, 7, 20])
    h = matrix(values)
    run = spectrum.lanczos(lambda v: h @ v, spectrum.random_signs(jax.random.key(2), jnp.ones(8)), 8)
    whole = np.diag(run.diagonal) + np.diag(run.below[:-1], 1) + np.diag(run.below[:-1], -1)
    np.testing.assert_allclose(np.linalg.eigvalsh(whole), values, atol=2e-4)


def test_reorthogonalisation_leaves_no_ghosts():
    """Plain Lanczos finds a spike again and again once it has converged; here it must come once."""
    values = np.concatenate([[1e4], np.linspace(0, 1, 199)])
    h = matrix(values)
    run = spectrum.lanczos(lambda v: h @ v, spectrum.random_signs(jax.random.key(2), jnp.ones(200)), 40)
    whole = np.diag(run.diagonal) + np.diag(run.below[:-1], 1) + np.diag(run.below[:-1], -1)
    assert np.sum(np.linalg.eigvalsh(whole.astype(np.float64)) > 10) == 1


def test_standard_error_covers_the_trace():
    h = matrix(np.linspace(-1, 3, 50))
    traces = np.array([probe.trace for probe in probes(lambda v: h @ v, jnp.ones(50), 1, 3000)])
    estimates = [spectrum.estimate(part) for part in traces.reshape(100, 30)]
    inside = sum(abs(mean - 50) <= 2 * error for mean, error in estimates)
    assert 85 <= inside < 100  # 95 of 100, give or take 4.6 standard deviations
    assert spectrum.estimate([1, 2, 3, 6]) == pytest.approx((3, (14 / 3 / 4) ** 0.5))


CONFIG = LlamaConfig(
    vocab_size=23,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def small():
    """Loss, LoRA at its start and off it, rows, and the explicit Hessians ``[d, d]`` at both."""
    draw = np.random.default_rng(4)
    base = jax.tree.map(
        lambda shape: jnp.asarray(draw.normal(size=shape) / shape[0 if len(shape) < 3 else 1] ** 0.5, jnp.float32),
        base_shapes(CONFIG),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    start = init_lora(jax.random.key(0), CONFIG, 2, ("q_proj", "v_proj"))
    lora = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), start)
    rows = TokenBatch(
        jnp.asarray(draw.integers(23, size=(3, 10)), jnp.int32),
        jnp.asarray(np.tile([4, 5, 8], (3, 1)), jnp.int32),
        jnp.asarray(draw.integers(23, size=(3, 3)), jnp.int32),
        jnp.ones((3, 3)),
    )
    loss = loss_of(Llama(CONFIG, 2.0), base)
    hessian = jax.jit(jax.hessian(lambda theta: loss(ravel_pytree(start)[1](theta), rows)))
    whole = [np.asarray(hessian(ravel_pytree(point)[0])) for point in (start, lora)]
    return loss, start, lora, rows, *whole


@jax.jit
def times(loss, lora, rows, v):
    return spectrum.hessian_product(loss, lora, rows)(v)


def test_product_equals_explicit_hessian_and_finite_differences(small):
    loss, _, lora, rows, _, whole = small
    flat, unravel = ravel_pytree(lora)
    np.testing.assert_allclose(whole, whole.T, atol=1e-5)
    v = jnp.asarray(np.random.default_rng(0).normal(size=flat.size), jnp.float32)
    product = times(loss, lora, rows, v)
    np.testing.assert_allclose(product, whole @ np.asarray(v), atol=1e-4 * np.abs(whole).max() * flat.size**0.5)
    gradient = jax.jit(lambda theta: ravel_pytree(jax.grad(loss)(unravel(theta), rows))[0])
    step = 1e-3
    difference = (gradient(flat + step * v) - gradient(flat - step * v)) / (2 * step)
    np.testing.assert_allclose(product, difference, atol=2e-3 * float(jnp.abs(product).max()))
    assert np.abs(product).max() > 0.01


def test_layer_masks_take_out_the_diagonal_blocks(small):
    loss, _, lora, rows, _, whole = small
    masks = jnp.stack([spectrum.layer_mask(lora, layer) for layer in range(3)])
    np.testing.assert_array_equal(masks.sum(axis=0), spectrum.layer_mask(lora, None))
    starts = jax.vmap(spectrum.random_signs, in_axes=(None, 0))(jax.random.key(1), masks)

    @jax.jit
    def blocks(masks, starts):
        product = spectrum.hessian_product(loss, lora, rows)
        one = lambda mask, start: spectrum.lanczos(lambda v: mask * product(mask * v), start, 20)  # noqa: E731
        return jax.vmap(one)(masks, starts)

    for mask, start, *run in zip(masks, starts, *blocks(masks, starts), strict=True):
        inside = np.flatnonzero(mask)
        block = whole[np.ix_(inside, inside)]
        found = spectrum.read(spectrum.Tridiagonal(*run), inside.size)
        assert found.norm == pytest.approx(np.abs(np.linalg.eigvalsh(block)).max(), rel=1e-3)
        assert found.trace == pytest.approx(inside.size * float(start[inside] @ block @ start[inside]), rel=1e-3)


def test_at_the_start_the_hessian_of_a_alone_is_zero(small):
    """B = 0 there: moving A alone changes nothing, so tr(H) is that of B's block."""
    loss, start, _, rows, at_start, later = small
    is_a = jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.full(leaf.shape, path[-1].key == "A"), start)
    is_a = np.asarray(ravel_pytree(is_a)[0])
    assert np.abs(at_start[np.ix_(is_a, is_a)]).max() < 1e-6 < 1e-3 < np.abs(later[np.ix_(is_a, is_a)]).max()
    assert np.abs(times(loss, start, rows, jnp.asarray(is_a, jnp.float32))[is_a]).max() < 1e-6
