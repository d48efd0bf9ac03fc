"""Whatever comes in, decoding it gives values of the right types or the one error, in memory of the message's order."""

import json
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_jax.data.buckets import Width
from fedmezo_jax.deploy import envelopes
from fedmezo_jax.deploy.envelopes import (
    Answer,
    End,
    Enrolment,
    Hello,
    Plan,
    Position,
    Progressed,
    Refusal,
    Result,
    Start,
    SumStep,
)
from fedmezo_jax.errors import UserError

TICKET, FACTS = b"a ticket", {"jax": "0.10", "--seed": 0, "--deadline": None, "--clip": 0.5}
PLAN = Plan(Width(64, 32), (Width(16, 8), Width(64, 32)), 2)
PROGRESSED = Progressed(3, [Result(0, b"mean"), Result(1, None)], b"ledger")
REQUESTS = [
    Hello(TICKET, FACTS, None),
    Hello(TICKET, FACTS, PLAN),
    Start(TICKET, b"r" * 16, 1, float("inf"), b"\0\1", b"chain", b"start", PROGRESSED),
    Start(TICKET, b"r" * 16, 1, 0.5, b"", b"", b"start", PROGRESSED, b"s" * 16),
    SumStep(TICKET, b"r" * 16, b"s" * 16, "agree", b"clients"),
    End(TICKET, b"r" * 16, PROGRESSED),
]
RESPONSES = [
    Enrolment(TICKET, FACTS, Width(64, 32), np.array([5, 60]), np.array([1, 9]), 4),
    Answer(TICKET, b"update", b"signature"),
    Position(TICKET, -1),
    Refusal(TICKET, "why"),
]
HEADS = [bytes([code]) + b"\xff" * 8 for code in (0xC6, 0xC9, 0xCB, 0xCE, 0xCF, 0xD3, 0xDB, 0xDD, 0xDF)]
"""Of msgpack's bytes, extensions, numbers, text, arrays and maps, of lengths beyond any message."""
KINDS = {"request": (REQUESTS, envelopes.unpack_request), "response": (RESPONSES, envelopes.unpack_response)}
either = pytest.mark.parametrize("kind", KINDS)


def is_text(value):
    """Whether all text in it can be written to a file and shown in a line."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return all(map(is_text, parts)) and (not isinstance(value, str) or value.isprintable() or not value)


def decode(unpack, message):
    """What the message decodes to, whose text can be shown, or the error, which is one line."""
    try:
        value = unpack(message)
    except UserError as error:
        value = (str(error),)
    assert is_text(value)
    return value


def same(one, other):
    return all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in zip(one, other, strict=True)
    ) and type(one) is type(other)


@either
def test_a_valid_message_is_read_as_it_was_packed(kind):
    envelopes_of_kind, unpack = KINDS[kind]
    for envelope in envelopes_of_kind:
        assert same(unpack(envelopes.pack(envelope)), envelope)


@either
@given(message=st.binary(max_size=200))
def test_any_bytes(kind, message):
    decode(KINDS[kind][1], message)


@st.composite
def mutations(draw, kind):
    """A valid message with one to three pieces cut out, put in or changed."""
    message = envelopes.pack(draw(st.sampled_from(KINDS[kind][0])))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(message)))
        end = draw(st.integers(at, min(at + 12, len(message))))
        piece = draw(st.sampled_from(HEADS) | st.binary(max_size=4) | st.just(message))
        message = message[:at] + piece + message[end:]
    return message


@either
@given(data=st.data())
def test_any_change_of_a_valid_message(kind, data):
    decode(KINDS[kind][1], data.draw(mutations(kind)))


@given(name=st.sampled_from([*(type(each).__name__ for each in REQUESTS + RESPONSES), "Other"]), data=st.data())
def test_any_fields_behind_a_valid_head(name, data):
    values = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
    values = st.recursive(values, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
    fields = data.draw(st.lists(values, max_size=8))
    for _, unpack in KINDS.values():
        decode(unpack, msgpack.packb([envelopes.VERSION, name, TICKET, *fields]))


@pytest.mark.parametrize("changed", [{"step": "advertise"}, {"step": "begin"}, {"sum": bytes(15)}, {"sum": b""}])
def test_steps_that_a_sum_does_not_have_are_refused(changed):
    with pytest.raises(UserError, match="is malformed"):
        envelopes.unpack_request(envelopes.pack(REQUESTS[-2]._replace(**changed)))


@pytest.mark.parametrize(
    "facts",
    [
        *('{"a": "\\ud800"}', '{"\\ud800": 1}', '{"a": "\\n"}', '{"a": "\\u001b[2J"}', '{"a": [1]}', "[1]", "1", "{"),
        *("[" * 100_000, json.dumps({"a": "x" * envelopes.FACTS_LENGTH}), '{"a": ' + "1" * 9000 + "}"),
    ],
)
def test_facts_that_cannot_be_shown_are_refused(facts):
    head = [envelopes.VERSION, "Enrolment", TICKET, facts, [8, 8], bytes(4), bytes(4), 0]
    with pytest.raises(UserError, match="its facts are no"):
        envelopes.unpack_response(msgpack.packb(head))


@either
def test_declared_sizes_take_no_memory(kind):
    """A head that declares four billion entries, at each place of each message."""
    messages, unpack = KINDS[kind]
    packed = [envelopes.pack(message) for message in messages]
    tracemalloc.start()
    for message in packed:
        for place in range(len(message)):
            for head in HEADS:
                decode(unpack, message[:place] + head + message[place:])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
