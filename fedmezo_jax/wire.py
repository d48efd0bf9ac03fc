"""What clients and server send each other, as bytes: sizes are read off these messages and never computed.

Scalars travel as msgpack arrays in which vectors are binary (float32, little-endian), LoRA trees as Flax msgpack. Both
sides know the run's configuration, and with its seed θ at the start and every direction.

from       to          what                                    when
server     a client    its learning rate (Start)               before its local work
client     server      coefficients and losses (Update)        after it, with ``--uplink coefficients``
client     server      its θ_i and losses (lora_update)        after it, with ``--uplink lora``
server     everyone    what moves θ (result)                   after the round, with ``--uplink coefficients``
server     a client    θ (lora_message)                        before its local work, with ``--uplink lora``
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import msgpack
import numpy as np
from flax.serialization import from_bytes, to_bytes

from fedmezo_jax.mezo import Params


class Update(NamedTuple):
    """A client's local work as the numbers that rebuild it.

    Attributes:
        round: number of the round, from 0.
        client: its id.
        samples: rows that it has.
        coefficients: ``[H, n]`` float32, η_i·g/n.
        losses: ``[H]`` float32, training loss of each step.
    """

    round: int
    client: int
    samples: int
    coefficients: np.ndarray
    losses: np.ndarray


def pack_update(update: Update) -> bytes:
    """An :class:`Update` as a message: 250 bytes or so for H = 30 and one direction."""
    head = (int(update.round), int(update.client), int(update.samples))
    return _pack([*head, _bytes(update.coefficients), _bytes(update.losses)])


def unpack_update(message: bytes) -> Update:
    """What :func:`pack_update` packed, bit for bit."""
    round_index, client, samples, coefficients, losses = msgpack.unpackb(message)
    losses = _floats(losses)
    return Update(round_index, client, samples, _floats(coefficients).reshape(len(losses), -1), losses)


def pack_start(round_index: int, learning_rate: float) -> bytes:
    """The server's word to a participant: begin, at this learning rate (float32)."""
    return _pack([int(round_index), float(learning_rate)])


class Outcome(NamedTuple):
    """A round's result, from which whoever has θ and the server optimizer's state makes the next θ.

    Attributes:
        round: number of the round, from 0.
        ids: ``[K]`` ids of the clients that count, ascending.
        weights: ``[K]`` float32, or None where all are the same.
        learning_rates: ``[K]`` float32, or None where none is needed (it is for weight decay alone).
        coefficients: ``[K, H·n]`` float32.
    """

    round: int
    ids: np.ndarray
    weights: np.ndarray | None
    learning_rates: np.ndarray | None
    coefficients: np.ndarray


def pack_outcome(outcome: Outcome, clients: int, recipient: int | None = None) -> bytes:
    """An :class:`Outcome` for one of ``clients`` clients; its own coefficients, which it knows, are left out."""
    others = outcome.ids != recipient
    bitmap = np.zeros(clients, bool)
    bitmap[outcome.ids] = True
    who = np.packbits(bitmap).tobytes() if clients <= 32 * len(outcome.ids) else [int(id) for id in outcome.ids]
    vectors = (outcome.weights, outcome.learning_rates, outcome.coefficients[others])
    return _pack([int(outcome.round), who, *(None if vector is None else _bytes(vector) for vector in vectors)])


def unpack_outcome(message: bytes, recipient: int | None = None, own: np.ndarray | None = None) -> Outcome:
    """What :func:`pack_outcome` packed for a recipient, whose own ``[H, n]`` coefficients are put back in."""
    round_index, who, weights, rates, coefficients = msgpack.unpackb(message)
    ids = np.flatnonzero(np.unpackbits(np.frombuffer(who, np.uint8))) if isinstance(who, bytes) else np.array(who)
    others = np.flatnonzero(ids != recipient)
    numbers = _floats(coefficients)
    own = np.zeros(0, np.float32) if own is None else own.ravel()
    whole = np.zeros((len(ids), len(numbers) // len(others) if len(others) else len(own)), np.float32)
    whole[others] = numbers.reshape(len(others), whole.shape[1])
    if len(own):
        whole[ids == recipient] = own
    weights, rates = (None if vector is None else _floats(vector) for vector in (weights, rates))
    return Outcome(round_index, ids, weights, rates, whole)


def pack_mean(round_index: int, coefficients: np.ndarray) -> bytes:
    """A round's result along shared directions: ``[H, n]`` float32 mean coefficients, however many the clients are."""
    return _pack([int(round_index), _bytes(coefficients)])


def unpack_mean(message: bytes) -> tuple[int, np.ndarray]:
    """Round and ``[H·n]`` coefficients of :func:`pack_mean`."""
    round_index, coefficients = msgpack.unpackb(message)
    return round_index, _floats(coefficients)


def lora_message(params: Params) -> bytes:
    """The whole LoRA tree: what FedAvg and the FedMeZO of the paper send, up and down."""
    return to_bytes(params)


def pack_lora_update(update: Update, params: Params) -> bytes:
    """A client's θ_i with what else an update tells."""
    return to_bytes(update._replace(coefficients=np.zeros(0, np.float32))._asdict() | {"params": params})


def unpack_lora_update(message: bytes, like: Params) -> Params:
    """θ_i, of the structure of ``like``, as :func:`pack_lora_update` packed it."""
    empty = dict.fromkeys(Update._fields, 0)
    return from_bytes(empty | {"params": like}, message)["params"]


def _pack(content: Any) -> bytes:
    return cast(bytes, msgpack.packb(content, use_single_float=True))


def _bytes(vector: np.ndarray) -> bytes:
    return np.asarray(vector, "<f4").tobytes()


def _floats(content: bytes) -> np.ndarray:
    return np.frombuffer(content, "<f4").astype(np.float32)
