"""JAX's own generator is the oracle: same key, same bits."""

import jax
import numpy as np
import pytest

from fedmezo_jax.core import threefry

KEY = jax.random.key(7, impl="threefry2x32")
SHAPES = [(), (1,), (5,), (3, 7), (576, 8), (2, 3, 4, 5), (0, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_jax_s(shape):
    np.testing.assert_array_equal(threefry.bits(KEY, shape), jax.random.bits(KEY, shape))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_jax_s(shape, compiled):
    """But for the last place of erf⁻¹, which XLA rounds by how a loop comes to be vectorised."""
    ours, theirs = (
        jax.jit(draw, static_argnums=1) if compiled else draw for draw in (threefry.normal, jax.random.normal)
    )
    found, expected = (np.asarray(draw(KEY, shape)) for draw in (ours, theirs))
    assert found.dtype == np.float32
    np.testing.assert_array_max_ulp(found, expected, maxulp=2)


def test_keys_side_by_side_draw_as_each_alone():
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, np.arange(6))
    together = jax.vmap(lambda key: threefry.normal(key, (4, 5)))(keys)
    for key, found in zip(keys, together, strict=True):
        np.testing.assert_array_max_ulp(np.asarray(found), np.asarray(jax.random.normal(key, (4, 5))), maxulp=2)


def test_signs_are_fair_and_independent_of_one_another():
    drawn = np.asarray(threefry.signs(KEY, (200, 500)))
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    assert abs(drawn.mean()) < 5 / np.sqrt(drawn.size)
    assert abs((drawn[:, 1:] * drawn[:, :-1]).mean()) < 5 / np.sqrt(drawn.size)
