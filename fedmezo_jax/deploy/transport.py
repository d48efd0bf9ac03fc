"""The seam for networks: what a deployed run asks of whatever carries its messages."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Reply(NamedTuple):
    """What came back from a client.

    Attributes:
        client: whose it is, as the transport knows and not as the message says.
        request: the message that it answers.
        message: the answer; None where the transport knows that there will be none.
    """

    client: int
    request: bytes
    message: bytes | None


class Transport(Protocol):
    """Carries requests to clients and their replies back.

    It may lose, delay, repeat and reorder messages. It must know who sent a reply, and keep others from reading and
    changing messages.
    """

    def send(self, client: int, request: bytes) -> None:
        """Sends a request on its way; does not wait."""
        ...

    def poll(self, seconds: float) -> list[Reply]:
        """The replies that have come in, as soon as there are any and after so many seconds at the latest."""
        ...

    def clock(self) -> float:
        """The time in seconds from any start, by which deadlines go."""
        ...
