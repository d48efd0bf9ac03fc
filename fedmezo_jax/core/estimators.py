"""The seam for gradient estimators: what a zeroth-order step measures, and how θ moves by what was measured.

An estimator draws its directions from a key. So the key, the n scalars of a step and the learning rate say all that the
step did: the ledger, the messages and a replay hold for every estimator without knowing which it is.
``docs/extending.md`` adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

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
class AlongDirections:
    """The second half of the estimators below: θ moves along the directions themselves.

    Attributes:
        config: μ, n, the distribution of z and λ.
    """

    config: mezo.MezoConfig

    def apply(
        self, params: Params, key: jax.Array, coefficients: jax.Array, learning_rate: jax.Array | float
    ) -> Params:
        """See :func:`mezo.apply_step`."""
        return mezo.apply_step(params, key, coefficients, learning_rate, self.config)


class TwoPoint(AlongDirections):
    """The paper's estimator, in :mod:`mezo`: the slope between θ + μz and θ − μz.

    Its loss is a :data:`mezo.PairLoss`.
    """

    def estimate(self, loss: Any, params: Params, batch: Any, key: jax.Array) -> Estimate:
        """See :func:`mezo.estimate`."""
        return mezo.estimate(loss, params, batch, key, self.config)


class ForwardGradient(AlongDirections):
    """Exact slopes g_k = ⟨∇L, z_k⟩ along n directions by forward-mode differentiation (arXiv 2202.08587, 2405.15551).

    The n tangents share one evaluation of the loss, so that a step costs about 1 + n forward passes, where
    :class:`TwoPoint` takes 2n. In the first trained layer it costs less, since tangents begin at the layer's adapters.
    Nothing is stored for a backward pass, and rounding is relative to the tangent, so that sixteen bits are enough.
    μ is not used. Its loss is a :data:`mezo.PointLoss`.
    """

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


class BackwardGradient(AlongDirections):
    """The slopes of :class:`ForwardGradient`, g_k = ⟨∇L, z_k⟩, from one back-propagation however many directions.

    A step costs about two forward passes, since the base is frozen, and n inner products over θ. It stores the
    activations of the trained layers for its backward pass, which is little where these are few. What a client sends,
    and what a replay needs, are still the n slopes. μ is not used. Its loss is a :data:`mezo.LossFn`.
    """

    def estimate(self, loss: Any, params: Params, batch: Any, key: jax.Array) -> Estimate:
        """The slopes at θ, one direction after the other."""
        value, gradient = jax.value_and_grad(loss)(params, batch)
        zeros = jax.tree.map(jnp.zeros_like, params)

        def slope(k):
            direction = mezo.Perturbation(jax.random.fold_in(key, k), 1.0, self.config.distribution)
            products = jax.tree.map(lambda g, z: jnp.sum(g * z), gradient, mezo.shift(zeros, direction))
            return sum(jax.tree.leaves(products), jnp.float32(0))

        return Estimate(jax.lax.map(slope, jnp.arange(self.config.directions)), value)


EstimatorName: TypeAlias = Literal["two-point", "forward-gradient", "backward-gradient"]


class Named(NamedTuple):
    """An estimator that the command line names, and what a run has to know of it.

    Attributes:
        make: returns the estimator.
        loss: the loss of a :class:`task.Task` that it takes.
        passes: forward passes of a step along n directions; a tangent and a backward pass count as one each.
        head_products: products with the head in these.
    """

    make: Callable[[mezo.MezoConfig], Estimator]
    loss: Literal["pair_loss", "point_loss", "loss"]
    passes: Callable[[int], int]
    head_products: Callable[[int], int]


ESTIMATORS: Mapping[EstimatorName, Named] = MappingProxyType(
    {
        "two-point": Named(TwoPoint, "pair_loss", lambda n: 2 * n, lambda n: 2 * n),
        "forward-gradient": Named(ForwardGradient, "point_loss", lambda n: 1 + n, lambda n: 2),
        "backward-gradient": Named(BackwardGradient, "loss", lambda n: 2, lambda n: 2),
    }
)
