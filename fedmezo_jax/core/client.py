"""A client's local work: H steps from the global parameters, zeroth-order or back-propagated.

Both kinds are called alike, ``work(loss, params, batches, key, learning_rate) -> LocalResult``, so that a round does
not know which it runs. ``loss`` is a ``jax.tree_util.Partial`` where it holds frozen weights: these are then arguments
of the compiled round and not constants in it, and one copy serves all clients under ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmezo_jax.core import mezo
from fedmezo_jax.core.estimators import Estimator, TwoPoint
from fedmezo_jax.core.mezo import Params
from fedmezo_jax.core.transforms import Transform


class LocalResult(NamedTuple):
    """What a client has after its H local steps.

    Attributes:
        params: its θ, the tree it was given, moved.
        projected_gradients: ``[H, n]`` float32, g of each step and direction (``[H, 0]`` from back-propagation). With
            the client's key and learning rate they determine ``params``.
        losses: ``[H]`` float32, the training loss that each step saw.
    """

    params: Params
    projected_gradients: jax.Array
    losses: jax.Array


@dataclass(frozen=True)
class LocalWork:
    """A way to train locally.

    Attributes:
        run: ``run(loss, params, batches, key, learning_rate[, transform]) -> LocalResult``; ``transform`` changes the
            projected gradients of zeroth-order steps.
        reconstruct: ``reconstruct(params, key, coefficients, learning_rate) -> params``, the client's θ without its
            data and without a model, from the ``[H, n]`` :func:`mezo.coefficients` of its steps; None where that takes
            more than scalars.
    """

    run: Callable[..., LocalResult]
    reconstruct: Callable[[Params, jax.Array, jax.Array, jax.Array], Params] | None

    def __call__(self, loss: Any, params: Params, batches: Any, key: jax.Array, learning_rate: Any, *transform: Any):
        """One client's local work."""
        return self.run(loss, params, batches, key, learning_rate, *transform)


def mezo_client(config: mezo.MezoConfig) -> LocalWork:
    """Local work by FedMeZO's zeroth-order steps (Sec. 2.2, arXiv 2402.05926); ``loss`` is a :data:`mezo.PairLoss`."""
    return estimator_client(TwoPoint(config))


def estimator_client(estimator: Estimator) -> LocalWork:
    """Local work by an estimator's steps: estimate, transform, apply.

    Step h draws from ``fold_in(key, h)``. ``batches`` has a leading axis of length H.
    """

    def run(loss, params, batches, key, learning_rate, transform: Transform | None = None) -> LocalResult:
        def one(params, h_and_batch):
            h, batch = h_and_batch
            step_key = jax.random.fold_in(key, h)
            gradients, value = estimator.estimate(loss, params, batch, step_key)
            gradients = gradients if transform is None else transform(gradients)
            coefficients = mezo.coefficients(learning_rate, gradients)
            return estimator.apply(params, step_key, coefficients, learning_rate), (gradients, value)

        steps = jnp.arange(jax.tree.leaves(batches)[0].shape[0])
        params, (gradients, losses) = jax.lax.scan(one, params, (steps, batches))
        return LocalResult(params, gradients, losses)

    def reconstruct(params, key, coefficients, learning_rate) -> Params:
        def one(params, h_and_coefficients):
            h, coefficients = h_and_coefficients
            return estimator.apply(params, jax.random.fold_in(key, h), coefficients, learning_rate), None

        return jax.lax.scan(one, params, (jnp.arange(coefficients.shape[0]), coefficients))[0]

    return LocalWork(run, reconstruct)


def sgd_client(optimizer: Callable[[Any], optax.GradientTransformation]) -> LocalWork:
    """Local work by back-propagation, the FedAvg baseline (arXiv 1602.05629); ``loss`` is a :data:`mezo.LossFn`.

    Args:
        optimizer: makes an optax transformation of a learning rate, e.g. ``optax.sgd``. Its state starts afresh each
            round.
    """

    def run(loss, params, batches, key, learning_rate) -> LocalResult:
        del key
        transform = optimizer(learning_rate)

        def one(carry, batch):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = transform.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(one, (params, transform.init(params)), batches)
        return LocalResult(params, jnp.zeros((losses.shape[0], 0), jnp.float32), losses)

    return LocalWork(run, None)
