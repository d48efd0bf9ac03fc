"""The server's part in a secure sum of a deployed run (:mod:`secure_sum`): it passes on what clients send each other.

A client that is silent in a step, or sends what does not fit, is left out from there on. Before its masked vector has
come in it is not in the sum; afterwards it is, and the others' shares do in its place. With fewer clients than the
threshold there is no sum, and the server has learnt nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fedmezo_jax.deploy import envelopes
from fedmezo_jax.deploy.agreement import sum_name
from fedmezo_jax.deploy.envelopes import Answer, Refusal, SumStep
from fedmezo_jax.deploy.post import Post, ticket
from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import fixed_point, secure_sum
from fedmezo_jax.privacy.secure_sum import Advert, Unmasking
from fedmezo_jax.run import client_failures
from fedmezo_jax.run import secure_sum_messages as sum_messages
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.rounds import Summed

T = TypeVar("T")


def new_name() -> bytes:
    """The name of a new sum."""
    return os.urandom(envelopes.SUM_BYTES)


class _TooFew(Exception):
    """Fewer clients are left than the threshold."""


class _Steps(NamedTuple):
    """The steps of one sum.

    Attributes:
        post: reaches the clients.
        notify: called with what a client has done wrong.
        name: of the sum.
        threshold: how many clients must stay.
        seconds: how long to wait in a step after the first.
        failed: the clients that were left out so far, and why.
    """

    post: Post
    notify: Callable[[str], None]
    name: bytes
    threshold: int
    seconds: float
    failed: dict[int, str]

    def ask(self, step: str, contents: Mapping[int, bytes], read: Callable[[int, bytes], T]) -> dict[int, T]:
        """A step after the first: what each client sends for its content."""

        def request_of(content: bytes) -> Callable[[int | None], SumStep]:
            return lambda seen: SumStep(ticket(), self.post.run, self.name, step, content)

        return self.collect({id: request_of(content) for id, content in contents.items()}, self.seconds, read)

    def collect(self, requests: Mapping[int, Any], seconds: float, read: Callable[[int, bytes], T]) -> dict[int, T]:
        """What those send whose messages can be read, by client; the others have failed."""
        answers, good = self.post.ask(requests, seconds, _ends_a_step), {}
        for id in requests:
            answer = answers.get(id)
            if not isinstance(answer, Answer):
                self.failed[id] = answer.reason if answer else client_failures.DROPPED
                continue
            try:
                good[id] = read(id, answer.update)
            except UserError as error:
                self.notify(f"notice: client {id}: {error}")
                self.failed[id] = client_failures.MALFORMED
        return good

    def check(self, clients: Sequence[int] | Mapping[int, Any]) -> None:
        """Raises :class:`_TooFew`, if so few clients are too few."""
        if len(clients) < self.threshold:
            raise _TooFew


def _ends_a_step(response: envelopes.Response) -> bool:
    """Whether it is a client's message of a step, or its word that its numbers are of no use."""
    return isinstance(response, Answer) or (
        isinstance(response, Refusal) and response.reason in client_failures.UNUSABLE
    )


def secure_sum_of(
    config: RunConfig,
    post: Post,
    notify: Callable[[str], None],
    starts: Mapping[int, Callable[[int | None], envelopes.Start]],
    at: tuple[int, int],
    name: bytes,
    public_keys: Sequence[bytes],
    patience: tuple[float, float],
) -> Summed:
    """The sum of the numbers of the clients that have worked and stayed.

    Args:
        config: the run's.
        post: reaches the clients.
        notify: called with what a client has done wrong.
        starts: makes the request for its work, for each client of the round.
        at: round and attempt.
        name: of the sum, as the starts have it.
        public_keys: of each client's identity, by client.
        patience: seconds to wait for the work, and in each step after it.
    """
    steps = _Steps(post, notify, name, config.threshold, patience[1], {})
    round_name, identities = sum_name(post.run, name, *at), {id: public_keys[id] for id in starts}

    def advert_of(id: int, message: bytes) -> Advert:
        advert = sum_messages.unpack_advert(message)
        secure_sum.check_advert(round_name, identities, id, advert)
        secure_sum.check_keys(advert)
        return advert

    def boxes_of(id: int, message: bytes) -> dict[int, bytes]:
        boxes = sum_messages.unpack_boxes(message)
        if boxes.keys() != adverts.keys():
            raise UserError("its shares are not for the clients of this sum")
        return boxes

    def signature_of(id: int, message: bytes) -> bytes:
        signature = sum_messages.unpack_signature(message)
        if not secure_sum.agrees(round_name, identities[id], arrived, signature):
            raise UserError("its signature is not of the list of clients that are summed")
        return signature

    def unmasking_of(id: int, message: bytes) -> Unmasking:
        unmasking = sum_messages.unpack_unmasking(message)
        if unmasking.seeds.keys() != masked.keys() or unmasking.keys.keys() != set(shared) - masked.keys():
            raise UserError("its shares are not those of the clients of this sum")
        return unmasking

    try:
        adverts = steps.collect(starts, patience[0], advert_of)
        steps.check(adverts)
        boxes = steps.ask("share", dict.fromkeys(adverts, sum_messages.pack_adverts(adverts)), boxes_of)
        steps.check(boxes)
        shared, masked = _masked(steps, boxes, config.local_steps * config.sent_directions)
        steps.check(masked)
        arrived, failed = sorted(masked), dict(steps.failed)  # who is silent from here on is in the sum
        signatures = steps.ask("agree", dict.fromkeys(arrived, sum_messages.pack_ids(arrived)), signature_of)
        steps.check(signatures)
        for_all = sum_messages.pack_signatures(signatures)
        unmaskings = steps.ask("unmask", dict.fromkeys(signatures, for_all), unmasking_of)
        steps.check(unmaskings)
        total = secure_sum.total(round_name, config.threshold, adverts, shared, masked, unmaskings)
    except _TooFew:
        return Summed(None, steps.failed)
    except UserError as error:
        notify(f"notice: round {at[0] + 1}: there is no sum: {error}")
        return Summed(None, steps.failed)
    return Summed(fixed_point.decode(total), failed)


def _masked(
    steps: _Steps, boxes: Mapping[int, Mapping[int, bytes]], size: int
) -> tuple[list[int], dict[int, np.ndarray]]:
    """Whose shares are with the others, and the masked vectors.

    Clients that cannot read someone's shares send no vector and name that client. Where too few vectors have come in
    for it, those are asked again without the clients that they have named.
    """

    def ask(ids: Iterable[int], shared: Sequence[int]) -> tuple[dict[int, np.ndarray], dict[int, list[int]]]:
        contents = {id: sum_messages.pack_boxes({sender: boxes[sender][id] for sender in shared}) for id in ids}
        told = steps.ask("mask", contents, lambda id, message: sum_messages.unpack_masked(message, size))
        masked = {id: each for id, each in told.items() if isinstance(each, np.ndarray)}
        named = {id: each for id, each in told.items() if isinstance(each, list)}
        for id, others in named.items():
            steps.failed[id] = client_failures.DROPPED
            steps.notify(f"notice: client {id} cannot read the shares of client {', '.join(map(str, others))}")
        return masked, named

    shared = sorted(boxes)
    masked, named = ask(shared, shared)
    if named and len(masked) < steps.threshold:
        accused = {id for others in named.values() for id in others if id in boxes}
        steps.failed.update(dict.fromkeys(masked, client_failures.DROPPED))  # their vectors have masks of the accused
        steps.failed.update(dict.fromkeys(accused, client_failures.MALFORMED))
        shared = [id for id in shared if id not in accused]
        again = named.keys() - accused
        for id in again:
            del steps.failed[id]
        masked, _ = ask(sorted(again), shared)
    return shared, masked
