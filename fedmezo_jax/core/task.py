"""The seam for models: what a federated run asks of a model and its data."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from fedmezo_jax.core import mezo
from fedmezo_jax.core.mezo import Params
from fedmezo_jax.core.tree_hash import tree_hash
from fedmezo_jax.errors import UserError


class Task(Protocol):
    """A model, the examples that it is trained on, and how they are divided among the clients.

    A subclass sets ``train`` and ``parts`` and defines ``init_params``, ``loss``, ``evaluate`` and ``save``; the rest
    has defaults. A loss is passed to compiled programs as an argument: one that holds large weights is a
    ``jax.tree_util.Partial`` with these as leaves, and any other function becomes a constant of the program.
    ``docs/extending.md`` adds a task.

    Attributes:
        train: pytree of NumPy arrays with a leading axis of training examples.
        parts: for each client the indices of its examples in ``train``.
        frozen: pytree of the weights that are not trained.
        block_size: how many clients (of each group of a mesh) run at once; None means all.
        least_width: how many clients run at once at least, see :func:`federated.federated`.
        by_length: whether a client's examples of a round are sorted into steps by length (token rows only).
    """

    train: Any
    parts: Sequence[np.ndarray]
    frozen: Any = ()
    block_size: int | None = None
    least_width: int = 1
    by_length: bool = False

    @abstractmethod
    def init_params(self, key: jax.Array) -> Params:
        """θ at the start, a pytree of float arrays; a function of the key alone."""

    @abstractmethod
    def loss(self, params: Params, batch: Any) -> jax.Array:
        """The loss of a batch, which is ``train`` with a batch of its examples; scalar float32."""

    def pair_loss(self, params: Params, batch: Any, perturbation: mezo.Perturbation) -> tuple[jax.Array, jax.Array]:
        """The losses at θ ± scale·z, a :data:`mezo.PairLoss`."""
        return mezo.pair_loss_of(self.loss)(params, batch, perturbation)

    def point_loss(self, params: Params, batch: Any, perturbation: mezo.Perturbation) -> jax.Array:
        """The loss at θ + scale·z, a :data:`mezo.PointLoss`."""
        return mezo.point_loss_of(self.loss)(params, batch, perturbation)

    @abstractmethod
    def evaluate(self, params: Params) -> float:
        """The mean loss over the test examples."""

    def loss_before(self, params: Params) -> float:
        """The test loss before training.

        Raises:
            UserError: it is not finite.
        """
        loss = self.evaluate(params)
        if not math.isfinite(loss):
            raise UserError(f"{type(self).__name__}: the test loss before training is {loss}: check model and data")
        return loss

    def validate(self, params: Params) -> float:
        """The loss by which ``--learning-rate auto`` goes; by default that of some training examples.

        A task that can spare examples for it keeps them out of ``train``.
        """
        count = len(jax.tree.leaves(self.train)[0])
        some = np.unique(np.linspace(0, count - 1, 32).astype(int))
        return float(self.loss(params, jax.tree.map(lambda leaf: leaf[some], self.train)))

    def hash_frozen(self) -> str:
        """The hash of ``frozen`` that the ledger records."""
        return tree_hash(self.frozen)

    @abstractmethod
    def save(self, folder: Path, params: Params) -> None:
        """Writes the trained θ into the run's folder; its leaves are on the host."""

    def count_tokens(self, picks: np.ndarray) -> tuple[int, int]:
        """Tokens of one pass over the picked examples ``[P, H, batch]``: without padding, and as they are computed.

        Where examples are not made of tokens, one counts as one token.
        """
        return picks.size, picks.size
