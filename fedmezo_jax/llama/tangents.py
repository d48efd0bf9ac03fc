"""A layer's tangents one after the other, in little more memory than one of them takes.

Under ``vmap`` over directions all tangents of a layer would exist at once, as wide as its MLP. Here the layer is
linearised at θ: what its derivative needs is kept while the layer is at work, and a loop applies the derivative to one
tangent after the other. Between layers only the tangents of the residual stream are held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from fedmezo_jax.core.mezo import Params, Perturbation, shift_row

LEAST_ROWS = 512
"""Rows of a client's products, B·S, from which on a layer's tangents are computed one after the other. With fewer, all
at once take little memory, and their products are larger."""


def one_by_one(
    layer: Callable[[Any, Params, Any], jax.Array],
) -> Callable[[Any, Params, Any, Perturbation, jax.Array], jax.Array]:
    """Gives a layer a derivative that a ``vmap`` over directions computes in a loop.

    Args:
        layer: ``layer(x, lora, frozen)``, with x ``[B, S, D]`` or another pytree that has tangents, the layer's LoRA
            parameters, and a pytree that is not differentiated.

    Returns:
        ``moved(x, lora, frozen, perturbation, row)``: the layer at ``lora``, with the tangent along
        :func:`mezo.shift_row`. The perturbation must be a tangent. The ``vmap`` next to the differentiation is the one
        that becomes a loop; those around it, such as that over clients, stay.
    """

    @jax.custom_jvp
    def moved(x, lora, frozen, perturbation, row):
        del perturbation, row
        return layer(x, lora, frozen)

    @moved.defjvp
    def _(primals, tangents):
        x, lora, frozen, perturbation, row = primals
        # Of the activations the results of the products are kept; the rest, and slices of weights, are made anew.
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        at_theta = jax.checkpoint(lambda x, lora: layer(x, lora, frozen), policy=policy)
        y, derivative = jax.linearize(at_theta, x, lora)
        x_tangent, lora_tangent, _, moving, _ = tangents
        return y, along(derivative, x_tangent, lora, lora_tangent, perturbation, moving.scale, row)

    def tangent(derivative, x_tangent, lora, lora_tangent, perturbation, scale_tangent, row):
        def at(lora, scale):
            return shift_row(lora, replace(perturbation, scale=scale), row)

        _, direction = jax.jvp(at, (lora, perturbation.scale), (lora_tangent, scale_tangent))
        return derivative(x_tangent, direction)

    along = jax.custom_batching.custom_vmap(tangent)

    @along.def_vmap
    def _(axis_size, batched, *arguments):
        del axis_size
        leaves, tree = jax.tree.flatten(arguments)
        is_batched = jax.tree.leaves(batched)
        shared = [leaf for leaf, each in zip(leaves, is_batched, strict=True) if not each]

        def next_tangent(own):
            # Otherwise the compiler would take slices and conversions of weights out of the loop, and hold them all.
            rest, own = map(iter, jax.lax.optimization_barrier((shared, own)))
            return tangent(*jax.tree.unflatten(tree, [next(own if each else rest) for each in is_batched]))

        own = [leaf for leaf, each in zip(leaves, is_batched, strict=True) if each]
        return jax.lax.map(next_tangent, own), True

    return moved
