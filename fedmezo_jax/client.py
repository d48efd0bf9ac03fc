"""A client's local work: H steps from the global parameters, zeroth-order or back-propagated.

Both kinds have one signature, ``work(loss, params, batches, key, learning_rate) -> LocalResult``, so that a round does
not know which it runs. ``loss`` is a ``jax.tree_util.Partial`` where it holds frozen weights: these are then arguments
of the compiled round and not constants in it, and one copy serves all clients under ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fedmezo_jax import mezo
from fedmezo_jax.mezo import Params


class LocalResult(NamedTuple):
    """What a client hands back after its H local steps.

    Attributes:
        params: its θ, the tree it was given, moved.
        coefficients: ``[H, n]`` float32, η_i·g/n of each step and direction (``[H, 0]`` from back-propagation). With
            the round's key they say all that ``params`` says.
        losses: ``[H]`` float32, the training loss that each step saw.
    """

    params: Params
    coefficients: jax.Array
    losses: jax.Array


LocalWork: TypeAlias = Callable[[Any, Params, Any, jax.Array, jax.Array], LocalResult]


def mezo_work(config: mezo.MezoConfig) -> LocalWork:
    """Local work by FedMeZO's zeroth-order steps (Sec. 2.2, arXiv 2402.05926); ``loss`` is a :data:`mezo.PairLoss`.

    Step h draws from ``fold_in(key, h)``. ``batches`` has a leading axis of length H.
    """

    def work(loss, params, batches, key, learning_rate) -> LocalResult:
        def one(params, h_and_batch):
            h, batch = h_and_batch
            done = mezo.step(loss, params, batch, jax.random.fold_in(key, h), learning_rate, config)
            return done.params, (done.coefficients, done.loss)

        steps = jnp.arange(jax.tree.leaves(batches)[0].shape[0])
        params, (coefficients, losses) = jax.lax.scan(one, params, (steps, batches))
        return LocalResult(params, coefficients, losses)

    return work


def backprop_work(optimizer: Callable[[Any], optax.GradientTransformation]) -> LocalWork:
    """Local work by back-propagation, the FedAvg baseline (arXiv 1602.05629); ``loss`` is a :data:`mezo.LossFn`.

    Args:
        optimizer: makes an optax transformation of a learning rate, e.g. ``optax.sgd``. Its state starts afresh each
            round.
    """

    def work(loss, params, batches, key, learning_rate) -> LocalResult:
        del key
        transform = optimizer(learning_rate)

        def one(carry, batch):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = transform.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(one, (params, transform.init(params)), batches)
        return LocalResult(params, jnp.zeros((losses.shape[0], 0), jnp.float32), losses)

    return work
