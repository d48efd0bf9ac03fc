"""Requests to clients, and their answers: each request has a ticket, and an answer counts once, for its own request."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedmezo_jax.deploy import agreement, envelopes
from fedmezo_jax.deploy.envelopes import Answer, Enrolment, Facts, Hello, Plan, Position, Refusal, Request
from fedmezo_jax.deploy.transport import Transport
from fedmezo_jax.errors import UserError

_AGAIN, _ABSENT = 30.0, 2.0
"""Seconds after which a client is greeted again that has not enrolled; and one that the network cannot reach."""
_TRIES = 4
"""How often a client is sent a request again that it could not answer yet."""


class Post:
    """Asks clients and collects their answers, each once.

    Attributes:
        facts: the run's.
        plan: the run's; None until all clients are known.
        enrolments: what clients enrolled with; empty until all are known.
    """

    def __init__(self, transport: Transport, facts: Facts, notify: Callable[[str], None]):
        """Sends nothing yet."""
        self.facts = facts
        self.plan: Plan | None = None
        self.enrolments: Sequence[Enrolment] = ()
        self.run = agreement.run_name(facts)
        self._transport, self._notify = transport, notify

    def ask(
        self,
        requests: Mapping[int, Callable[[int | None], Request]],
        seconds: float,
        wanted: Callable[[envelopes.Response], bool],
    ) -> dict[int, Any]:
        """Sends each client its request and waits until all have answered, at most so many seconds.

        A client that does not know the run is greeted first, and one that is behind is sent the request again.

        Args:
            requests: for each client what makes its request from the number of rounds that its θ has seen: None where
                the server's own knowledge must do.
            seconds: until answers are no longer waited for.
            wanted: whether an answer is what was asked for.

        Returns:
            The answers that came in, by client.
        """
        until, answers, tries = self._transport.clock() + seconds, {}, dict.fromkeys(requests, 0)
        pending: dict[bytes, int] = {}

        def send(client: int, request: Request) -> None:
            tries[client] += 1
            if tries[client] <= _TRIES:
                pending[request.ticket] = client
                self._transport.send(client, envelopes.pack(request))

        for client, make in requests.items():
            send(client, make(None))
        while pending and (left := until - self._transport.clock()) > 0:
            for client, request, message in self._transport.poll(left):
                ticket = envelopes.ticket_of(request)
                if pending.get(ticket) != client:
                    continue  # an answer to an earlier request, or a second one
                del pending[ticket]
                response = None if message is None else self._read(client, ticket, message)
                if response and wanted(response):
                    answers[client] = response
                elif isinstance(response, Position):
                    send(client, self.hello() if response.round < 0 else requests[client](response.round))
                elif isinstance(response, Enrolment) and self._is_enrolled(client, response):
                    send(client, requests[client](response.round))
                elif isinstance(response, Refusal):
                    self._tell(f"client {client} refuses: {response.reason}")
        return answers

    def hello(self) -> Hello:
        """A greeting."""
        return Hello(ticket(), self.facts, self.plan)

    def _tell(self, line: str) -> None:
        self._notify(f"notice: {line}")

    def _read(self, client: int, ticket: bytes, message: bytes) -> envelopes.Response:
        """A response; one that cannot be read is an answer that cannot be read."""
        try:
            response = envelopes.unpack_response(message)
            if response.ticket == ticket:
                return response
            self._tell(f"client {client}: its message answers another request")
        except UserError as error:
            self._tell(f"client {client}: {error}")
        return Answer(ticket, b"", b"")

    def _is_enrolled(self, client: int, enrolment: Enrolment) -> bool:
        """Whether a client that is greeted again is the one that it was."""
        if wrong := self._fault(client, enrolment, self.enrolments[client]):
            self._tell(wrong)
        return not wrong

    def _fault(self, client: int, enrolment: Enrolment, before: Enrolment) -> str | None:
        if wrong := agreement.difference(self.facts, enrolment.facts, f"client {client}"):
            return wrong
        if enrolment.shape.tokens > (most := self.facts["--max-length"]):
            return f"client {client} has a table of examples that is wider than --max-length {most}"
        same = all(np.array_equal(*pair) for pair in zip(enrolment[2:5], before[2:5], strict=True))
        return None if same else f"client {client} has other examples than it enrolled with"

    def enrol(self, clients: int, seconds: float) -> list[Enrolment]:
        """Greets all clients until each has said what it has.

        A greeting keeps its ticket when it is sent again, so that a slow answer to the first one counts. The server
        waits twice as long each time: where many clients share a machine, answers take longer than that.

        Raises:
            UserError: one differs from the server, refuses, or does not answer.
        """
        until, clock = self._transport.clock() + seconds, self._transport.clock
        greetings = [self.hello() for _ in range(clients)]
        due, pause = dict.fromkeys(range(clients), clock()), dict.fromkeys(range(clients), _AGAIN)
        answers: dict[int, Enrolment] = {}
        while due:
            if clock() >= until:
                names = ", ".join(map(str, due))
                raise UserError(f"client {names} did not enrol within {seconds:g} s: start it, and try again")
            for client in [client for client, when in due.items() if when <= clock()]:
                self._transport.send(client, envelopes.pack(greetings[client]))
                due[client], pause[client] = clock() + pause[client], 2 * pause[client]
            for client, request, message in self._transport.poll(max(0.0, min(until, *due.values()) - clock())):
                ticket = envelopes.ticket_of(request)
                if client not in due or ticket != greetings[client].ticket:
                    continue
                response = None if message is None else self._read(client, ticket, message)
                if isinstance(response, Refusal):
                    raise UserError(f"client {client} refuses: {response.reason}")
                if isinstance(response, Enrolment):
                    answers[client] = response
                    del due[client]
                else:
                    due[client], pause[client] = clock() + _ABSENT, _AGAIN
        for client, enrolment in sorted(answers.items()):
            before = self.enrolments[client] if self.enrolments else enrolment
            if wrong := self._fault(client, enrolment, before):
                raise UserError(wrong)
        return [answers[client] for client in range(clients)]


def is_a(kind: type) -> Callable[[envelopes.Response], bool]:
    """Whether a response is of this kind, for :meth:`Post.ask`."""
    return lambda response: isinstance(response, kind)


def ticket() -> bytes:
    """A new one."""
    return os.urandom(envelopes.TICKET_BYTES)
