"""Likelihood of responses under a model: the loss of each example, and the mean loss."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import jax
import numpy as np
from rich.progress import track

from fedmezo_jax.data.buckets import lengths, narrow, widths
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama.checks import check_finite
from fedmezo_jax.llama.loss import label_scores as scores_of_batch
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


class LabelScores(NamedTuple):
    """What the model says of the labels of N examples.

    Attributes:
        losses: float64 [N, M], negative log-likelihood of each label in nats; 0 for padding.
        is_best: bool [N, M], whether the label is the most likely token there; True for padding.
    """

    losses: np.ndarray
    is_best: np.ndarray


def label_scores(
    model: Llama, base: Base, lora: Lora, rows: TokenBatch, name: str = "the model", progress: str | None = None
) -> LabelScores:
    """Returns the loss of every label, and whether it is the likeliest token.

    Examples of similar length share a batch, which has the width of their length bucket.

    Args:
        model: the decoder, at any precision but ``paired``.
        base: its frozen weights.
        lora: the adapter, ``{}`` for none.
        rows: N examples, host arrays. The token after the last label's position may be missing.
        name: what error messages call the model.
        progress: text before a progress bar; None for no bar.

    Raises:
        UserError: a loss is not finite.
    """
    bucket_widths = widths(rows, BUCKETS)
    bucket_of = np.searchsorted([width.tokens for width in bucket_widths[:-1]], lengths(rows))
    shape = np.shape(rows.labels)
    scores = LabelScores(np.zeros(shape, np.float64), np.ones(shape, bool))

    batches = []
    for i, width in enumerate(bucket_widths):
        bucket_rows = np.flatnonzero(bucket_of == i)
        batch_size = min(len(bucket_rows), max(1, TOKENS_AT_ONCE // width.tokens))
        for start in range(0, len(bucket_rows), max(batch_size, 1)):
            # the last batch repeats examples to get the same shape
            batches.append((np.resize(bucket_rows[start : start + batch_size], batch_size), width))
    for picked, width in track(batches, progress or "", disable=progress is None, transient=True):
        batch = narrow(TokenBatch(*(np.asarray(leaf)[picked] for leaf in rows)), width)
        losses, is_best = jax.device_get(_batch_scores(model, base, lora, batch))
        is_label = batch.label_weights > 0
        scores.losses[picked, : width.labels] = np.where(is_label, losses * np.float64(batch.label_weights), 0)
        scores.is_best[picked, : width.labels] = is_best | ~is_label
    check_finite(bool(np.isfinite(scores.losses).all()), "losses", model.config, base, lora, name)
    return scores


def row_losses(model: Llama, base: Base, lora: Lora, rows: TokenBatch, name: str = "the model") -> np.ndarray:
    """Returns the summed negative log-likelihood of each example's labels, in nats: float64 [N].

    Arguments and errors are those of :func:`label_scores`.
    """
    return label_scores(model, base, lora, rows, name).losses.sum(axis=-1)


_batch_scores = jax.jit(scores_of_batch, static_argnums=0)


def mean_loss(model: Llama, base: Base, lora: Lora, rows: TokenBatch, name: str = "the model") -> Loss:
    """Returns the mean over all labels of all examples, as in training; arguments and errors as :func:`row_losses`."""
    labels = int(np.asarray(rows.label_weights).sum())
    loss = float(row_losses(model, base, lora, rows, name).sum() / labels)
    return Loss(loss, math.exp(loss) if loss < _LARGEST else math.inf, labels)
