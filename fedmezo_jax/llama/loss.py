"""The instruction-tuning loss of a LLaMA, at θ and at a pair θ ± μz.

The vocabulary's head is by far the widest product, so it runs only where a label is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from fedmezo_jax.core import mezo
from fedmezo_jax.core.equal_partial import EqualPartial
from fedmezo_jax.data.examples import HiddenBatch, Rows
from fedmezo_jax.data.packing import PackedBatch
from fedmezo_jax.llama.model import Base, Llama, Lora
from fedmezo_jax.llama.precision import PAIR


def loss_of(model: Llama, base: Base) -> mezo.LossFn:
    """``loss(lora, rows)``: mean cross-entropy over the label tokens of ``rows``, in nats.

    The result is a ``Partial`` with ``base`` as its leaves: pass it to a jitted function as an argument.
    """
    return Partial(EqualPartial(_mean_loss, (model,)), base)


def point_loss_of(model: Llama, base: Base) -> mezo.PointLoss:
    """``point_loss(lora, rows, perturbation)``: the loss at θ + scale·z with z drawn layer by layer."""
    return Partial(EqualPartial(_mean_loss, (model,)), base)


def pair_loss_of(model: Llama, base: Base) -> mezo.PairLoss:
    """``pair_loss(lora, rows, perturbation)``: the losses at θ ± scale·z with z drawn layer by layer.

    Equals ``mezo.pair_loss_of(loss_of(model, base))`` up to rounding, without ever holding a moved copy of θ.
    """
    return Partial(EqualPartial(_pair_loss, (model,)), base)


def loss_sums(
    model: Llama,
    base: Base,
    lora: Lora,
    rows: Rows | PackedBatch,
    perturbation: mezo.Perturbation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood of the labels in nats, and the number of labels, float32 scalars.

    Args:
        model: the decoder.
        base: its frozen weights.
        lora: θ.
        rows: B examples, leaves ``[B, S]`` and ``[B, M]``, or packed ones; with hidden states for tokens,
            ``[B, S, D]``, the layers below the first trained one are not run.
        perturbation: if given, the loss is taken at θ + scale·z.
    """
    losses = _at_labels("label_losses", model, base, lora, rows, perturbation)
    return jnp.sum(losses * rows.label_weights.reshape(-1)), jnp.sum(rows.label_weights)


def label_scores(model: Llama, base: Base, lora: Lora, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of every label in nats, float32 [B, M], and whether it is the most likely token, bool [B, M].

    Arguments are as in :func:`loss_sums`; what stands at padding has no meaning.
    """
    losses, is_best = _at_labels("label_scores", model, base, lora, rows)
    return losses.reshape(rows.labels.shape), is_best.reshape(rows.labels.shape)


def _at_labels(method: str, model: Llama, base: Base, lora: Lora, rows: Rows | PackedBatch, perturbation=None) -> Any:
    """A method of the model's head, at the hidden states and labels of all examples: [B·M, D] and [B·M]."""
    variables = {"params": base}
    if isinstance(rows, PackedBatch):
        entry = "suffix" if jnp.issubdtype(rows.inputs.dtype, jnp.floating) else "hidden"
        inputs = rows.inputs.astype(jnp.float32) if entry == "suffix" else rows.inputs
        hidden = model.apply(variables, inputs, lora, perturbation, rows.layout, method=entry)
        return model.apply(variables, cast(jax.Array, hidden)[0, rows.label_positions], rows.labels, method=method)
    if isinstance(rows, HiddenBatch):
        below = rows.hidden.astype(jnp.float32)
        hidden = cast(jax.Array, model.apply(variables, below, lora, perturbation, method="suffix"))
    else:
        hidden = cast(jax.Array, model.apply(variables, rows.tokens, lora, perturbation, method="hidden"))
    at_labels = jnp.take_along_axis(hidden, rows.label_positions[..., None], axis=1)
    flat = at_labels.reshape(-1, hidden.shape[-1])
    return model.apply(variables, flat, rows.labels.reshape(-1), method=method)


def _mean_loss(model: Llama, base: Base, lora: Lora, rows: Rows | PackedBatch, perturbation=None) -> jax.Array:
    total, count = loss_sums(model, base, lora, rows, perturbation)
    return total / jnp.maximum(count, 1)


def _pair_loss(model: Llama, base: Base, lora: Lora, rows: Rows | PackedBatch, perturbation: mezo.Perturbation):
    def at(sign):
        return _mean_loss(model, base, lora, rows, replace(perturbation, scale=sign * perturbation.scale))

    if model.precision != "paired":
        return at(1.0), at(-1.0)
    plus, minus = jax.vmap(at, axis_name=PAIR)(jnp.array([1.0, -1.0]))
    return plus, minus
