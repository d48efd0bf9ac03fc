"""The server's aggregation: who takes part in a round, and what the clients' updates become."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmezo_jax.core import mezo
from fedmezo_jax.core.mezo import Params


def mean_coefficients(weights: np.ndarray, learning_rates: np.ndarray, projected_gradients: np.ndarray) -> np.ndarray:
    """Σ_i w_i·c_i with c_i = η_i·g_i/n (:func:`mezo.coefficients`): how far shared directions move θ in a round.

    Summed on the host, client by client in float64, so that every machine gets the same. A client of weight 0 may have
    sent anything.

    Args:
        weights: ``[P]``, scaled here to sum to one.
        learning_rates: ``[P]`` float32, η_i.
        projected_gradients: ``[P, H, n]`` float32.

    Returns:
        ``[H, n]`` float32.
    """
    share = (np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64)).astype(np.float32)
    total = np.zeros(projected_gradients.shape[1:], np.float64)
    for weight, rate, gradients in zip(share, learning_rates, projected_gradients, strict=True):
        if weight:
            total += np.float64(weight) * mezo.coefficients(np.float32(rate), gradients)
    return total.astype(np.float32)


def client_drift(deltas: Params) -> jax.Array:
    """‖Δ_i − mean_j Δ_j‖ over all parameters, ``[P]`` float32, from a tree of ``[P, …]`` updates.

    The mean weighs clients alike, as in the paper (its reference sums the norms of the leaves instead of taking one
    norm).
    """

    def squared(leaf):
        centred = leaf - jnp.mean(leaf, axis=0)
        return jnp.sum(centred.reshape(centred.shape[0], -1) ** 2, axis=1)

    return jnp.sqrt(sum(map(squared, jax.tree.leaves(deltas)), start=jnp.zeros(())))


def apply_mean_update(
    optimizer: optax.GradientTransformation, params: Params, mean_delta: Params, state: optax.OptState
) -> tuple[Params, optax.OptState]:
    """Moves θ by the server's optimizer on the pseudo-gradient −Σ_i w_i·Δ_i (FedOpt, arXiv 2003.00295).

    ``optax.sgd(1.0)`` is plain averaging, θ + Σ_i w_i·Δ_i: FedAvg.
    """
    updates, state = optimizer.update(jax.tree.map(jnp.negative, mean_delta), state, params)
    return optax.apply_updates(params, updates), state


def sample_participants(seed: int, round_index: int, clients: int, count: int, attempt: int = 0) -> np.ndarray:
    """The ids of one round's clients, ``[count]`` int32, sorted and distinct: a function of its arguments alone.

    A further attempt at the round, after all of its clients failed, draws others.
    """
    if count == clients:
        return np.arange(clients, dtype=np.int32)
    stream = (0x5A, attempt) if attempt else (0x5A,)
    generator = np.random.default_rng(np.random.SeedSequence([seed, round_index], spawn_key=stream))
    return np.sort(generator.choice(clients, count, replace=False)).astype(np.int32)
