"""What server and client of a deployed run send each other: the run's own messages, and what must go with them.

The server asks and a client answers, once for each request. A request has a ticket, random bytes that its answer
repeats: an answer to an earlier request is told from one to this. Everything is a msgpack array.

request   content                                                       answers
hello     the run's facts, and when all clients are known its plan      enrolment, refusal
start     what the local work of one round takes                        answer, position, refusal
sum step  what the others have sent in a step of a secure sum           answer, position, refusal
end       the last results                                              position, refusal

Whatever comes in, reading it gives values of the right types or raises ``UserError``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import msgpack
import numpy as np

from fedmezo_jax.data.buckets import Width, Widths
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.reader import ERRORS, Reader

VERSION = 2
"""Of the envelopes' format; every envelope begins with it."""
TICKET_BYTES, SUM_BYTES = 8, 16
FACTS_LENGTH = 100_000
"""Most characters of a message's facts."""
STEPS = ("share", "mask", "agree", "unmask")
"""Of a secure sum, after the first, which answers the start."""
Facts: TypeAlias = Mapping[str, Any]
"""What both sides must have alike, by its name."""


class Plan(NamedTuple):
    """What clients do alike that follows from the examples of all of them.

    Attributes:
        shape: of the table of examples.
        widths: at which steps run.
        at_once: how many copies of itself a client runs side by side, see :func:`federated.federated`.
    """

    shape: Width
    widths: Widths
    at_once: int


class Hello(NamedTuple):
    """The server's first word, to a client that it does not know or that has been restarted.

    Attributes:
        ticket: of the request.
        facts: the run's.
        plan: None until all clients are known.
    """

    ticket: bytes
    facts: Facts
    plan: Plan | None


class Result(NamedTuple):
    """What a round came to.

    Attributes:
        attempt: the one that counted.
        message: of :func:`results.pack_result`, for this client.
    """

    attempt: int
    message: bytes | None


class Progressed(NamedTuple):
    """What has happened since a client's θ.

    Attributes:
        first: round of the first of these results.
        results: of as many rounds as the client lacks.
        ledger: the whole ledger so far, for a client that cannot follow by results; else empty.
    """

    first: int
    results: list[Result]
    ledger: bytes = b""


class Start(NamedTuple):
    """The server asks for a client's work in one attempt at a round.

    Attributes:
        ticket: of the request.
        run: names the run, see :func:`agreement.run_name`.
        attempt: how often the round was tried before.
        limit: bound on projected gradients; infinite where there is none.
        step_widths: for each local step, which of the plan's widths it runs at; empty where there is one.
        chain: chain value of the ledger's header in a signed run; else empty.
        start: of :func:`messages.pack_start`.
        progressed: the results before the round.
        sum: random bytes that name the secure sum into which the work goes; empty where there is none.
    """

    ticket: bytes
    run: bytes
    attempt: int
    limit: float
    step_widths: bytes
    chain: bytes
    start: bytes
    progressed: Progressed
    sum: bytes = b""


class SumStep(NamedTuple):
    """The server asks for a client's next message in a secure sum.

    Attributes:
        ticket: of the request.
        run: as in :class:`Start`.
        sum: as in :class:`Start`.
        step: one of :data:`STEPS`.
        content: what the others have sent for it, see :mod:`secure_sum_messages`.
    """

    ticket: bytes
    run: bytes
    sum: bytes
    step: str
    content: bytes


class End(NamedTuple):
    """The server's last word: all rounds are done.

    Attributes:
        ticket: of the request.
        run: as in :class:`Start`.
        progressed: the results that the client lacks.
    """

    ticket: bytes
    run: bytes
    progressed: Progressed


class Enrolment(NamedTuple):
    """A client says what it has.

    Attributes:
        ticket: of the request.
        facts: its own.
        shape: of its table of examples.
        lengths: ``[n]`` int64, tokens of each of its examples.
        labels: ``[n]`` int64, labels of each.
        round: rounds that its θ has seen.
    """

    ticket: bytes
    facts: Facts
    shape: Width
    lengths: np.ndarray
    labels: np.ndarray
    round: int


class Answer(NamedTuple):
    """A client's work.

    Attributes:
        ticket: of the request.
        update: of :func:`messages.pack_update`; in a secure sum the client's message of the step, the first of which
            answers the start (:mod:`secure_sum_messages`).
        signature: of the update, in a signed run; else empty.
    """

    ticket: bytes
    update: bytes
    signature: bytes


class Position(NamedTuple):
    """A client says where it is.

    Attributes:
        ticket: of the request.
        round: rounds that its θ has seen; −1 where it does not know the run.
    """

    ticket: bytes
    round: int


class Refusal(NamedTuple):
    """A client cannot do what it is asked.

    Attributes:
        ticket: of the request.
        reason: why, in one line.
    """

    ticket: bytes
    reason: str


Request: TypeAlias = Hello | Start | SumStep | End
Response: TypeAlias = Enrolment | Answer | Position | Refusal


def pack(envelope: Request | Response) -> bytes:
    """An envelope as a message."""
    return cast(bytes, msgpack.packb([VERSION, type(envelope).__name__, *map(_plain, envelope)]))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype("<i4").tobytes()
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True)
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return [*map(_plain, value)] if isinstance(value, list) else value


def unpack_request(message: bytes) -> Request:
    """A request of :func:`pack`.

    Raises:
        UserError: the message is malformed, or of another version.
    """
    reader, kind = _opened(message, "the server's message")
    if kind == "Hello":
        request = Hello(_ticket(reader), _facts(reader), _plan(reader))
    elif kind == "Start":
        head = _ticket(reader), reader.value(bytes), reader.integer(), reader.value(float)
        head = *head, reader.value(bytes), reader.value(bytes), reader.value(bytes), _progressed(reader)
        request = Start(*head, _sum(reader, none=b""))
    elif kind == "SumStep":
        head = _ticket(reader), reader.value(bytes), _sum(reader), reader.value(str)
        if head[3] not in STEPS:
            raise reader.error(f"{head[3]!r:.60} is no step of a secure sum")
        request = SumStep(*head, reader.value(bytes))
    elif kind == "End":
        request = End(_ticket(reader), reader.value(bytes), _progressed(reader))
    else:
        raise reader.error(f"{kind!r:.60} is no request")
    reader.end()
    return request


def unpack_response(message: bytes) -> Response:
    """A response of :func:`pack`.

    Raises:
        UserError: the message is malformed, or of another version.
    """
    reader, kind = _opened(message, "the client's message")
    ticket = _ticket(reader)
    if kind == "Enrolment":
        facts, shape = _facts(reader), _width(reader)
        lengths, labels = (reader.vector("<i4").astype(np.int64) for _ in range(2))
        if not len(lengths) or len(lengths) != len(labels) or lengths.min() < 2 or labels.min() < 1:
            raise reader.error("its examples have no lengths")
        if lengths.max() > shape.tokens or labels.max() > shape.labels or shape.labels > shape.tokens:
            raise reader.error("an example is longer than its table")
        response = Enrolment(ticket, facts, shape, lengths, labels, reader.integer())
    elif kind == "Answer":
        response = Answer(ticket, reader.value(bytes), reader.value(bytes))
    elif kind == "Position":
        response = Position(ticket, reader.value(int))
    elif kind == "Refusal":
        response = Refusal(ticket, "".join(filter(str.isprintable, " ".join(reader.value(str)[:1000].split()))))
    else:
        raise reader.error(f"{kind!r:.60} is no response")
    reader.end()
    return response


def ticket_of(message: bytes) -> bytes:
    """The ticket of a request that was packed here."""
    return unpack_request(message).ticket


def _opened(message: bytes, what: str) -> tuple[Reader, str]:
    reader = Reader(message, what)
    if reader.array() < 3:
        raise reader.error("it is too short")
    if (version := reader.integer()) != VERSION:
        raise UserError(
            f"{what} is of format version {version}, and this release reads version {VERSION}: run the same release "
            "on both sides"
        )
    return reader, reader.value(str)


def _ticket(reader: Reader) -> bytes:
    ticket = reader.value(bytes)
    if len(ticket) != TICKET_BYTES:
        raise reader.error("its ticket is of another length")
    return ticket


def _sum(reader: Reader, none: bytes | None = None) -> bytes:
    name = reader.value(bytes)
    if len(name) != SUM_BYTES and name != none:
        raise reader.error("its secure sum has a name of another length")
    return name


def _facts(reader: Reader) -> Facts:
    text = reader.value(str)
    try:
        facts = json.loads(text)
    except (*ERRORS, RecursionError):
        facts = None
    if not isinstance(facts, dict) or any(isinstance(value, dict | list) for value in facts.values()):
        raise reader.error("its facts are no flat object")
    if len(text) > FACTS_LENGTH or not all(map(_is_plain, [*facts, *facts.values()])):
        raise reader.error("its facts are no plain text")
    return facts


def _is_plain(value: Any) -> bool:
    """Whether a value can be shown to the user: no control characters, nothing that has no encoding."""
    return not isinstance(value, str) or value.isprintable()


def _width(reader: Reader) -> Width:
    reader.array(len(Width._fields))
    return Width(reader.integer(), reader.integer())


def _plan(reader: Reader) -> Plan | None:
    if not reader.at_array():
        return reader.value(type(None))
    reader.array(len(Plan._fields))
    shape, widths = _width(reader), tuple(_width(reader) for _ in range(reader.array()))
    if not widths:
        raise reader.error("its plan has no widths")
    return Plan(shape, widths, reader.integer())


def _progressed(reader: Reader) -> Progressed:
    reader.array(len(Progressed._fields))
    first = reader.integer()
    return Progressed(first, [_result(reader) for _ in range(reader.array())], reader.value(bytes))


def _result(reader: Reader) -> Result:
    reader.array(len(Result._fields))
    return Result(reader.integer(), reader.value(bytes, type(None)))
