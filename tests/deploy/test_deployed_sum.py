"""Deployed runs with a secure sum over a network that fails, among clients that lie, with a server that is stopped."""

import os

import numpy as np
import pytest
import small_run
from loopback import Loopback, check_same, client_of, deployed, quiet
from sum_parties import Parties

from fedmezo_jax.deploy import envelopes
from fedmezo_jax.deploy.agreement import sum_name
from fedmezo_jax.deploy.client import Client
from fedmezo_jax.deploy.envelopes import Answer, Start, SumStep
from fedmezo_jax.deploy.examples import deal_out, read_own
from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import fixed_point, secure_sum
from fedmezo_jax.run import client_failures, ledger, loop, messages, rounds, secure_sum_messages
from fedmezo_jax.run.client_failures import DROPPED, MALFORMED, NOT_FINITE, TOO_FEW
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.replay import largest_difference, replay

CLIENTS, THRESHOLD = 4, 3
BEFORE_THE_VECTOR = ("start", "share", "mask")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "sum") as folder:
        deal_out(configuration(folder), folder / "dealt")
        yield folder


def configuration(place, **changed):
    given = {"clients": CLIENTS, "directions_shared": True, "secure_sum": True}
    return small_run.configuration(place, **given | changed)


def parties(config, place):
    return [client_of(config, place / "dealt", client) for client in range(CLIENTS)]


class Steps:
    """Tells of each request its round, attempt and step."""

    def __init__(self):
        self.rounds = {}

    def __call__(self, request):
        """``(round, attempt, step)``; None of a request outside of a sum."""
        request = envelopes.unpack_request(request)
        if isinstance(request, Start):
            self.rounds[request.sum] = messages.unpack_start(request.start)[0], request.attempt
            return *self.rounds[request.sum], "start"
        return (*self.rounds[request.sum], request.step) if isinstance(request, SumStep) else None


def simulated(config, failed, out, monkeypatch):
    """The simulation in which clients fail; ``failed`` has a reason by (round, attempt) and client."""

    def absent(seed, t, attempt, *rest):
        return {client: why for (at, client), why in failed.items() if at == (t, attempt)}

    with monkeypatch.context() as patch:
        patch.setattr(client_failures, "absent", absent)
        return fine_tune(config, out, check_rate=False, notify=quiet)


def failures(folder):
    """Who failed by a ledger and why, by (round, attempt) and client; not who was one of too few."""
    entries = ledger.entries(folder / "run.ledger")
    events = [((entry.round, attempt), client, why) for entry in entries for attempt, client, why in entry.failed]
    return {(at, client): why for at, client, why in events if why != TOO_FEW}


def check(config, transport, place, folder, monkeypatch, expected, **options):
    """A deployed run is the simulation in which ``expected`` failed, and each client follows it."""
    result, _ = deployed(config, place / "dealt", folder / "deployed", transport, **options)
    assert failures(folder / "deployed") == expected
    same = simulated(config, expected, folder / "simulated", monkeypatch)
    check_same(result, same, folder / "deployed", folder / "simulated")
    for client in transport.clients:
        assert largest_difference(client.params, result.params) is None
    return result


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("how", [{}, {"signed": True, "dp_epsilon": 8.0}], ids=["plain", "signed, with noise"])
def test_lost_late_repeated_and_reordered_messages(how, seed, place, tmp_path, monkeypatch):
    """Who is lost before its vector has come in is not in the sum; who is lost later is."""
    config, step_of, draw = configuration(place, attempts=20, rounds=5, **how), Steps(), np.random.default_rng(seed)
    before, after = {}, {}  # who is lost, by attempt

    def fault(client, request):
        delay = draw.uniform(0, 0.9, (3, 2)).tolist()
        if not (at := step_of(request)):
            return delay[: draw.integers(1, 4)]
        *attempt, step = at
        lost = before.setdefault(tuple(attempt), []), after.setdefault(tuple(attempt), [])
        kind = draw.choice(["fine", "twice", "lost", "answer lost", "late", "answer late"], p=[0.35, 0.45, *[0.05] * 4])
        if kind not in ("fine", "twice"):
            if step not in BEFORE_THE_VECTOR and sum(map(len, lost)) == CLIENTS - THRESHOLD:
                return delay[:1]  # without a sum that some have helped with they would help with no other
            lost[step not in BEFORE_THE_VECTOR].append(client)
        return {
            "fine": delay[:1],
            "twice": delay,
            "lost": [(None, 0.0)],
            "answer lost": [(0.0, None)],
            "late": [(11.0, 0.1)],
            "answer late": [(0.1, 11.0)],
        }[kind]

    transport = Loopback(parties(config, place), fault)
    result, _ = deployed(config, place / "dealt", tmp_path / "deployed", transport)
    expected = {(attempt, client): DROPPED for attempt, lost in before.items() for client in lost}
    assert failures(tmp_path / "deployed") == expected
    assert any(after.values())
    same = simulated(config, expected, tmp_path / "simulated", monkeypatch)
    check_same(result, same, tmp_path / "deployed", tmp_path / "simulated")
    for client in transport.clients:
        assert largest_difference(client.params, result.params) is None


ORDER = ("start", *envelopes.STEPS)


@pytest.mark.parametrize("how", ["request lost", "answer lost", "restarted"])
def test_a_client_that_goes_in_each_of_the_steps(how, place, tmp_path, monkeypatch):
    """In round t one goes in step t. A client that is restarted has lost its secrets, and is back in the next round."""
    config, step_of, lines = configuration(place, rounds=len(ORDER)), Steps(), []

    def fault(client, request):
        at = step_of(request)
        if at is None or (at[2], client) != (ORDER[at[0]], at[0] % CLIENTS):
            return None
        if how == "restarted":
            if transport.clients[client].rounds:  # not a second time when it is asked again
                transport.clients[client] = client_of(config, place / "dealt", client)
            return None
        return [(None, 0.0) if how == "request lost" else (0.0, None)]

    transport = Loopback(parties(config, place), fault)
    gone = {((t, 0), t): DROPPED for t in range(3)}
    if how == "restarted":
        del gone[(0, 0), 0]  # before the first round there is nothing to lose
    check(config, transport, place, tmp_path, monkeypatch, gone, notify=lines.append)
    if how == "restarted":
        assert sum("the secrets of this sum are gone" in line for line in lines) == 4


def test_too_few_in_the_end_is_a_round_that_is_tried_again(place, tmp_path, monkeypatch):
    """Of four clients two drop out of the first attempt, at any steps before the sum is made."""
    config, step_of = configuration(place, rounds=3), Steps()
    lost = {(0, 0, "start"): [2, 3], (1, 0, "mask"): [0, 1], (2, 0, "share"): [1], (2, 0, "agree"): [3]}
    transport = Loopback(
        parties(config, place), lambda client, at: [(None, 0.0)] if client in lost.get(step_of(at), []) else None
    )
    expected = {(at[:2], client): DROPPED for at, clients in lost.items() for client in clients}
    check(config, transport, place, tmp_path, monkeypatch, expected)


class Liar:
    """Stands before a client: in round t its answers to one step are changed by the t-th lie."""

    def __init__(self, client, lies):
        self.client, self.lies, self.step_of = client, lies, Steps()

    def __getattr__(self, name):
        return getattr(self.client, name)

    def handle(self, request):
        answer, at = self.client.handle(request), self.step_of(request)
        if not at or self.lies[at[0]][0] != at[2]:
            return answer
        if not isinstance(said := envelopes.unpack_response(answer), Answer):
            return answer
        lie = self.lies[at[0]][1](self.client, envelopes.unpack_request(request), said)
        return lie if isinstance(lie, bytes) else envelopes.pack(said._replace(update=lie[0]))


def other_keys(client, request, said):
    advert = secure_sum_messages.unpack_advert(said.update)
    return (secure_sum_messages.pack_advert(advert._replace(masking=os.urandom(32))),)


def keys_of_low_order(client, request, said):
    keys = secure_sum_messages.unpack_advert(said.update).encryption, bytes(32)
    name = sum_name(client._run, request.sum, messages.unpack_start(request.start)[0], request.attempt)
    signature = client._signing_key.sign(secure_sum._statement(b"keys", name, *keys))
    return (secure_sum_messages.pack_advert(secure_sum.Advert(*keys, signature)),)


def random_boxes(client, request, said):
    boxes = secure_sum_messages.unpack_boxes(said.update)
    return (secure_sum_messages.pack_boxes({id: os.urandom(94) for id in boxes}),)


def one_box_missing(client, request, said):
    boxes = secure_sum_messages.unpack_boxes(said.update)
    del boxes[0]
    return (secure_sum_messages.pack_boxes(boxes),)


def shares_of_others(client, request, said):
    seeds, _ = secure_sum_messages.unpack_unmasking(said.update)
    return (secure_sum_messages.pack_unmasking(secure_sum.Unmasking({}, seeds)),)


def garbage(client, request, said):
    return b"\x93\x02garbage"


LIES = [
    ("start", garbage, True),
    ("start", other_keys, True),
    ("start", keys_of_low_order, True),
    ("share", garbage, True),
    ("share", random_boxes, True),
    ("share", one_box_missing, True),
    ("mask", garbage, True),
    ("mask", lambda *_: (secure_sum_messages.pack_masked(np.zeros(2)),), True),
    ("mask", lambda *_: (secure_sum_messages.pack_ids([0, 2, 3]),), DROPPED),
    ("agree", garbage, False),
    ("agree", lambda *_: (secure_sum_messages.pack_signature(bytes(64)),), False),
    ("unmask", garbage, False),
    ("unmask", shares_of_others, False),
]
"""The step, the lie, and whether its teller is then left out of the sum."""


def test_a_client_that_lies_in_each_of_the_steps_is_left_out_alone(place, tmp_path, monkeypatch):
    config, lines = configuration(place, rounds=len(LIES)), []
    clients = parties(config, place)
    clients[1] = Liar(clients[1], LIES)
    whys = {True: MALFORMED, DROPPED: DROPPED}
    expected = {((t, 0), 1): whys[out] for t, (_, _, out) in enumerate(LIES) if out}
    check(config, Loopback(clients), place, tmp_path, monkeypatch, expected, notify=lines.append)
    named = [line for line in lines if line.startswith("notice: client 1")]
    assert sum("malformed" in line for line in named) == 6
    for line in (
        "client 1: the keys of client 1 are not signed by it",
        "client 1: a client's key is a point of low order, with which no secret can be agreed",
        "client 0 cannot read the shares of client 1",
        "client 1: its shares are not for the clients of this sum",
        "client 1 cannot read the shares of client 0, 2, 3",
        "client 1: its signature is not of the list of clients that are summed",
        "client 1: its shares are not those of the clients of this sum",
    ):
        assert f"notice: {line}" in lines


def test_numbers_of_no_use_are_left_out_by_their_own_client(place, tmp_path, monkeypatch):
    """It alone can see them, and says as much as the server would have found in a simulation."""
    config, private_update = configuration(place, rounds=2), rounds.private_update

    def bad(config, update, attempt, noise):
        if (update.round, update.client) == (1, 2):
            update = update._replace(projected_gradients=update.projected_gradients * np.float32(np.nan))
        return private_update(config, update, attempt, noise)

    monkeypatch.setattr(rounds, "private_update", bad)
    result, _ = deployed(config, place / "dealt", tmp_path / "deployed", Loopback(parties(config, place)))
    assert failures(tmp_path / "deployed") == {((1, 0), 2): NOT_FINITE}
    same = fine_tune(config, tmp_path / "simulated", check_rate=False, notify=quiet)
    check_same(result, same, tmp_path / "deployed", tmp_path / "simulated")


@pytest.mark.parametrize("secret", [True, False])
def test_the_server_sees_no_client_s_numbers_or_losses(secret, place, tmp_path, monkeypatch):
    """In none of the messages; without the sum they are there."""
    config = configuration(place, rounds=2, secure_sum=secret)
    updates, sent, private_update = [], [], rounds.private_update
    monkeypatch.setattr(rounds, "private_update", lambda *given: updates.append(given[1]) or private_update(*given))
    clients = parties(config, place)
    for client in clients:
        handle = client.handle
        client.handle = lambda request, handle=handle: sent.append(handle(request)) or sent[-1]
    deployed(config, place / "dealt", tmp_path / "run", Loopback(clients))
    assert len(updates) == 2 * CLIENTS
    transcript = b"".join(sent)
    for update in updates:
        numbers = update.projected_gradients.ravel()
        secrets = [*numbers, *update.losses, *fixed_point.encode(numbers, CLIENTS)]
        assert [bytes(number.tobytes()) in transcript for number in secrets[:6]] == [not secret] * 6
        assert not any(number.tobytes() in transcript for number in secrets[6:])
    for entry in ledger.entries(tmp_path / "run" / "run.ledger"):
        assert [update is None for update in entry.updates] == [secret] * CLIENTS


@pytest.mark.parametrize("restarted", [False, True], ids=["clients went on", "all were restarted"])
def test_a_server_that_is_stopped_with_the_sum_in_hand_goes_on(restarted, place, tmp_path, monkeypatch):
    """The clients have helped with the sum of this round and help with the same once more."""
    config = configuration(place, rounds=3, signed=True)
    transport = Loopback(parties(config, place))
    move, moved = rounds.move, []

    def stop(*given):
        moved.append(None)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return move(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop.rounds, "move", stop)
        with pytest.raises(KeyboardInterrupt):
            deployed(config, place / "dealt", tmp_path / "deployed", transport)
    assert len(list(ledger.entries(tmp_path / "deployed" / "run.ledger"))) == 1
    if restarted:
        transport = Loopback(parties(config, place))
    check(config, transport, place, tmp_path, monkeypatch, {}, resume=True)
    assert largest_difference(replay(tmp_path / "deployed" / "run.ledger").params, transport.clients[0].params) is None


def test_clients_that_have_helped_with_a_sum_help_with_no_other_in_its_round(place, tmp_path, monkeypatch):
    """A server that was stopped with the sum in hand asks for the same round without client 3."""
    config, lines = configuration(place, rounds=2), []
    transport = Loopback(parties(config, place))
    with monkeypatch.context() as patch:
        patch.setattr(loop.rounds, "move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            deployed(config, place / "dealt", tmp_path / "run", transport)
    transport = Loopback(transport.clients, lambda client, request: [(None, 0.0)] if client == 3 else None)
    with pytest.raises(UserError, match="round 1: in 3 attempts no client returned usable numbers"):
        deployed(config, place / "dealt", tmp_path / "run", transport, resume=True, notify=lines.append)
    line = (
        "refuses: round 1: client 0 has helped to sum the numbers of clients 0, 1, 2, 3, and helps with no other list"
    )
    assert any(line in said for said in lines)


def test_keys_that_do_not_go_together_are_refused_before_the_first_round(place, tmp_path):
    config = configuration(place)
    own = read_own(config, [place / "dealt" / "client-0.jsonl"])
    sums, known = Parties(config).sums, Parties(config).public
    with pytest.raises(UserError, match="client 0: its private key is not that of its public key"):
        Client(0, own, sums[1]._key, known)
    with pytest.raises(UserError, match="give its private key and each client's public key"):
        Client(0, own, sums[0]._key, known[:3])
    clients = parties(config, place)
    clients[0] = Client(0, own, sums[0]._key, [known[0], known[1], known[3], known[3]], seeded_noise=True)
    with pytest.raises(UserError, match="client 0 differs from the server: the clients' public keys"):
        deployed(config, place / "dealt", tmp_path / "run", Loopback(clients))
