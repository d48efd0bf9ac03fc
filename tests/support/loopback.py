"""Deployed runs in this process, over a transport that can lose, delay, repeat and reorder messages."""

import heapq
import itertools
from collections import Counter

from fedmezo_jax.deploy.client import Client
from fedmezo_jax.deploy.examples import read_own
from fedmezo_jax.deploy.server import Patience, serve
from fedmezo_jax.deploy.transport import Reply
from fedmezo_jax.run import client_failures, signatures
from fedmezo_jax.run.job import fine_tune

PATIENCE = Patience(enrolment=100.0, round=10.0, sum_step=10.0)


class Loopback:
    """A :class:`~fedmezo_jax.deploy.transport.Transport` to objects with a method ``handle``, on a clock of its own.

    ``fault(client, request)`` says what becomes of a request: None lets it be answered promptly. Otherwise it is a list
    with a pair of delays in seconds, there and back, for each copy of the request; a delay of None loses it there.
    """

    def __init__(self, clients, fault=lambda client, request: None):
        self.clients, self.fault = clients, fault
        self.handled, self._now = Counter(), 0.0
        self._order, self._queue = itertools.count(), []

    def _put(self, delay, event):
        if delay is not None:
            heapq.heappush(self._queue, (self._now + delay, next(self._order), event))

    def send(self, client, request):
        for there, back in self.fault(client, request) or [(0.0, 0.0)]:
            self._put(there, lambda back=back: self._deliver(client, request, back))

    def _deliver(self, client, request, back):
        self.handled[client] += 1
        reply = Reply(client, request, self.clients[client].handle(request))
        self._put(back, lambda: reply)

    def poll(self, seconds):
        until = self._now + seconds
        while self._queue and self._queue[0][0] <= until:
            due, _, event = heapq.heappop(self._queue)
            self._now = max(self._now, due)
            if reply := event():
                return [reply]
        self._now = until
        return []

    def clock(self):
        return self._now


def keys_of(config):
    """Everyone's, where the run takes any."""
    return signatures.simulated_keys(config) if config.signed or config.secure_sum else None


def client_of(config, data, client, **options):
    """A client with its own file of those that were dealt out."""
    own = read_own(config, [data / f"client-{client}.jsonl"])
    keys, known = keys_of(config), ()
    if keys and config.secure_sum:
        known = signatures.clients_of(signatures.identities(keys))
    return Client(client, own, keys and keys.clients[client], known, **{"seeded_noise": True} | options)


def quiet(line):
    pass


def deployed(config, data, out, transport=None, **options):
    """A whole run; by default with clients that are made here. Returns the result and the transport."""
    if transport is None:
        transport = Loopback([client_of(config, data, client) for client in range(config.clients)])
    files = [file for name in ("test", "validation") if (file := data / f"{name}.jsonl").exists()]
    keys = keys_of(config)
    keys = keys and signatures.server_keys(keys)
    settings = {"exact": True, "seeded_noise": True, "patience": PATIENCE, "notify": quiet, "keys": keys}
    return serve(config, out, transport, files, **settings | options), transport


def simulated_without(config, dropped, out, monkeypatch):
    """The simulation in which the clients of ``dropped``, pairs of (round, attempt) and client, drop out."""

    def absent(seed, t, attempt, *rest):
        return {client: client_failures.DROPPED for at, client in dropped if at == (t, attempt)}

    with monkeypatch.context() as patch:
        patch.setattr(client_failures, "absent", absent)
        return fine_tune(config, out, check_rate=False, notify=quiet)


def without_seconds(records):
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


def check_same(one, other, folder, other_folder):
    """Two runs left the same, bit for bit."""
    for name in ("run.ledger", "config.json", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (other_folder / name).read_bytes(), name
    assert without_seconds(one.metrics) == without_seconds(other.metrics)
    assert (one.loss_before, one.loss_after) == (other.loss_before, other.loss_after)
