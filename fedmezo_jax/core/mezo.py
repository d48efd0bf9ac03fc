"""The seeded zeroth-order step: perturb, evaluate, restore (MeZO, arXiv 2305.17333; FedMeZO, arXiv 2402.05926).

A direction z is never stored: it is a function of a key, a leaf's name and a row of that leaf, so that whoever holds
the key (a layer in the middle of a forward pass, the update, a replay years later) draws the same numbers. This module
knows pytrees and a loss, and no model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.core import threefry

Params: TypeAlias = Any
"""A pytree of floating-point arrays."""
Distribution: TypeAlias = Literal["gaussian", "rademacher"]


@partial(jax.tree_util.register_dataclass, data_fields=("key", "scale"), meta_fields=("distribution", "tangent"))
@dataclass(frozen=True)
class Perturbation:
    """The point θ + scale·z(key), described and not yet drawn.

    Attributes:
        key: the PRNG key of the direction z, scalar.
        scale: ±μ in an evaluation, −η·g in an update; float32 scalar.
        distribution: distribution of z's entries; both have mean 0 and variance 1.
        tangent: the point is θ itself, and ``scale``, which must be 0, is only there to be differentiated
            (``jax.jvp``). θ then does not depend on the key, so that many directions share one primal computation.
    """

    key: jax.Array
    scale: jax.Array | float
    distribution: Distribution = "gaussian"
    tangent: bool = False

    def __neg__(self) -> Perturbation:
        """The mirrored point θ − scale·z(key)."""
        return replace(self, scale=-self.scale)


LossFn: TypeAlias = Callable[[Params, Any], jax.Array]
"""``loss(params, batch) -> scalar``."""
PointLoss: TypeAlias = Callable[[Params, Any, Perturbation], jax.Array]
"""``point_loss(params, batch, perturbation) -> scalar``, the loss at θ + scale·z: what a tangent asks of a model."""
PairLoss: TypeAlias = Callable[[Params, Any, Perturbation], tuple[jax.Array, jax.Array]]
"""``pair_loss(params, batch, perturbation) -> (L₊, L₋)``, losses at θ ± scale·z: all that the step asks of a model."""


class MezoConfig(NamedTuple):
    """Hyper-parameters of the zeroth-order step.

    Attributes:
        perturbation_scale: μ > 0 in Eq. 3, the distance at which the loss is probed.
        directions: n ≥ 1, how many directions a step averages over (n-SPSA); 2n forward passes.
        distribution: law of the directions' entries.
        weight_decay: λ ≥ 0, decoupled: a step first shrinks θ by 1 − η·λ.
    """

    perturbation_scale: float = 1e-3
    directions: int = 1
    distribution: Distribution = "gaussian"
    weight_decay: float = 0.0


AT_ONCE = 1 << 22
"""Entries of a leaf up to which all its rows are moved at once, in half the time of a loop. A larger one is moved in
place, row after row: on GPUs a second copy of it would exist otherwise."""


class Estimate(NamedTuple):
    """What a local step measures.

    Attributes:
        projected_gradients: ``[n]`` float32, the slope of the loss along each direction.
        loss: scalar float32, mean of the losses evaluated.
    """

    projected_gradients: jax.Array
    loss: jax.Array


class Step(NamedTuple):
    """One local step's outcome: θ after it, and what it measured."""

    params: Params
    estimate: Estimate


def draw(key: jax.Array, shape: tuple[int, ...], distribution: Distribution) -> jax.Array:
    """Independent float32 entries of mean 0 and variance 1.

    Rademacher signs are taken straight from the generator's bits, so they are the same on every backend; Gaussian
    entries pass through an inverse error function, which backends round differently.
    """
    return (threefry.normal if distribution == "gaussian" else threefry.signs)(key, shape)


def shift(params: Params, perturbation: Perturbation) -> Params:
    """θ + scale·z(key) over a whole tree.

    Each row of a leaf's leading axis has a draw of its own, so that a model that stacks its layers there can draw each
    layer's share on its own (:func:`shift_row`). Of a large leaf no more than one row of z exists at once.

    Args:
        params: pytree of float arrays. The path of a leaf names its stream, so adding a leaf changes no other leaf's z.
        perturbation: key, scale and distribution of z.

    Returns:
        A new tree of the same structure, shapes and dtypes; ``params`` itself does not change.
    """

    def move(path, leaf):
        key = _leaf_key(perturbation.key, path)
        if leaf.ndim < 2:
            return _add(leaf, key, perturbation)

        def move_row(row, leaf):
            value = jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False)
            moved = _add(value, jax.random.fold_in(key, row), perturbation)
            return jax.lax.dynamic_update_index_in_dim(leaf, moved, row, 0)

        if leaf.size <= AT_ONCE:
            return jax.vmap(lambda row, value: _add(value, jax.random.fold_in(key, row), perturbation))(
                jnp.arange(leaf.shape[0]), leaf
            )
        # Row after row in place: a scan would hold a second tree for its results.
        return jax.lax.fori_loop(0, leaf.shape[0], move_row, leaf)

    return jax.tree_util.tree_map_with_path(move, params)


def shift_row(rows: Params, perturbation: Perturbation, row: jax.Array | int) -> Params:
    """Moves one row of every leaf: what a layer calls on its own slice of stacked parameters.

    Args:
        rows: the tree of :func:`shift` with the leading axis of each leaf taken at ``row``.
        perturbation: where to move to.
        row: index along that axis (the layer), int32.

    Returns:
        ``rows + scale·z``, with the very z that :func:`shift` adds at that row.
    """

    def move(path, value):
        return _add(value, jax.random.fold_in(_leaf_key(perturbation.key, path), row), perturbation)

    return jax.tree_util.tree_map_with_path(move, rows)


def _leaf_key(key: jax.Array, path: tuple[Any, ...]) -> jax.Array:
    """The key of the leaf at ``path``: from a checksum of its name, not from its place in the tree."""
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path, simple=True, separator="/").encode()))


def _add(value: jax.Array, key: jax.Array, perturbation: Perturbation) -> jax.Array:
    if perturbation.tangent:
        return _with_tangent(
            perturbation.distribution, value, jnp.float32(perturbation.scale), jax.random.key_data(key)
        )
    return value + (perturbation.scale * draw(key, value.shape, perturbation.distribution)).astype(value.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_tangent(distribution: Distribution, value: jax.Array, scale: jax.Array, key: jax.Array) -> jax.Array:
    """``value``, whose derivative with respect to ``scale`` is z. Under ``vmap`` over keys it has no batch axis."""
    del distribution, scale, key
    return value


@_with_tangent.defjvp
def _(distribution, primals, tangents):
    value, _, key = primals
    value_tangent, scale_tangent, _ = tangents
    z = draw(jax.random.wrap_key_data(key, impl="threefry2x32"), value.shape, distribution)
    return value, value_tangent + (scale_tangent * z).astype(value.dtype)


def point_loss_of(loss: LossFn) -> PointLoss:
    """Makes a :data:`PointLoss` of any plain loss by moving the whole tree."""
    return lambda params, batch, perturbation: loss(shift(params, perturbation), batch)


def pair_loss_of(loss: LossFn) -> PairLoss:
    """Makes a :data:`PairLoss` of any plain loss by moving the whole tree: the oracle of a model's own, leaner one.

    Both points are computed from the same θ. It is not perturbed in place: adding μz, −2μz and μz would leave rounding
    errors in it.
    """

    def pair_loss(params: Params, batch: Any, perturbation: Perturbation) -> tuple[jax.Array, jax.Array]:
        return loss(shift(params, perturbation), batch), loss(shift(params, -perturbation), batch)

    return pair_loss


def estimate(pair_loss: PairLoss, params: Params, batch: Any, key: jax.Array, config: MezoConfig) -> Estimate:
    """The projected gradients g_k = (L₊ − L₋)/2μ along n directions (Eq. 3, arXiv 2402.05926).

    Args:
        pair_loss: losses at θ ± μz.
        params: θ, pytree of float arrays.
        batch: whatever ``pair_loss`` takes.
        key: the step's key; direction k is drawn from ``fold_in(key, k)``.
        config: μ, n and the distribution of z.
    """

    def probe(k):
        perturbation = Perturbation(jax.random.fold_in(key, k), config.perturbation_scale, config.distribution)
        plus, minus = pair_loss(params, batch, perturbation)
        return (plus - minus) / (2 * config.perturbation_scale), (plus + minus) / 2

    # One after the other: two forward passes in flight would double the activations.
    gradients, losses = jax.lax.map(probe, jnp.arange(config.directions))
    return Estimate(gradients, jnp.mean(losses))


def coefficients(learning_rate: Any, projected_gradients: Any) -> Any:
    """c_k = η·g_k/n: a step moves θ by −Σ_k c_k·z_k.

    A client computes it in its compiled step, and the server on the host with NumPy. Both get the same bits: the two
    products are rounded one after the other, and XLA would make a division by n a product with 1/n anyway.

    Args:
        learning_rate: η, float32, of a shape that broadcasts to that of the gradients.
        projected_gradients: ``[…, n]`` float32.
    """
    return learning_rate * projected_gradients * np.float32(1 / projected_gradients.shape[-1])


def apply_step(
    params: Params, key: jax.Array, coefficients: jax.Array, learning_rate: jax.Array | float, config: MezoConfig
) -> Params:
    """θ ← (1 − ηλ)·θ − Σ_k c_k·z_k from the step's key and its ``[n]`` :func:`coefficients`: no data, no model."""
    if config.weight_decay:
        # Rounded before z is added: the client's program and a replay's might fuse different products with the sum.
        params = jax.lax.optimization_barrier(
            jax.tree.map(lambda leaf: leaf * (1 - learning_rate * config.weight_decay), params)
        )

    def move(moved, k_and_coefficient):
        k, coefficient = k_and_coefficient
        return shift(moved, Perturbation(jax.random.fold_in(key, k), -coefficient, config.distribution)), None

    return jax.lax.scan(move, params, (jnp.arange(config.directions), coefficients))[0]


def step(
    pair_loss: PairLoss,
    params: Params,
    batch: Any,
    key: jax.Array,
    learning_rate: jax.Array | float,
    config: MezoConfig,
) -> Step:
    """One FedMeZO step, θ ← (1 − ηλ)·θ − (η/n)·Σ_k g_k·z_k (Eq. 3 and 4, arXiv 2402.05926): estimate, then apply."""
    measured = estimate(pair_loss, params, batch, key, config)
    moves = coefficients(learning_rate, measured.projected_gradients)
    return Step(apply_step(params, key, moves, learning_rate, config), measured)
