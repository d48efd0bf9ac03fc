"""A client's part in the secure sums of a deployed run (:mod:`secure_sum`).

Its keys, its masks and its own numbers are in this process alone and on no disk. A client that is restarted during a
sum has lost them, and drops out of the round.

One round's numbers may be summed once: from the sums of two lists of clients that differ in one client that client's
numbers would follow. A client therefore helps to take off the masks for one list in a round, however often the server
tries the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmezo_jax.core.aggregation import sample_participants
from fedmezo_jax.deploy.agreement import sum_name
from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import fixed_point, secure_sum
from fedmezo_jax.run import secure_sum_messages as sum_messages
from fedmezo_jax.run.config import RunConfig


@dataclass
class _Sum:
    """One sum, as far as it has come.

    Attributes:
        party: the client's secrets.
        advert: its first message.
        numbers: ``[H·n]`` uint64, what it adds.
        boxes: the shares for it.
        arrived: the list that it has signed.
    """

    party: secure_sum.Client
    advert: bytes
    numbers: np.ndarray
    boxes: dict[int, bytes] = field(default_factory=dict)
    arrived: list[int] = field(default_factory=list)


class SecureSums:
    """All sums of a client's present round. Every message is answered from the operating system's randomness."""

    def __init__(self, config: RunConfig, client: int, key: Ed25519PrivateKey, public_keys: Sequence[bytes]):
        """Takes part in nothing yet.

        Args:
            config: the run's.
            client: its id.
            key: its identity.
            public_keys: of each client's identity, by client, from a source that is not the server.
        """
        self._config, self._id, self._key, self._public_keys = config, client, key, public_keys
        self._round = -1
        self._sums: dict[bytes, _Sum] = {}  # by the name that the server has given it
        self._summed: list[int] | None = None  # the list for which the masks of this round were taken off

    def begun(self, name: bytes) -> bytes | None:
        """The client's first message in a sum; None if it has not begun that."""
        return self._sums[name].advert if name in self._sums else None

    def begin(self, name: bytes, run: bytes, t: int, attempt: int, numbers: np.ndarray) -> bytes:
        """The client's first message in a new sum.

        Args:
            name: of the sum.
            run: names the run.
            t: number of the round.
            attempt: how often it was tried before.
            numbers: ``[H·n]``, what the client adds.

        Raises:
            UserError: the run has no such attempt, or this client no part in it.
        """
        config, drawn = self._config, np.zeros(0, np.int32)
        if attempt < config.attempts:
            drawn = sample_participants(config.seed, t, config.clients, config.participants, attempt)
        if self._id not in drawn:
            raise UserError(f"round {t + 1}: client {self._id} takes no part in attempt {attempt + 1}")
        if t != self._round:
            self._round, self._summed = t, None
            self._sums.clear()
        identities = {id: self._public_keys[id] for id in map(int, drawn)}
        round_name = sum_name(run, name, t, attempt)
        party, advert = secure_sum.join(self._id, round_name, config.threshold, identities, self._key)
        packed = sum_messages.pack_advert(advert)
        self._sums[name] = _Sum(party, packed, fixed_point.encode(numbers, config.participants))
        return packed

    def answer(self, name: bytes, step: str, content: bytes) -> bytes:
        """The client's message in a later step.

        Args:
            name: of the sum.
            step: one of :data:`envelopes.STEPS`.
            content: what the others have sent for it.

        Raises:
            UserError: the message is malformed, comes a second time, or asks for what would tell a client's numbers.
        """
        if name not in self._sums:
            raise UserError("the secrets of this sum are gone: the client was restarted, or has gone on: it drops out")
        answers = {"share": self._share, "mask": self._mask, "agree": self._agree, "unmask": self._unmask}
        return answers[step](self._sums[name], content)

    def _share(self, this: _Sum, content: bytes) -> bytes:
        return sum_messages.pack_boxes(secure_sum.share(this.party, sum_messages.unpack_adverts(content)))

    def _mask(self, this: _Sum, content: bytes) -> bytes:
        boxes = sum_messages.unpack_boxes(content)
        if unreadable := secure_sum.unreadable(this.party, boxes):
            return sum_messages.pack_ids(unreadable)
        masked = secure_sum.mask(this.party, this.numbers, list(boxes))
        this.boxes = boxes
        return sum_messages.pack_masked(masked)

    def _agree(self, this: _Sum, content: bytes) -> bytes:
        arrived = sum_messages.unpack_ids(content)
        self._check_only(arrived)
        if not set(arrived) <= set(this.boxes):
            raise UserError("the list of clients has one whose shares have not come in")
        signature = secure_sum.agree(this.party, arrived)
        this.arrived = arrived
        return sum_messages.pack_signature(signature)

    def _unmask(self, this: _Sum, content: bytes) -> bytes:
        self._check_only(this.arrived)
        signatures = sum_messages.unpack_signatures(content)
        unmasking = secure_sum.unmask(this.party, this.boxes, this.arrived, signatures)
        self._summed = this.arrived
        return sum_messages.pack_unmasking(unmasking)

    def _check_only(self, arrived: Sequence[int]) -> None:
        if self._summed is not None and set(arrived) != set(self._summed):
            raise UserError(
                f"round {self._round + 1}: client {self._id} has helped to sum the numbers of clients "
                f"{', '.join(map(str, sorted(self._summed)))}, and helps with no other list in this round"
            )
