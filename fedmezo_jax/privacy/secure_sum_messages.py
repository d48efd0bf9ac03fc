"""The messages of a secure sum as msgpack, by which their bytes are counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgpack
import numpy as np

from fedmezo_jax.privacy.secure_sum import Advert, Unmasking

_KEY, _SIGNATURE, _SHARE, _BOX = 32, 64, 33, 12 + 2 * 33 + 16  # a box is a nonce, two shares and a tag


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
    shares = [
        {id: share.to_bytes(_SHARE, "big") for id, share in part.items()} for part in (unmasking.seeds, unmasking.keys)
    ]
    parts = (advert, boxes, masked.astype("<u8").tobytes(), signature, shares)
    return Sent(*map(_pack, parts))


def heard(
    adverts: Mapping[int, Advert], boxes: Mapping[int, bytes], arrived: Sequence[int], signatures: Mapping[int, bytes]
) -> bytes:
    """What the server sends to a client in all steps together: what the others have sent for it."""
    return _pack((adverts, boxes, list(arrived), signatures))


def sizes(ids: Iterable[int], numbers: int) -> tuple[int, int]:
    """Bytes from and to each of the clients ``ids`` in a sum of so many numbers, in which all of them stay."""
    ids = list(map(int, ids))
    advert, boxes = Advert(bytes(_KEY), bytes(_KEY), bytes(_SIGNATURE)), {id: bytes(_BOX) for id in ids}
    signature, unmasking = bytes(_SIGNATURE), Unmasking(dict.fromkeys(ids, 0), {})
    up = sent(advert, boxes, np.zeros(numbers), signature, unmasking)
    down = heard(dict.fromkeys(ids, advert), boxes, ids, dict.fromkeys(ids, signature))
    return sum(map(len, up)), len(down)


def _pack(content: Any) -> bytes:
    return cast(bytes, msgpack.packb(content))
