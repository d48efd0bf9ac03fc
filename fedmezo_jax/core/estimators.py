"""The seam for gradient estimators: what a zeroth-order step measures, and how θ moves by what was measured.

An estimator draws its directions from a key. So the key, the n scalars of a step and the learning rate say all that the
step did: the ledger, the messages and a replay hold for every estimator without knowing which it is.
``docs/extending.md`` adds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fedmezo_jax.core import mezo
from fedmezo_jax.core.mezo import Estimate, Params


class Estimator(Protocol):
    """A zeroth-order step in two halves. Both are pure and traced by JAX.

    An estimator has no state. One with state, such as a running scale of its directions, would take it as one more
    argument of both methods and return it from ``apply``, computed from keys and scalars alone; the two scans in
    :func:`client.estimator_client` would carry it, from its start in every round.
    """

    def estimate(self, loss: Any, params: Params, batch: Any, key: jax.Array) -> Estimate:
        """Measures the loss around θ.

        Args:
            loss: what this estimator asks of a model, e.g. a :data:`mezo.PairLoss` or a :data:`mezo.LossFn`.
            params: θ, pytree of float arrays.
            batch: whatever ``loss`` takes.
            key: the step's key, from which the directions are drawn.
        """
        ...

    def apply(
        self, params: Params, key: jax.Array, coefficients: jax.Array, learning_rate: jax.Array | float
    ) -> Params:
        """Moves θ along the directions of ``key``, without data and without a model.

        Args:
            params: θ before the step.
            key: the one that :meth:`estimate` was given.
            coefficients: ``[n]`` float32, :func:`mezo.coefficients` of a client's projected gradients, or a combination
                of several clients' where they share their directions.
            learning_rate: η, for what a step does besides, such as weight decay; 0 with shared directions.
        """
        ...


@dataclass(frozen=True)
class TwoPoint:
    """The paper's estimator, in :mod:`mezo`: the slope between θ + μz and θ − μz. Its loss is a :data:`mezo.PairLoss`.

    Attributes:
        config: μ, n, the distribution of z and λ.
    """

    config: mezo.MezoConfig

    def estimate(self, loss: Any, params: Params, batch: Any, key: jax.Array) -> Estimate:
        """See :func:`mezo.estimate`."""
        return mezo.estimate(loss, params, batch, key, self.config)

    def apply(
        self, params: Params, key: jax.Array, coefficients: jax.Array, learning_rate: jax.Array | float
    ) -> Params:
        """See :func:`mezo.apply_step`."""
        return mezo.apply_step(params, key, coefficients, learning_rate, self.config)


@dataclass(frozen=True)
class ForwardGradient:
    """Exact slopes g_k = ⟨∇L, z_k⟩ along n directions by forward-mode differentiation (arXiv 2202.08587, 2405.15551).

    The n tangents share one evaluation of the loss, so that a step costs about 1 + n forward passes, where
    :class:`TwoPoint` takes 2n. No μ is needed, nothing is stored for a backward pass, and rounding is relative to the
    tangent, which sixteen bits stand well. Its loss is a :data:`mezo.PointLoss`.

    Attributes:
        config: n, the distribution of z and λ; μ is not used.
    """

    config: mezo.MezoConfig

    def estimate(self, loss: Any, params: Params, batch: Any, key: jax.Array) -> Estimate:
        """The slopes at θ, all n at once."""

        def slope(k):
            def at(scale):
                direction = mezo.Perturbation(jax.random.fold_in(key, k), scale, self.config.distribution, tangent=True)
                return loss(params, batch, direction)

            return jax.jvp(at, (jnp.float32(0),), (jnp.float32(1),))

        # Without an axis: the loss at θ is computed once.
        value, slopes = jax.vmap(slope, out_axes=(None, 0))(jnp.arange(self.config.directions))
        return Estimate(slopes, value)

    def apply(
        self, params: Params, key: jax.Array, coefficients: jax.Array, learning_rate: jax.Array | float
    ) -> Params:
        """See :func:`mezo.apply_step`."""
        return mezo.apply_step(params, key, coefficients, learning_rate, self.config)


@dataclass(frozen=True)
class BackwardGradient:
    """The slopes of :class:`ForwardGradient`, g_k = ⟨∇L, z_k⟩, from one back-propagation however many directions.

    A step costs about two forward passes, since the base is frozen, and n inner products over θ. It stores the
    activations of the trained layers for its backward pass, which is little where these are few. What a client sends,
    and what a replay needs, are still the n slopes. Its loss is a :data:`mezo.LossFn`.

    Attributes:
        config: n, the distribution of z and λ; μ is not used.
    """

    config: mezo.MezoConfig

    def estimate(self, loss: Any, params: Params, batch: Any, key: jax.Array) -> Estimate:
        """The slopes at θ, one direction after the other."""
        value, gradient = jax.value_and_grad(loss)(params, batch)
        zeros = jax.tree.map(jnp.zeros_like, params)

        def slope(k):
            direction = mezo.Perturbation(jax.random.fold_in(key, k), 1.0, self.config.distribution)
            products = jax.tree.map(lambda g, z: jnp.sum(g * z), gradient, mezo.shift(zeros, direction))
            return sum(jax.tree.leaves(products), jnp.float32(0))

        return Estimate(jax.lax.map(slope, jnp.arange(self.config.directions)), value)

    def apply(
        self, params: Params, key: jax.Array, coefficients: jax.Array, learning_rate: jax.Array | float
    ) -> Params:
        """See :func:`mezo.apply_step`."""
        return mezo.apply_step(params, key, coefficients, learning_rate, self.config)
