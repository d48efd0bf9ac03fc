"""The messages of a secure sum as msgpack: what a deployed run sends, and by which a simulation counts its bytes.

step        a client sends                      packed by         and has heard                    packed by
advertise   its keys                            pack_advert
share       shares, encrypted for each          pack_boxes        everyone's keys                  pack_adverts
mask        its masked vector                   pack_masked       the shares for it                pack_boxes
agree       its signature of the list           pack_signature    the list of those that sent one  pack_ids
unmask      its shares                          pack_unmasking    the signatures of the list       pack_signatures

A client that cannot read all shares for it sends the senders of these instead of a masked vector, by ``pack_ids``.

Whatever a message holds, reading it gives a value of the right types and sizes or raises ``UserError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import msgpack
import numpy as np

from fedmezo_jax.privacy.secure_sum import PRIME, Advert, Unmasking
from fedmezo_jax.run.reader import Reader

_KEY, _SIGNATURE, _SHARE, _BOX = 32, 64, 33, 12 + 2 * 33 + 16  # a box is a nonce, two shares and a tag
T = TypeVar("T")


def pack_advert(advert: Advert) -> bytes:
    """A client's keys."""
    return _pack(advert)


def unpack_advert(message: bytes) -> Advert:
    """What :func:`pack_advert` packed.

    Raises:
        UserError: the message is malformed.
    """
    return _read(message, "the keys", _advert)


def pack_adverts(adverts: Mapping[int, Advert]) -> bytes:
    """The keys of all clients, by client."""
    return _pack(adverts)


def unpack_adverts(message: bytes) -> dict[int, Advert]:
    """What :func:`pack_adverts` packed.

    Raises:
        UserError: the message is malformed.
    """
    return _read(message, "the list of keys", lambda reader: _map(reader, _advert))


def pack_boxes(boxes: Mapping[int, bytes]) -> bytes:
    """Encrypted shares: from a client by their recipients, to a client by their senders."""
    return _pack(boxes)


def unpack_boxes(message: bytes) -> dict[int, bytes]:
    """What :func:`pack_boxes` packed.

    Raises:
        UserError: the message is malformed.
    """
    return _read(message, "the list of shares", lambda reader: _map(reader, lambda inner: _sized(inner, _BOX)))


def pack_masked(masked: np.ndarray) -> bytes:
    """A masked vector, uint64."""
    return _pack(masked.astype("<u8").tobytes())


def unpack_masked(message: bytes, size: int) -> np.ndarray | list[int]:
    """What :func:`pack_masked` packed, ``[size]`` uint64; or the clients whose shares the sender cannot read.

    Raises:
        UserError: the message is malformed.
    """
    if Reader(message, "the masked vector").at_array():
        return unpack_ids(message)
    content = _read(message, "the masked vector", lambda reader: _sized(reader, 8 * size))
    return np.frombuffer(content, "<u8").astype(np.uint64)


def pack_ids(ids: Sequence[int]) -> bytes:
    """Clients."""
    return _pack(list(map(int, ids)))


def unpack_ids(message: bytes) -> list[int]:
    """What :func:`pack_ids` packed.

    Raises:
        UserError: the message is malformed.
    """
    return _read(message, "the list of clients", lambda reader: [reader.integer() for _ in range(reader.array())])


def pack_signature(signature: bytes) -> bytes:
    """A client's signature of a list of clients."""
    return _pack(signature)


def unpack_signature(message: bytes) -> bytes:
    """What :func:`pack_signature` packed.

    Raises:
        UserError: the message is malformed.
    """
    return _read(message, "the signature", lambda reader: _sized(reader, _SIGNATURE))


def pack_signatures(signatures: Mapping[int, bytes]) -> bytes:
    """Signatures of a list of clients, by signer."""
    return _pack(signatures)


def unpack_signatures(message: bytes) -> dict[int, bytes]:
    """What :func:`pack_signatures` packed.

    Raises:
        UserError: the message is malformed.
    """
    return _read(message, "the list of signatures", lambda reader: _map(reader, lambda one: _sized(one, _SIGNATURE)))


def pack_unmasking(unmasking: Unmasking) -> bytes:
    """A client's shares."""
    return _pack([{id: share.to_bytes(_SHARE, "big") for id, share in part.items()} for part in unmasking])


def unpack_unmasking(message: bytes) -> Unmasking:
    """What :func:`pack_unmasking` packed.

    Raises:
        UserError: the message is malformed.
    """

    def unmasking(reader: Reader) -> Unmasking:
        reader.array(len(Unmasking._fields))
        return Unmasking(_map(reader, _share), _map(reader, _share))

    return _read(message, "the shares", unmasking)


class Sent(NamedTuple):
    """What a client sends in each step, packed."""

    advertise: bytes
    share: bytes
    mask: bytes
    agree: bytes
    unmask: bytes


def sent(
    advert: Advert, boxes: Mapping[int, bytes], masked: np.ndarray, signature: bytes, unmasking: Unmasking
) -> Sent:
    """A client's five messages; arguments as the functions of :mod:`secure_sum` return them."""
    last = pack_signature(signature), pack_unmasking(unmasking)
    return Sent(pack_advert(advert), pack_boxes(boxes), pack_masked(masked), *last)


class Heard(NamedTuple):
    """What the server sends to a client for each step after the first, packed."""

    share: bytes
    mask: bytes
    agree: bytes
    unmask: bytes


def heard(
    adverts: Mapping[int, Advert], boxes: Mapping[int, bytes], arrived: Sequence[int], signatures: Mapping[int, bytes]
) -> Heard:
    """The server's four messages to a client."""
    return Heard(pack_adverts(adverts), pack_boxes(boxes), pack_ids(arrived), pack_signatures(signatures))


def sizes(ids: Iterable[int], numbers: int) -> tuple[int, int]:
    """Bytes from and to each of the clients ``ids`` in a sum of so many numbers, in which all of them stay."""
    ids = list(map(int, ids))
    advert, boxes = Advert(bytes(_KEY), bytes(_KEY), bytes(_SIGNATURE)), {id: bytes(_BOX) for id in ids}
    signature, unmasking = bytes(_SIGNATURE), Unmasking(dict.fromkeys(ids, 0), {})
    up = sent(advert, boxes, np.zeros(numbers), signature, unmasking)
    down = heard(dict.fromkeys(ids, advert), boxes, ids, dict.fromkeys(ids, signature))
    return sum(map(len, up)), sum(map(len, down))


def _pack(content: Any) -> bytes:
    return cast(bytes, msgpack.packb(content))


def _read(message: bytes, what: str, content: Callable[[Reader], T]) -> T:
    reader = Reader(message, what)
    value = content(reader)
    reader.end()
    return value


def _map(reader: Reader, value: Callable[[Reader], T]) -> dict[int, T]:
    found: dict[int, T] = {}
    for _ in range(reader.map()):
        if (id := reader.integer()) in found:
            raise reader.error(f"it has client {id} twice")
        found[id] = value(reader)
    return found


def _sized(reader: Reader, size: int) -> bytes:
    content = reader.value(bytes)
    if len(content) != size:
        raise reader.error(f"{len(content)} bytes are not {size}")
    return content


def _advert(reader: Reader) -> Advert:
    reader.array(len(Advert._fields))
    return Advert(_sized(reader, _KEY), _sized(reader, _KEY), _sized(reader, _SIGNATURE))


def _share(reader: Reader) -> int:
    share = int.from_bytes(_sized(reader, _SHARE), "big")
    if share >= PRIME:
        raise reader.error("a share is not of the field")
    return share
