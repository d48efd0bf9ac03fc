"""Likelihood of responses under a model: the loss of each example, and the mean loss."""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from fedmezo_jax.data.buckets import lengths, narrow, widths
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama.checks import check_finite
from fedmezo_jax.llama.loss import loss_sums
from fedmezo_jax.llama.model import Base, Llama, Lora

TOKENS_AT_ONCE = 8192
BUCKETS = 4
_LARGEST = math.log(sys.float_info.max)


class Loss(NamedTuple):
    """Test loss.

    Attributes:
        loss: mean negative log-likelihood of the label tokens, in nats.
        perplexity: exp(loss), or infinity if that overflows.
        labels: number of label tokens.
    """

    loss: float
    perplexity: float
    labels: int


def row_losses(model: Llama, base: Base, lora: Lora, rows: TokenBatch, name: str = "the model") -> np.ndarray:
    """Returns the summed negative log-likelihood of each example's labels, in nats: float64 [N].

    Examples of similar length share a batch, which has the width of their length bucket.

    Args:
        model: the decoder, at any precision but ``paired``.
        base: its frozen weights.
        lora: the adapter, ``{}`` for none.
        rows: N examples, host arrays.
        name: what error messages call the model.

    Raises:
        UserError: a loss is not finite.
    """
    bucket_widths = widths(rows, BUCKETS)
    bucket_of = np.searchsorted([width.tokens for width in bucket_widths], lengths(rows))
    losses = np.empty(len(bucket_of), np.float64)

    for i, width in enumerate(bucket_widths):
        bucket_rows = np.flatnonzero(bucket_of == i)
        batch_size = min(len(bucket_rows), max(1, TOKENS_AT_ONCE // width.tokens))
        for start in range(0, len(bucket_rows), max(batch_size, 1)):
            picked = np.resize(
                bucket_rows[start : start + batch_size], batch_size
            )  # the last batch repeats examples to get the same shape
            batch = narrow(TokenBatch(*(np.asarray(leaf)[picked] for leaf in rows)), width)
            losses[picked] = np.asarray(_batch_losses(model, base, lora, batch), np.float64)
    check_finite(bool(np.isfinite(losses).all()), "losses", model.config, base, lora, name)
    return losses


@partial(jax.jit, static_argnums=0)
def _batch_losses(model: Llama, base: Base, lora: Lora, batch: TokenBatch) -> jax.Array:
    def row_loss(row):
        return loss_sums(model, base, lora, jax.tree.map(lambda leaf: leaf[None], row))[0]

    return jax.vmap(row_loss)(batch)


def mean_loss(model: Llama, base: Base, lora: Lora, rows: TokenBatch, name: str = "the model") -> Loss:
    """Returns the mean over all labels of all examples, as in training; arguments and errors as :func:`row_losses`."""
    labels = int(np.asarray(rows.label_weights).sum())
    loss = float(row_losses(model, base, lora, rows, name).sum() / labels)
    return Loss(loss, math.exp(loss) if loss < _LARGEST else math.inf, labels)
