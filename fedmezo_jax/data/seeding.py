"""Independent random streams from one seed, each named by its purpose."""

import numpy as np

from fedmezo_jax.errors import UserError


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """The generator of one purpose, so that a draw for one purpose never moves the draws of another.

    Raises:
        UserError: the seed is negative.
    """
    if seed < 0:
        raise UserError(f"the seed must be 0 or larger, not {seed}")
    return np.random.default_rng(np.random.SeedSequence([seed, int.from_bytes(purpose.encode(), "little"), *numbers]))
