"""Steps that are private in each example: bound what one example measures, add noise (DP-ZO, arXiv 2401.04343).

The losses of a batch's examples are separate numbers, so that a projected gradient of each example costs no more than
that of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.core.estimators import Estimator
from fedmezo_jax.core.mezo import Estimate, Params


class NoisyBatch(NamedTuple):
    """A batch, and the noise of its step.

    Attributes:
        examples: pytree with a leading axis of B examples.
        noise: ``[n]`` float32, what is added to the sum of the examples' projected gradients.
    """

    examples: Any
    noise: jax.Array | np.ndarray


@dataclass(frozen=True)
class PerExample:
    """An estimator whose projected gradients are g = (Σ_b clip(g_b) + noise)/B over the examples b of a batch.

    g_b is what the inner estimator measures for example b alone, along directions that all examples share. Leaving an
    example out changes the sum by at most C in norm. Every example weighs the same, however many labels it has.

    Attributes:
        estimator: measures one example.
        norm: C, the L2 norm to which an example's ``[n]`` projected gradients are clipped.
    """

    estimator: Estimator
    norm: float

    def estimate(self, loss: Any, params: Params, batch: NoisyBatch, key: jax.Array) -> Estimate:
        """The noisy mean over the batch; the loss is the mean of the examples' losses, without noise."""

        def measure(example: Any) -> Estimate:
            alone = jax.tree.map(lambda leaf: leaf[None], example)
            measured = self.estimator.estimate(loss, params, alone, key)
            return measured._replace(projected_gradients=clip_norm(measured.projected_gradients, self.norm))

        each = jax.vmap(measure)(batch.examples)
        total = jnp.sum(each.projected_gradients, axis=0) + batch.noise
        return Estimate(total / len(each.loss), jnp.mean(each.loss))

    def apply(
        self, params: Params, key: jax.Array, coefficients: jax.Array, learning_rate: jax.Array | float
    ) -> Params:
        """The inner estimator's."""
        return self.estimator.apply(params, key, coefficients, learning_rate)


def clip_norm(vector: jax.Array, norm: float) -> jax.Array:
    """The vector shortened to this L2 norm if it is longer; zero if a number in it is not finite."""
    vector = jnp.where(jnp.all(jnp.isfinite(vector)), vector, 0)
    return vector * jnp.minimum(1, norm / jnp.maximum(jnp.linalg.norm(vector), jnp.finfo(jnp.float32).tiny))
