"""What clients and server send each other, as bytes: sizes are read off these messages and never computed.

Scalars travel as msgpack arrays in which vectors are binary (float32, little-endian), LoRA trees as Flax msgpack. Both
sides know the run's configuration, and with its seed θ at the start and every direction.

sent by    to          message                                when                        packed by
server     a client    its learning rate                      before its local work       pack_start
client     server      its projected gradients and losses     ``--uplink coefficients``   pack_update
client     server      its LoRA θ_i and losses                ``--uplink lora``           pack_lora_update
server     everyone    their gradients, rates and weights     own directions              pack_outcome
server     everyone    the mean coefficients                  ``--directions-shared``     pack_mean
server     a client    the LoRA θ                             ``--uplink lora``           lora_message

Whatever a message holds, reading it gives a value of the right types and shapes or raises ``UserError``, and allocates
no more than a small multiple of the message's size. Whether the numbers make sense is for :mod:`acceptance` to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import msgpack
import numpy as np
from flax.serialization import from_state_dict, to_bytes, to_state_dict

from fedmezo_jax.core.mezo import Params
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.reader import ERRORS, Reader

VERSION = 2
"""Of the messages' format; every message begins with it. In version 1, which had no such number, clients sent products
of learning rates and projected gradients."""


class Update(NamedTuple):
    """A client's local work as the numbers that, with its learning rate, reconstruct it.

    Attributes:
        round: number of the round, from 0.
        client: its id.
        samples: rows that it has.
        projected_gradients: ``[H, n]`` float32, g of each step and direction.
        losses: ``[H]`` float32, training loss of each step.
    """

    round: int
    client: int
    samples: int
    projected_gradients: np.ndarray
    losses: np.ndarray


def pack_update(update: Update) -> bytes:
    """An :class:`Update` as a message: 250 bytes or so for H = 30 and one direction."""
    head = (int(update.round), int(update.client), int(update.samples))
    return _pack([VERSION, *head, _bytes(update.projected_gradients), _bytes(update.losses)])


def unpack_update(message: bytes) -> Update:
    """What :func:`pack_update` packed, bit for bit.

    Raises:
        UserError: the message is malformed.
    """
    reader, _ = _opened(message, "the update", len(Update._fields))
    round_index, client, samples = reader.integer(), reader.integer(), reader.integer()
    gradients, losses = reader.vector(), reader.vector()
    reader.end()
    if not len(losses) or len(gradients) % len(losses):
        raise reader.error(f"{len(gradients)} projected gradients do not go with {len(losses)} losses")
    return Update(round_index, client, samples, gradients.reshape(len(losses), -1), losses)


def pack_start(round_index: int, learning_rate: float, chain: bytes = b"") -> bytes:
    """The server's word to a participant: begin, at this learning rate (float32).

    ``chain`` is the ledger's so far, where the client signs.
    """
    return _pack([VERSION, int(round_index), float(learning_rate), *([chain] if chain else [])])


def unpack_start(message: bytes) -> tuple[int, float, bytes]:
    """Round, learning rate and chain of :func:`pack_start`.

    Raises:
        UserError: the message is malformed.
    """
    reader, length = _opened(message, "the start message", 2, optional=1)
    start = reader.integer(), reader.value(float), reader.value(bytes) if length > 3 else b""
    reader.end()
    return start


class Outcome(NamedTuple):
    """A round's result, from which whoever has θ and the server optimizer's state makes the next θ.

    Attributes:
        round: number of the round, from 0.
        ids: ``[K]`` ids of the clients that count, ascending.
        weights: ``[K]`` float32, or None where all are the same.
        learning_rates: ``[K]`` float32, η_i.
        projected_gradients: ``[K, H·n]`` float32.
        step: how much of the update the server took.
    """

    round: int
    ids: np.ndarray
    weights: np.ndarray | None
    learning_rates: np.ndarray
    projected_gradients: np.ndarray
    step: float


def pack_outcome(outcome: Outcome, clients: int, recipient: int | None = None) -> bytes:
    """An :class:`Outcome` for one of ``clients`` clients.

    Its own projected gradients, which it knows, are left out. A learning rate that all have is sent once.
    """
    others = outcome.ids != recipient
    bitmap = np.zeros(clients, bool)
    bitmap[outcome.ids] = True
    who = np.packbits(bitmap).tobytes() if clients <= 32 * len(outcome.ids) else [int(id) for id in outcome.ids]
    rates = outcome.learning_rates
    rates = rates[:1] if np.all(rates == rates[0]) else rates
    weights = None if outcome.weights is None else _bytes(outcome.weights)
    gradients = _bytes(outcome.projected_gradients[others])
    return _pack([VERSION, int(outcome.round), who, weights, _bytes(rates), gradients, float(outcome.step)])


def unpack_outcome(message: bytes, recipient: int | None = None, own: np.ndarray | None = None) -> Outcome:
    """What :func:`pack_outcome` packed for a recipient, whose own ``[H, n]`` projected gradients are put back in.

    Raises:
        UserError: the message is malformed, or has no place for ``own``.
    """
    reader, _ = _opened(message, "the outcome", len(Outcome._fields))
    round_index, ids = reader.integer(), _ids(reader)
    weights, rates, numbers = reader.optional_vector(), reader.vector(), reader.vector()
    step = reader.value(float)
    reader.end()
    if (weights is not None and len(weights) != len(ids)) or len(rates) not in (1, len(ids)):
        raise reader.error(f"{len(ids)} clients do not have as many weights or learning rates")
    mine = ids == recipient
    others = len(ids) - int(mine.sum())
    width = len(numbers) // others if others else 0 if own is None else own.size
    if others * width != len(numbers) or (others and not width) or (mine.any() and (own is None or own.size != width)):
        raise reader.error(f"{len(numbers)} projected gradients do not go with {len(ids)} clients")
    whole = np.zeros((len(ids), width), np.float32)
    whole[~mine] = numbers.reshape(others, width)
    if own is not None:
        whole[mine] = own.ravel()
    return Outcome(round_index, ids, weights, np.broadcast_to(rates, len(ids)), whole, step)


def _ids(reader: Reader) -> np.ndarray:
    """The clients of an outcome, from a bitmap or a list of ids."""
    if reader.at_array():
        listed = [reader.integer() for _ in range(reader.array())]
        ids = np.array(listed, np.int64)
    else:
        ids = np.flatnonzero(np.unpackbits(np.frombuffer(reader.value(bytes), np.uint8)))
    if not len(ids) or np.any(np.diff(ids) <= 0):
        raise reader.error("its clients are not in ascending order, or there are none")
    return ids


def pack_mean(round_index: int, coefficients: np.ndarray, step: float) -> bytes:
    """A round's result along shared directions, however many the clients are.

    Args:
        round_index: number of the round, from 0.
        coefficients: ``[H, n]`` float32, what ``round.combine`` gives; the clients' learning rates are in it.
        step: how much of the update the server took.
    """
    return _pack([VERSION, int(round_index), _bytes(coefficients), float(step)])


def unpack_mean(message: bytes) -> tuple[int, np.ndarray, float]:
    """Round, ``[H·n]`` coefficients and step of :func:`pack_mean`.

    Raises:
        UserError: the message is malformed.
    """
    reader, _ = _opened(message, "the mean", 3)
    mean = reader.integer(), reader.vector(), reader.value(float)
    reader.end()
    return mean


def lora_message(params: Params) -> bytes:
    """The whole LoRA tree: what FedAvg and the FedMeZO of the paper send, up and down."""
    return to_bytes(params)


def pack_lora_update(update: Update, params: Params) -> bytes:
    """A client's θ_i, with its :class:`Update` but for the projected gradients."""
    content = update._replace(projected_gradients=np.zeros(0, np.float32))._asdict()
    return to_bytes({"version": VERSION} | content | {"params": params})


def unpack_lora_update(message: bytes, like: Params) -> tuple[Update, Params]:
    """What :func:`pack_lora_update` packed: the update without projected gradients, ``[H, 0]``, and θ_i.

    Args:
        message: as it came in.
        like: a tree of the structure and shapes that θ_i must have.

    Raises:
        UserError: the message is malformed, or θ_i is of another structure, shape or type.
    """
    try:
        content = msgpack.unpackb(message, max_array_len=0, ext_hook=_array)
    except ERRORS as error:
        raise _no_lora_update(f"it cannot be decoded ({type(error).__name__})") from None
    version = content.get("version", 1) if isinstance(content, dict) else VERSION
    if type(version) is not int or version != VERSION:
        raise _other_version("the LoRA update", version)
    if not isinstance(content, dict) or content.keys() != {"version", *Update._fields, "params"}:
        raise _no_lora_update("it has other fields")
    update = Update(**{name: content[name] for name in Update._fields})
    losses = update.losses
    if any(type(number) is not int or not 0 <= number < 2**63 for number in update[:3]):
        raise _no_lora_update("its round, client and samples are no numbers in range")
    if not isinstance(losses, np.ndarray) or losses.ndim != 1 or not len(losses):
        raise _no_lora_update("its losses are no vector")
    params = from_state_dict(like, _matched(content["params"], to_state_dict(like), "params"))
    return update._replace(projected_gradients=np.zeros((len(losses), 0), np.float32)), params


def _array(code: int, content: bytes) -> np.ndarray:
    """A float32 array as Flax packs it: (shape, dtype, bytes) in an extension of code 1."""
    shape, dtype, numbers = msgpack.unpackb(content, raw=True, max_array_len=64, max_map_len=0, max_ext_len=0)
    if code != 1 or dtype != b"float32" or any(type(n) is not int or not 0 <= n <= len(numbers) for n in shape):
        raise ValueError("not a float32 array")
    return np.frombuffer(numbers, "<f4").reshape(shape)


def _matched(node: Any, like: Any, path: str) -> Any:
    """The tree ``node``, which must have the names and shapes of ``like``."""
    if isinstance(like, Mapping):
        if not isinstance(node, dict) or node.keys() != like.keys():
            raise _no_lora_update(f"{path} does not have the entries {', '.join(sorted(like))}")
        return {name: _matched(node[name], like[name], f"{path}.{name}") for name in like}
    if isinstance(node, dict) and isinstance(chunks := node.get("chunks"), dict):
        # Flax splits arrays of a gigabyte and more.
        parts = [part for i in range(len(chunks)) if isinstance(part := chunks.get(str(i)), np.ndarray)]
        if parts and sum(part.size for part in parts) == like.size:
            node = np.concatenate([part.ravel() for part in parts]).reshape(like.shape)
    if not isinstance(node, np.ndarray) or node.shape != like.shape:
        raise _no_lora_update(f"{path} is no float32 array of shape {like.shape}")
    return node


def _no_lora_update(why: str) -> UserError:
    return UserError(f"the LoRA update is malformed: {why}")


def _opened(message: bytes, what: str, fields: int, optional: int = 0) -> tuple[Reader, int]:
    """A reader of a message of so many fields, past its format version, and how many entries the message has."""
    reader = Reader(message, what)
    length = reader.array()
    if not fields <= length <= fields + 1 + optional:
        raise reader.error(f"it has {length} entries and not {fields + 1}")
    if (version := 1 if length == fields else reader.integer()) != VERSION:
        raise _other_version(what, version)
    return reader, length


def _other_version(what: str, version: object) -> UserError:
    return UserError(
        f"{what} is of format version {version!r:.20}, and this release reads version {VERSION}: run the same "
        "release on both sides"
    )


def _pack(content: Any) -> bytes:
    return cast(bytes, msgpack.packb(content, use_single_float=True))


def _bytes(vector: np.ndarray) -> bytes:
    return np.asarray(vector, "<f4").tobytes()
