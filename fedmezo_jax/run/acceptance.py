"""What the server accepts of a client's message: everything in it is checked against what the server knows.

A message that is not accepted is its client's failure alone, with a reason (:mod:`faults`). What is accepted has the
right shapes and numbers of a possible size; whether they are true cannot be seen.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from fedmezo_jax.core import mezo
from fedmezo_jax.core.mezo import Params
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import client_failures, messages

LARGEST = 1e15
"""Largest absolute value that is accepted of a loss, of a number in θ_i and of how far a step moves θ along a
direction, η_i·g/n: θ and its squares stay within float32."""


class Message(NamedTuple):
    """What came in from a client.

    Attributes:
        update: its update, as :func:`messages.pack_update` packs it.
        lora: its θ_i, as :func:`messages.pack_lora_update` packs it, where clients send that; the update is then what
            the ledger keeps.
        signature: of the update, where clients sign.
    """

    update: bytes
    lora: bytes | None = None
    signature: bytes | None = None


class Expected(NamedTuple):
    """What the server knows of a message before it comes in.

    Attributes:
        round: number of the round, from 0.
        client: id of the client that it was asked of.
        samples: rows of that client; None where they are not known.
        steps: H.
        directions: n; 0 for back-propagation.
        learning_rate: η_i that the client was given.
        limit: absolute value at which projected gradients are clipped, whatever the losses are; None where nothing is
            clipped.
    """

    round: int
    client: int
    samples: int | None
    steps: int
    directions: int
    learning_rate: float
    limit: float | None = None


class Received(NamedTuple):
    """What became of a message.

    Attributes:
        update: with projected gradients within the limit; None if the message is malformed or for something else.
        params: θ_i, where clients send it and it is well-formed.
        why: the client's failure, or None if it is accepted.
    """

    update: messages.Update | None
    params: Params | None
    why: str | None


def receive(message: Message, expected: Expected, like: Params) -> Received:
    """Reads and checks a client's message; ``like`` has the structure and shapes that its LoRA must have."""
    try:
        update = messages.unpack_update(message.update)
        lora, params = (update, None) if message.lora is None else messages.unpack_lora_update(message.lora, like)
    except UserError:
        return Received(None, None, client_failures.MALFORMED)
    if update.projected_gradients.shape != (expected.steps, expected.directions) or len(lora.losses) != expected.steps:
        return Received(None, None, client_failures.MALFORMED)
    known = (expected.round, expected.client, update.samples if expected.samples is None else expected.samples)
    if not update[:3] == lora[:3] == known:
        return Received(None, None, client_failures.MISMATCHED)
    gradients, numbers = update.projected_gradients, jax.tree.leaves(params)
    if expected.limit is None:
        numbers += [update.losses, lora.losses]
    if not all(np.isfinite(leaf).all() for leaf in [gradients, *numbers]):
        return Received(update, params, client_failures.NOT_FINITE)
    if expected.limit is not None:
        limit = np.float32(expected.limit)
        gradients = np.where(np.abs(gradients) > limit, np.copysign(limit, gradients), gradients)
        update = update._replace(projected_gradients=gradients)
    if expected.directions:
        numbers += [mezo.coefficients(np.float64(expected.learning_rate), gradients)]
    if any(np.any(np.abs(leaf) > LARGEST) for leaf in numbers):
        return Received(update, params, client_failures.TOO_LARGE)
    return Received(update, params, None)
