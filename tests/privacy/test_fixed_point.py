"""Numbers as integers: their sum is exact, in any order, and within bounds."""

import numpy as np

from fedmezo_jax.privacy import fixed_point

DRAW = np.random.default_rng(0)


def test_numbers_add_up_whatever_their_signs_and_their_order():
    numbers = DRAW.normal(0, 5, (10, 7))
    numbers[0, 0] = np.nan
    total = fixed_point.total(list(numbers), 10)
    np.testing.assert_allclose(total, np.nansum(numbers, axis=0), rtol=0, atol=10 * 2.0**-25)
    np.testing.assert_array_equal(fixed_point.total(list(numbers[::-1]), 10), total)


def test_numbers_that_are_too_large_are_bounded_so_that_the_sum_has_the_right_sign():
    huge = np.array([1e300, -1e300])
    total = fixed_point.total([huge] * 6, 6)
    np.testing.assert_array_equal(total, 6 * fixed_point.bound(6) * np.array([1, -1]))
    assert fixed_point.bound(1000) > 1e6
