"""One round of federated fine-tuning as a pure function: broadcast, local work under ``vmap``, reduce.

:func:`federated` returns a pair ``(init, round)`` in the manner of optax. ``round`` is meant to be jitted once with its
state donated; nothing in it depends on the round's number, so that it compiles once for a whole run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmezo_jax import server
from fedmezo_jax.client import LocalWork
from fedmezo_jax.mezo import Params

WORK, RATES, INIT = 0, 1, 2  # what the run's key is folded with: no two uses share a stream


class FederatedState(NamedTuple):
    """All that a run carries from one round to the next.

    Attributes:
        params: θ, the global parameters.
        optimizer: state of the server's optimizer.
        signals: what the server remembers of each of the N clients.
        round: int32 scalar, rounds done.
    """

    params: Params
    optimizer: optax.OptState
    signals: server.Signals
    round: jax.Array


class Cohort(NamedTuple):
    """The P clients of one round and what they work on.

    Attributes:
        ids: ``[P]`` int32, distinct client ids.
        weights: ``[P]`` float32, weights of the mean; scaled to sum to one within the round.
        batches: pytree with leading axes ``[P, H]``.
    """

    ids: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    batches: Any


class RoundReport(NamedTuple):
    """What a round tells of itself.

    Attributes:
        losses: ``[P, H]`` float32, training loss of each local step.
        coefficients: ``[P, H, n]`` float32, η_i·g/n (``[P, H, 0]`` for back-propagation).
        learning_rates: ``[P]`` float32, η_i.
    """

    losses: jax.Array
    coefficients: jax.Array
    learning_rates: jax.Array


class Federated(NamedTuple):
    """A pair of pure functions.

    Attributes:
        init: ``init(params, clients) -> FederatedState``.
        round: ``round(state, loss, cohort, key) -> (FederatedState, RoundReport)``; ``key`` is the run's, the same in
            every round.
    """

    init: Callable[[Params, int], FederatedState]
    round: Callable[[FederatedState, Any, Cohort, jax.Array], tuple[FederatedState, RoundReport]]


def client_key(key: jax.Array, round_index: jax.Array | int, client: jax.Array | int) -> jax.Array:
    """The key of one client's local work in one round; local step h then folds in h."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, WORK), round_index), client)


def federated(
    work: LocalWork,
    rates: server.RateConfig,
    optimizer: optax.GradientTransformation | None = None,
    block_size: int | None = None,
) -> Federated:
    """Federated training of any loss: FedMeZO with :func:`client.mezo_work`, FedAvg with :func:`client.backprop_work`.

    θ ← θ + Σ_i w_i·Δ_i with Δ_i = θ_i − θ the update of participant i, or the server optimizer's move on it.

    Args:
        work: the clients' local work.
        rates: learning rates of the clients.
        optimizer: the server's, fed with the pseudo-gradient −Σ_i w_i·Δ_i; None means plain averaging.
        block_size: how many clients run at once under ``vmap``; None means all. Memory grows with it. The
            updates are summed one client after another in either case, so the result is the same bit for bit wherever
            the loss is; a LLaMA's loss on a CPU may differ in its last place, where a product of more rows sums in
            another order.
    """
    optimizer = optimizer or optax.sgd(1.0)

    def init(params: Params, clients: int) -> FederatedState:
        params = jax.tree.map(jnp.array, params)  # a copy: donating the state must not take the caller's arrays away
        return FederatedState(params, optimizer.init(params), server.init_signals(clients), jnp.int32(0))

    def round(state: FederatedState, loss: Any, cohort: Cohort, key: jax.Array) -> tuple[FederatedState, RoundReport]:
        ids = jnp.asarray(cohort.ids)
        clients = ids.shape[0]
        rates_key = jax.random.fold_in(jax.random.fold_in(key, RATES), state.round)
        rate = server.learning_rates(rates, state.signals, rates_key)[ids]
        keys = jax.vmap(client_key, in_axes=(None, None, 0))(key, state.round, ids)
        weights = cohort.weights / jnp.sum(cohort.weights)
        keep_deltas = rates.strategy == "model-diff"

        def run_block(total, block):
            weights, batches, keys, rate = block
            done = jax.vmap(work, in_axes=(None, None, 0, 0, 0))(loss, state.params, batches, keys, rate)
            deltas = jax.tree.map(lambda new, old: new - old, done.params, state.params)
            total = jax.lax.scan(_add_weighted, total, (weights, deltas))[0]
            return total, (done.losses, done.coefficients, deltas if keep_deltas else None)

        blocks = _in_blocks((weights, cohort.batches, keys, rate), clients, block_size or clients)
        zero = jax.tree.map(jnp.zeros_like, state.params)
        mean_delta, outcome = jax.lax.scan(run_block, zero, blocks)
        losses, coefficients, deltas = jax.tree.map(lambda leaf: jax.lax.collapse(leaf, 0, 2)[:clients], outcome)

        params, optimizer_state = server.apply_mean_update(optimizer, state.params, mean_delta, state.optimizer)
        drift = server.client_drift(deltas) if keep_deltas else None
        signals = server.observe(state.signals, ids, jnp.mean(losses, axis=1), drift)
        state = FederatedState(params, optimizer_state, signals, state.round + 1)
        return state, RoundReport(losses, coefficients, rate)

    return Federated(init, round)


def _add_weighted(total: Params, weight_and_delta: tuple[jax.Array, Params]) -> tuple[Params, None]:
    weight, delta = weight_and_delta
    return jax.tree.map(lambda t, d: t + weight * d, total, delta), None


def _in_blocks(tree: Any, clients: int, block_size: int) -> Any:
    """Splits leading axes ``[P, …]`` into ``[blocks, size, …]``, the last block filled up with copies of zero weight.

    The first leaf must be the weights. Blocks are made as even as they can be, so that little is spent on the filling.
    """
    blocks = -(-clients // block_size)
    size = -(-clients // blocks)
    fill = blocks * size - clients
    weights, *rest = tree

    def split(leaf, filling):
        return jnp.concatenate([leaf, filling]).reshape(blocks, size, *leaf.shape[1:])

    if fill:
        weights = split(weights, jnp.zeros((fill,), weights.dtype))
        return (weights, *jax.tree.map(lambda leaf: split(leaf, jnp.repeat(leaf[:1], fill, axis=0)), tuple(rest)))
    return jax.tree.map(lambda leaf: leaf.reshape(blocks, size, *leaf.shape[1:]), tree)
