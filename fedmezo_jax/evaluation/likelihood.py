"""How likely a model finds given responses: the loss of each row, and their mean."""

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
        perplexity: exp(loss), infinite where that overflows.
        labels: number of label tokens.
    """

    loss: float
    perplexity: float
    labels: int


def row_losses(model: Llama, base: Base, lora: Lora, rows: TokenBatch, name: str = "the model") -> np.ndarray:
    """Negative log-likelihood of each row's labels together, in nats: float64 [N].

    Rows go through the model in batches of like length, each at the width of its longest bucket.

    Args:
        model: the decoder, at any precision but ``paired``.
        base: its frozen weights.
        lora: the adapter, ``{}`` for none.
        rows: [N], host arrays.
        name: what error messages call the model.

    Raises:
        UserError: a loss is not finite.
    """
    among = widths(rows, BUCKETS)
    bucket = np.searchsorted([width.tokens for width in among], lengths(rows))
    result = np.empty(len(bucket), np.float64)

    for i, width in enumerate(among):
        inside = np.flatnonzero(bucket == i)
        size = min(len(inside), max(1, TOKENS_AT_ONCE // width.tokens))
        for at in range(0, len(inside), max(size, 1)):
            picked = np.resize(inside[at : at + size], size)  # the last batch repeats rows, so that all have one shape
            batch = narrow(TokenBatch(*(np.asarray(leaf)[picked] for leaf in rows)), width)
            result[picked] = np.asarray(_batch_losses(model, base, lora, batch), np.float64)
    check_finite(bool(np.isfinite(result).all()), "losses", model.config, base, lora, name)
    return result


@partial(jax.jit, static_argnums=0)
def _batch_losses(model: Llama, base: Base, lora: Lora, batch: TokenBatch) -> jax.Array:
    def one(row):
        return loss_sums(model, base, lora, jax.tree.map(lambda leaf: leaf[None], row))[0]

    return jax.vmap(one)(batch)


def mean_loss(model: Llama, base: Base, lora: Lora, rows: TokenBatch, name: str = "the model") -> Loss:
    """Mean over all labels of all rows, as in training; arguments and errors as :func:`row_losses`."""
    labels = int(np.asarray(rows.label_weights).sum())
    loss = float(row_losses(model, base, lora, rows, name).sum() / labels)
    return Loss(loss, math.exp(loss) if loss < _LARGEST else math.inf, labels)
