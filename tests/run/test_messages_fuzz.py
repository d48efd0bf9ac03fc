"""Damaged messages and ledger entries: each is read as something of the right types, or refused in one line."""

import contextlib
import random
import tracemalloc

import msgpack
import numpy as np
import pytest
from flax import serialization

from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy.secure_sum import Advert, Unmasking
from fedmezo_jax.run import ledger, messages, secure_sum_messages

DRAW = np.random.RandomState(7)
MUTATIONS = 1500


def numbers(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


LORA = {"q_proj": {"A": numbers(2, 3, 2), "B": numbers(2, 2, 3)}, "v_proj": {"A": numbers(2, 3, 2), "B": numbers(1)}}
UPDATE = messages.Update(3, 1, 10, numbers(4, 2), numbers(4))
ADVERT, UNMASKING = Advert(bytes(32), b"k" * 32, bytes(64)), Unmasking({0: 5, 7: 2**256}, {300: 9})
OUTCOME = messages.Outcome(9, np.array([0, 2, 5]), numbers(3), numbers(3), numbers(3, 4), 0.25)
ENTRY = ledger.Entry(
    2,
    1,
    np.array([0, 2], np.int32),
    np.array([1, 0], np.float32),
    numbers(2),
    [messages.pack_update(UPDATE), None],
    [(0, 1, "dropped out"), (1, 2, "came too late")],
)
MESSAGES = {
    "update": (messages.pack_update(UPDATE), messages.unpack_update),
    "start": (messages.pack_start(3, 0.5), messages.unpack_start),
    "outcome with a bitmap": (messages.pack_outcome(OUTCOME, 8), messages.unpack_outcome),
    "outcome with a list": (messages.pack_outcome(OUTCOME, 500), messages.unpack_outcome),
    "outcome without the recipient's numbers": (
        messages.pack_outcome(OUTCOME, 8, 2),
        lambda message: messages.unpack_outcome(message, 2, numbers(2, 2)),
    ),
    "mean": (messages.pack_mean(3, numbers(4, 2), 1.0), messages.unpack_mean),
    "LoRA update": (
        messages.pack_lora_update(UPDATE, LORA),
        lambda message: messages.unpack_lora_update(message, LORA),
    ),
    "ledger entry": (ledger.pack_entry(ENTRY), ledger.unpack_entry),
}
SUM_MESSAGES = {
    "keys of a sum": (secure_sum_messages.pack_advert(ADVERT), secure_sum_messages.unpack_advert),
    "everyone's keys": (secure_sum_messages.pack_adverts({0: ADVERT, 300: ADVERT}), secure_sum_messages.unpack_adverts),
    "boxes of a sum": (secure_sum_messages.pack_boxes({0: bytes(94), 7: bytes(94)}), secure_sum_messages.unpack_boxes),
    "masked vector": (secure_sum_messages.pack_masked(np.arange(5)), lambda m: secure_sum_messages.unpack_masked(m, 5)),
    "senders of unreadable boxes": (
        secure_sum_messages.pack_ids([0, 7, 300]),
        lambda message: secure_sum_messages.unpack_masked(message, 5),
    ),
    "list of clients": (secure_sum_messages.pack_ids([0, 7, 300]), secure_sum_messages.unpack_ids),
    "signature of a list": (secure_sum_messages.pack_signature(bytes(64)), secure_sum_messages.unpack_signature),
    "signatures of a list": (
        secure_sum_messages.pack_signatures({0: bytes(64), 7: bytes(64)}),
        secure_sum_messages.unpack_signatures,
    ),
    "shares of a sum": (secure_sum_messages.pack_unmasking(UNMASKING), secure_sum_messages.unpack_unmasking),
}
"""Which travel in envelopes that have a format version."""
# The first bytes of msgpack's arrays, maps, extensions, strings and large numbers, with lengths beyond any message.
HEADS = [bytes([code]) + b"\xff" * 4 for code in (0xC6, 0xC9, 0xCE, 0xDB, 0xDD, 0xDF)]
CODES = [bytes([code]) for code in (0x80, 0x90, 0xA1, 0xC0, 0xC1, 0xC3, 0xCB, 0xD3, 0xD4, 0xD6, 0xFF)]


def mutated(message, draw):
    """A message with one to three changes of any kind."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(message) + 1)
        piece = draw.choice([draw.choice(HEADS), draw.choice(CODES), draw.randbytes(draw.randint(1, 8))])
        cut = draw.choice([0, len(piece), draw.randint(0, 20), len(message)])
        kind = draw.randrange(4)
        if kind == 0 and message:
            at %= len(message)
            message = message[:at] + bytes([message[at] ^ 1 << draw.randrange(8)]) + message[at + 1 :]
        elif kind == 1:
            message = message[:at] + piece + message[at + cut :]
        elif kind == 2:
            message = message[:at] + message[at + cut :]
        else:
            message = message[:at] + message[draw.randrange(len(message) + 1) :]
    return message


@pytest.mark.parametrize("name", MESSAGES | SUM_MESSAGES)
def test_a_damaged_message_is_read_or_refused_and_nothing_else(name):
    message, unpack = (MESSAGES | SUM_MESSAGES)[name]
    unpack(message)
    draw, refusals = random.Random(name), []
    for _ in range(MUTATIONS):
        try:
            unpack(mutated(message, draw))
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > MUTATIONS / 4
    assert not any("\n" in refusal for refusal in refusals)


@pytest.mark.parametrize("name", MESSAGES | SUM_MESSAGES)
@pytest.mark.parametrize("head", [0x92, 0xDD, 0xDF, 0xC6, 0xC9])
def test_a_message_that_promises_much_is_refused_without_room_made_for_it(name, head):
    """A megabyte of nested containers, each with as many entries as the message has bytes."""
    _, unpack = (MESSAGES | SUM_MESSAGES)[name]
    size = 1 << 20
    inside = bytes([head]) + (b"" if head < 0xA0 else (size // 2).to_bytes(4, "big"))
    hostile = (inside * 900).ljust(size, b"\0")
    tracemalloc.start()
    try:
        for content in (hostile, b"\x92" + hostile[1:], b"\x95\0\0\0" + hostile, b"\x81\xa6params" + hostile):
            with contextlib.suppress(UserError):
                unpack(content)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 40 * size


def test_only_the_expected_lora_is_read():
    def refused(tree, update=UPDATE):
        with pytest.raises(UserError, match="LoRA update is malformed"):
            messages.unpack_lora_update(messages.pack_lora_update(update, tree), LORA)

    refused({"q_proj": LORA["q_proj"]})
    refused(LORA | {"k_proj": LORA["q_proj"]})
    refused(LORA | {"v_proj": {"A": LORA["v_proj"]["A"]}})
    refused(LORA | {"v_proj": LORA["v_proj"] | {"B": numbers(2)}})
    refused(LORA | {"v_proj": LORA["v_proj"] | {"B": numbers(1).astype(np.float64)}})
    refused(LORA | {"v_proj": LORA["v_proj"] | {"B": numbers(1).view(np.int32)}})
    refused(LORA | {"v_proj": LORA["v_proj"] | {"B": 1.0}})
    refused(LORA, UPDATE._replace(losses=np.zeros(0, np.float32)))
    refused(LORA, UPDATE._replace(client=-1))


def test_a_lora_that_flax_sends_in_pieces_comes_back(monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 20)  # a gigabyte otherwise
    _, got = messages.unpack_lora_update(messages.pack_lora_update(UPDATE, LORA), LORA)
    for name, half in LORA.items():
        for letter, leaf in half.items():
            np.testing.assert_array_equal(got[name][letter], leaf)


def test_numbers_that_do_not_go_together_are_refused():
    assert messages.unpack_start(messages.pack_start(3, 0.5)) == (3, 0.5, b"")
    assert messages.unpack_start(messages.pack_start(3, 0.5, bytes(32))) == (3, 0.5, bytes(32))
    for update in (UPDATE._replace(losses=numbers(3)), UPDATE._replace(losses=numbers(0))):
        with pytest.raises(UserError, match="projected gradients do not go with"):
            messages.unpack_update(messages.pack_update(update))
    message = messages.pack_outcome(OUTCOME, 8, 2)
    for own in (None, numbers(3)):
        with pytest.raises(UserError, match="projected gradients do not go with"):
            messages.unpack_outcome(message, 2, own)
    with pytest.raises(UserError, match="weights"):
        messages.unpack_outcome(messages.pack_outcome(OUTCOME._replace(weights=numbers(2)), 8))


def test_messages_of_another_format_version_are_refused_by_it():
    """Version 1 had the same arrays without their first entry, and the same LoRA update without its version."""
    for name, (message, unpack) in MESSAGES.items():
        if name == "ledger entry":
            continue
        content = msgpack.unpackb(message, ext_hook=msgpack.ExtType)
        for version in (1, 3):
            if isinstance(content, dict):
                other = {key: value for key, value in content.items() if key != "version"}
                other |= {"version": version} if version > 1 else {}
            else:
                other = content[1:] if version == 1 else [version, *content[1:]]
            with pytest.raises(UserError, match=f"is of format version {version}, and this release reads version 2"):
                unpack(msgpack.packb(other, use_single_float=True))


def test_messages_of_a_sum_that_do_not_go_together_are_refused():
    """Read as they were packed, and not with a client twice, another size or a share outside the field."""
    sums = secure_sum_messages
    assert sums.unpack_unmasking(sums.pack_unmasking(UNMASKING)) == UNMASKING
    assert sums.unpack_adverts(sums.pack_adverts({0: ADVERT, 300: ADVERT})) == {0: ADVERT, 300: ADVERT}
    np.testing.assert_array_equal(sums.unpack_masked(sums.pack_masked(np.arange(5)), 5), np.arange(5))
    assert sums.unpack_masked(sums.pack_ids([3, 1]), 5) == [3, 1]
    twice = b"\x82" + 2 * (b"\x07" + msgpack.packb(bytes(64)))
    for message, unpack in (
        (twice, sums.unpack_signatures),
        (sums.pack_boxes({0: bytes(93)}), sums.unpack_boxes),
        (sums.pack_unmasking(Unmasking({0: 2**256 + 297}, {})), sums.unpack_unmasking),
        (sums.pack_masked(np.arange(4)), lambda message: sums.unpack_masked(message, 5)),
        (sums.pack_advert(ADVERT._replace(signature=bytes(63))), sums.unpack_advert),
    ):
        with pytest.raises(UserError, match="is malformed"):
            unpack(message)
