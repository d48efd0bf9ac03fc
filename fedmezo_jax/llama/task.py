"""A LLaMA with LoRA on token rows, as a :class:`~fedmezo_jax.core.task.Task`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedmezo_jax.core import mezo
from fedmezo_jax.core.blocks import block_width
from fedmezo_jax.core.task import Task
from fedmezo_jax.data.batches import TOKENS_AT_ONCE
from fedmezo_jax.data.buckets import Widths, bucketed_loss, bucketed_point_loss, computed_tokens
from fedmezo_jax.data.examples import HiddenBatch, Rows, TokenBatch
from fedmezo_jax.llama.checkpoints.adapter import save_adapter
from fedmezo_jax.llama.checkpoints.stored_base import StoredBase
from fedmezo_jax.llama.checks import check_finite
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.loss import loss_of, loss_sums, pair_loss_of, point_loss_of
from fedmezo_jax.llama.model import Base, Llama
from fedmezo_jax.llama.precision import least_clients, least_rows
from fedmezo_jax.llama.prefix import HiddenStates, Prefix


def unpaired(model: Llama) -> Llama:
    """The model for losses at one θ: ``paired`` needs two."""
    return model.clone(precision="bfloat16") if model.precision == "paired" else model


@dataclass(frozen=True, eq=False)
class LlamaTask(Task):
    """Instruction tuning of a LLaMA's LoRA.

    Attributes:
        model: the decoder, with the run's α/r and precision.
        base: its frozen weights, on the device: all, or those from the first trained layer on
            (``StoredBase.load_from``), which need hidden states for tokens.
        base_hash: names all weights.
        name: the model's, as the user gave it.
        rank: r.
        alpha: α.
        targets: the projections with an adapter.
        train: training rows; where layers below the first trained one are frozen, from their hidden states on.
        validation: rows for the validation loss; none where it is not needed.
        test: test rows.
        parts: for each client the indices of its rows in ``train``.
        widths: at which steps run.
        batch_size: rows of a step.
        packed: whether a step's rows are packed into one.
        group_size: clients of a round that one group of devices works on.
        place: puts the test rows on the devices.
    """

    model: Llama
    base: Base
    base_hash: str
    name: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    train: Rows
    validation: Rows
    test: Rows
    parts: list[np.ndarray]
    widths: Widths
    batch_size: int
    packed: bool
    group_size: int
    place: Callable[[Any], Any] = jax.device_put

    def from_hidden_states(
        self,
        stored: StoredBase,
        folder: Path,
        used: np.ndarray,
        dtype: str = "float32",
        notify: Callable[[str], None] = lambda line: None,
    ) -> LlamaTask:
        """The same task from the hidden states below the first trained layer on.

        Args:
            stored: the model's files, from which the layers below are read a few at a time.
            folder: for hidden states that are too large for memory.
            used: the training examples whose states are computed here, unless the layers are small
                (``prefix.READ_AGAIN``); those of others are when they are asked for.
            dtype: of the stored states.
            notify: called with a line about the progress of long work.

        Raises:
            UserError: the weights cannot be read, or the folder cannot hold the states.
        """
        prefix = Prefix(unpaired(self.model), stored, self.base_hash, folder)

        def states(rows: TokenBatch, expected: int) -> HiddenStates:
            return HiddenStates(prefix, np.asarray(rows.tokens), expected, folder, dtype)

        def all_states(rows: TokenBatch) -> HiddenBatch:
            hidden = states(rows, len(rows.tokens))
            hidden.compute(np.arange(len(rows.tokens)), notify)
            return HiddenBatch(hidden[:], *rows[1:])

        assert isinstance(self.train, TokenBatch)
        assert isinstance(self.validation, TokenBatch)
        assert isinstance(self.test, TokenBatch)
        hidden = states(self.train, len(used))
        if not prefix.is_small:
            hidden.compute(used, notify)
        train = HiddenBatch(hidden, *self.train[1:])  # pyright: ignore[reportArgumentType]
        return replace(self, train=train, validation=all_states(self.validation), test=all_states(self.test))

    @property
    def frozen(self) -> Base:
        """The base."""
        return self.base

    @property
    def least_width(self) -> int:
        """See :func:`least_clients`."""
        return least_clients(self.model.precision, 1 if self.packed else self.batch_size)

    @property
    def block_size(self) -> int:
        """As many clients as their batches' tokens allow."""
        at_once = max(1, TOKENS_AT_ONCE // (self.batch_size * self.train[0].shape[1]))
        return max(self.least_width, block_width(self.group_size, at_once))

    @property
    def by_length(self) -> bool:
        """Where steps run at several widths of rows."""
        return len(self.widths) > 1 and not self.packed

    @property
    def _filled(self) -> Llama:
        """The model for the clients' work, whose numbers do not depend on how many run at once."""
        return self.model.clone(least_rows=least_rows(self.model.precision, self.block_size))

    @property
    def loss(self) -> mezo.LossFn:
        """See :func:`loss.loss_of`."""
        return bucketed_loss(loss_of(unpaired(self._filled), self.base), self.widths, self.packed)

    @property
    def pair_loss(self) -> mezo.PairLoss:
        """See :func:`loss.pair_loss_of`."""
        return bucketed_loss(pair_loss_of(self._filled, self.base), self.widths, self.packed)

    @property
    def point_loss(self) -> mezo.PointLoss:
        """See :func:`loss.point_loss_of`."""
        return bucketed_point_loss(point_loss_of(unpaired(self._filled), self.base), self.widths, self.packed)

    def init_params(self, key: jax.Array) -> mezo.Params:
        """See :func:`lora.init_lora`."""
        shape = (self.model.config, self.rank, self.targets, self.model.trained)
        return jax.jit(lambda key: init_lora(key, *shape))(key)  # one program instead of many

    def evaluate(self, params: mezo.Params) -> float:
        """Mean cross-entropy over the label tokens of all test rows, in nats."""
        return float(_mean_loss(unpaired(self.model), self.base, params, self._test_batches))

    def validate(self, params: mezo.Params) -> float:
        """The same of the validation rows."""
        return float(_mean_loss(unpaired(self.model), self.base, params, self._validation_batches))

    @cached_property
    def _test_batches(self) -> Any:
        return self.place(_batched(self.test))

    @cached_property
    def _validation_batches(self) -> Any:
        return self.place(_batched(self.validation))

    def hash_frozen(self) -> str:
        """The hash of the whole base."""
        return self.base_hash

    def loss_before(self, params: mezo.Params) -> float:
        """The test loss of the base.

        Raises:
            UserError: it overflows.
        """
        loss = self.evaluate(params)
        check_finite(math.isfinite(loss), "losses", self.model.config, self.base, {}, f"--model {self.name}")
        return loss

    def save(self, folder: Path, params: mezo.Params) -> None:
        """Writes ``adapter/``, which PEFT loads."""
        settings = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, "trained": self.model.trained}
        save_adapter(folder / "adapter", params, **settings, base_name=self.name)

    def count_tokens(self, picks: np.ndarray) -> tuple[int, int]:
        """See :func:`computed_tokens`."""
        return computed_tokens(self.train, picks, self.widths, self.packed)


def _batched(rows: Rows) -> Rows:
    """Rows in batches of one shape. Copies of the first row, without weight, fill the last batch up."""
    count = len(rows.labels)
    size = min(count, max(1, TOKENS_AT_ONCE // rows[0].shape[1]))
    taken = np.pad(np.arange(count), (0, -count % size)).reshape(-1, size)
    filled = type(rows)(*(leaf[taken] for leaf in rows))
    np.asarray(filled.label_weights).reshape(taken.size, -1)[count:] = 0
    return filled


@partial(jax.jit, static_argnums=0)
def _mean_loss(model: Llama, base: Base, lora: mezo.Params, rows: Rows) -> jax.Array:
    sums = jax.lax.map(lambda batch: loss_sums(model, base, lora, batch), rows)
    total, labels = (jnp.sum(column) for column in sums)
    return total / labels
