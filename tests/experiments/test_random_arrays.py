"""Random arrays made in place: their distribution, and what they do not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._random_arrays import DEVIATION, random_like


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_floats_have_the_deviation_of_fresh_weights(dtype):
    leaf = np.asarray(random_like(jax.ShapeDtypeStruct((40, 50, 60), dtype)), np.float64)
    assert abs(leaf.mean()) < 5 * DEVIATION / leaf.size**0.5
    assert leaf.std() == pytest.approx(DEVIATION, rel=0.02)
    neighbours = np.corrcoef(leaf.ravel()[:-1], leaf.ravel()[1:])[0, 1]
    assert abs(neighbours) < 5 / leaf.size**0.5


def test_another_seed_gives_others_and_the_same_seed_the_same():
    leaf = jax.ShapeDtypeStruct((100,), jnp.float32)
    one, other, again = (np.asarray(random_like(leaf, seed)) for seed in (0, 1, 0))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, again)


def test_integers_are_zero_and_keys_are_keys():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="threefry2x32"), 3))
    tree = {"token": jax.ShapeDtypeStruct((2, 3), jnp.int32), "keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype)}
    made = random_like(tree)
    assert not made["token"].any()
    assert (made["keys"].dtype, made["keys"].shape) == (keys.dtype, keys.shape)
