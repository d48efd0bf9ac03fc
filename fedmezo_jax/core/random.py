"""Every random key of a run, and what each is for.

All keys come from the run's by ``fold_in``, first with one of the constants below: no two uses share a stream.
"""

from __future__ import annotations

import jax

WORK, RATES, INIT, SHARED, PROBE = range(5)
"""Local work with each client's own directions; learning rates; θ at the start; local work with shared directions; the
check of the learning rate before the first round."""
PRECISION, EFFECTIVE_RANK, CONSTANTS, DESCENT, ESTIMATORS, ESTIMATORS_START = range(5, 11)
"""Of the experiments."""
PARTICIPANTS = 0x5A
"""The clients of a round, which NumPy draws from the seed itself (:func:`aggregation.sample_participants`)."""


def run_key(seed: int) -> jax.Array:
    """The run's key. The generator is named: under ``vmap`` some of JAX's others differ from a loop."""
    return jax.random.key(seed, impl="threefry2x32")


def init_key(seed: int) -> jax.Array:
    """The key of θ at the start."""
    return jax.random.fold_in(run_key(seed), INIT)


def client_key(key: jax.Array, round_index: jax.Array | int, client: jax.Array | int) -> jax.Array:
    """The key of one client's local work in one round; local step h then folds in h."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, WORK), round_index), client)


def shared_key(key: jax.Array, round_index: jax.Array | int) -> jax.Array:
    """The key of all clients' local work in one round, where they share their directions."""
    return jax.random.fold_in(jax.random.fold_in(key, SHARED), round_index)
