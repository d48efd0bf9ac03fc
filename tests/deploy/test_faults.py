"""A deployed run over a network that fails is the simulation in which those clients dropped out, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import small_run
from loopback import Loopback, check_same, client_of, deployed, quiet, simulated_without

from fedmezo_jax.deploy import envelopes
from fedmezo_jax.deploy.envelopes import Answer, Hello, Position, Start
from fedmezo_jax.deploy.examples import deal_out
from fedmezo_jax.deploy.server import ENROLMENTS, read_enrolments
from fedmezo_jax.deploy.transport import Reply
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import ledger, loop, messages
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.replay import largest_difference, replay

ROUNDS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "faults") as folder:
        deal_out(configuration(folder), folder / "dealt")
        yield folder


def configuration(place, **changed):
    return small_run.configuration(place, **{"rounds": ROUNDS} | changed)


@pytest.fixture(scope="module")
def undisturbed(place):
    return fine_tune(configuration(place), place / "undisturbed", check_rate=False, notify=quiet)


def start_of(request):
    """The round and the attempt that a request is for; None of one that asks for no work."""
    request = envelopes.unpack_request(request)
    return (messages.unpack_start(request.start)[0], request.attempt) if isinstance(request, Start) else None


ON_TIME, TOO_LATE = 0.9, 11.0
"""Seconds of a delay; the server waits ten for a round."""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", ["own directions", "shared directions", "signed", "private"])
def test_lost_late_repeated_and_reordered_messages(how, seed, place, tmp_path, monkeypatch):
    changed = {
        "own directions": {},
        "shared directions": {"directions_shared": True},
        "signed": {"signed": True},
        "private": {"dp_epsilon": 8.0},
    }
    config = configuration(place, attempts=20, **changed[how])
    draw, dropped = np.random.default_rng(seed), []

    def fault(client, request):
        delay = draw.uniform(0, ON_TIME, (3, 2)).tolist()
        if not (at := start_of(request)):
            return delay[: draw.integers(1, 4)]  # of greetings and the end nothing is lost for good
        kind = draw.choice(["fine", "twice", "lost", "answer lost", "late", "answer late"], p=[0.3, 0.2, *[0.125] * 4])
        if kind not in ("fine", "twice"):
            dropped.append((at, client))
        return {
            "fine": delay[:1],
            "twice": delay,
            "lost": [(None, 0.0)],
            "answer lost": [(0.0, None)],
            "late": [(TOO_LATE, 0.1)],
            "answer late": [(0.1, TOO_LATE)],
        }[kind]

    transport = Loopback([client_of(config, place / "dealt", client) for client in range(3)], fault)
    result, _ = deployed(config, place / "dealt", tmp_path / "deployed", transport)
    expected = simulated_without(config, dropped, tmp_path / "simulated", monkeypatch)
    check_same(result, expected, tmp_path / "deployed", tmp_path / "simulated")
    assert any(record["failed"] for record in result.metrics)
    for client in transport.clients:
        assert largest_difference(client.params, result.params) is None


def test_a_client_works_once_for_each_attempt(place, undisturbed, tmp_path, monkeypatch):
    """However often a request is repeated. It follows each round once, too, or its θ would be another."""
    config, worked = configuration(place), []
    monkeypatch.setattr(
        "fedmezo_jax.run.rounds.private_update",
        lambda config, update, attempt, noise: worked.append(update[:2]) or update,
    )
    transport = Loopback(
        [client_of(config, place / "dealt", client) for client in range(3)], lambda client, request: [(0.0, 0.0)] * 4
    )
    result, _ = deployed(config, place / "dealt", tmp_path / "deployed", transport)
    check_same(result, undisturbed, tmp_path / "deployed", place / "undisturbed")
    assert sorted(worked) == [(t, client) for t in range(ROUNDS) for client in range(3)]


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_client_that_is_restarted_catches_up_from_the_ledger(at, place, undisturbed, tmp_path):
    """It has forgotten everything; it is greeted again, and no round is lost."""
    config, lines = configuration(place), []

    def restart(record):
        if record["round"] == at:
            transport.clients[1] = client_of(config, place / "dealt", 1, notify=lines.append)

    transport = Loopback([client_of(config, place / "dealt", client) for client in range(3)])
    result, _ = deployed(config, place / "dealt", tmp_path / "deployed", transport, on_round=restart)
    check_same(result, undisturbed, tmp_path / "deployed", place / "undisturbed")
    assert f"client 1 has caught up with round {at} from the ledger" in lines
    assert largest_difference(transport.clients[1].params, result.params) is None


def test_a_client_that_joins_late_was_dropped_until_then(place, tmp_path, monkeypatch):
    config, joins = configuration(place), 3
    clients = [client_of(config, place / "dealt", client) for client in range(3)]

    def away(client, request):
        return [(None, 0.0)] if client == 2 and (start_of(request) or (joins,))[0] < joins else None

    transport = Loopback(clients, away)

    def join(record):
        if record["round"] == joins:
            clients[2] = client_of(config, place / "dealt", 2)

    result, _ = deployed(config, place / "dealt", tmp_path / "deployed", transport, on_round=join)
    dropped = [((t, 0), 2) for t in range(joins)]
    expected = simulated_without(config, dropped, tmp_path / "simulated", monkeypatch)
    check_same(result, expected, tmp_path / "deployed", tmp_path / "simulated")


@pytest.mark.parametrize("restarted", [False, True], ids=["clients went on", "all were restarted"])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_server_that_is_stopped_goes_on(stop, restarted, place, undisturbed, tmp_path):
    config, data = configuration(place), place / "dealt"

    def cut(record):
        if record["round"] == stop:
            raise KeyboardInterrupt

    transport = Loopback([client_of(config, data, client) for client in range(3)])
    with pytest.raises(KeyboardInterrupt):
        deployed(config, data, tmp_path / "run", transport, on_round=cut, checkpoint_every=3)
    if restarted:
        transport = Loopback([client_of(config, data, client) for client in range(3)])
    result, _ = deployed(config, data, tmp_path / "run", transport, resume=True, checkpoint_every=3)
    check_same(result, undisturbed, tmp_path / "run", place / "undisturbed")
    for client in transport.clients:
        assert largest_difference(client.params, result.params) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"clients": [1]}', '{"clients": [{"shape": [8, 8]}]}'])
def test_damaged_enrolments_are_refused_by_name(content, tmp_path):
    file = tmp_path / ENROLMENTS
    file.write_text(content)
    with pytest.raises(UserError, match=r"enrolments.json: is damaged"):
        read_enrolments(file, {})


def test_a_server_that_is_stopped_between_ledger_and_clients_loses_no_round(place, undisturbed, tmp_path, monkeypatch):
    """The round is in the ledger, and no client has heard of it: none works on it again."""
    config, data = configuration(place), place / "dealt"
    transport = Loopback([client_of(config, data, client) for client in range(3)])

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.rounds, "advance", cut)
        with pytest.raises(KeyboardInterrupt):
            deployed(config, data, tmp_path / "run", transport)
    worked, handle = [], transport.clients[0].handle
    transport.clients[0].handle = lambda request: worked.append(start_of(request)) or handle(request)
    result, _ = deployed(config, data, tmp_path / "run", transport, resume=True)
    check_same(result, undisturbed, tmp_path / "run", place / "undisturbed")
    assert (0, 0) not in worked


class Intruder:
    """Stands before a client and changes what it answers to requests for work."""

    def __init__(self, client, change):
        self.client, self.change, self.before = client, change, []

    def handle(self, request):
        answer = self.client.handle(request)
        if not start_of(request):
            return answer
        self.before.append(answer)
        return self.change(self, request, answer)


def other_ticket(answer, request):
    return envelopes.pack(envelopes.unpack_response(answer)._replace(ticket=envelopes.ticket_of(request)))


INTRUSIONS = {
    "garbage": (lambda self, request, answer: b"\x93\x02garbage", "is malformed"),
    "nothing": (lambda self, request, answer: b"", "is malformed"),
    "a long message": (lambda self, request, answer: b"\xdd\xff\xff\xff\xff" * 1000, "is malformed"),
    "another version": (lambda self, request, answer: b"\x93\x01" + answer[2:], "format version 1"),
    "the first answer again": (lambda self, request, answer: self.before[0], "answers another request"),
    "the first update again": (lambda self, request, answer: other_ticket(self.before[0], request), None),
    "that it is ahead": (
        lambda self, request, answer: envelopes.pack(Position(envelopes.ticket_of(request), 2**62)),
        None,
    ),
}


@pytest.mark.parametrize("name", INTRUSIONS)
def test_a_client_that_sends_something_else_is_left_out_alone(name, place, tmp_path, monkeypatch):
    change, line = INTRUSIONS[name]
    config, lines = configuration(place, rounds=3), []
    deal_out(config, tmp_path / "data")
    clients = [client_of(config, tmp_path / "data", client) for client in range(3)]
    clients[1] = Intruder(clients[1], lambda self, *given: change(self, *given) if len(self.before) > 1 else given[1])
    result, _ = deployed(config, tmp_path / "data", tmp_path / "run", Loopback(clients), notify=lines.append)
    failed = [(record["round"], event["client"]) for record in result.metrics for event in record["failed"]]
    assert failed == [(2, 1), (3, 1)]
    assert line is None or sum(line in said and "client 1" in said for said in lines) == 2
    assert largest_difference(replay(tmp_path / "run" / "run.ledger").params, result.params) is None
    assert [update is None for update in list(ledger.entries(tmp_path / "run" / "run.ledger"))[2].updates] == [
        *(False, True, False)
    ]


def test_a_server_whose_results_do_not_fit_is_refused_and_moves_nothing(place, tmp_path):
    config, data = configuration(place), place / "dealt"
    clients = [client_of(config, data, client) for client in range(3)]
    starts = []

    def record(client, request):
        starts.extend([request] if client == 0 and start_of(request) else [])

    deployed(replace(config), data, tmp_path / "run", Loopback(clients, record))
    start = envelopes.unpack_request(starts[1])
    (attempt, message) = start.progressed.results[0]
    for changed in (message[:-1], messages.pack_mean(0, np.zeros(3, np.float32), 1.0), message[:-9] + b"\xff" * 9):
        client = client_of(config, data, 0)
        hello = Hello(bytes(8), client._facts, clients[0]._plan)
        client.handle(envelopes.pack(hello))
        client.handle(starts[0])
        before = client.params
        progressed = start.progressed._replace(results=[envelopes.Result(attempt, changed)])
        response = envelopes.unpack_response(client.handle(envelopes.pack(start._replace(progressed=progressed))))
        assert isinstance(response, envelopes.Refusal)
        assert client.rounds == 0
        assert largest_difference(client.params, before) is None
        assert isinstance(envelopes.unpack_response(client.handle(starts[1])), envelopes.Refusal)  # the same ticket
        again = start._replace(ticket=b"another!")
        assert isinstance(envelopes.unpack_response(client.handle(envelopes.pack(again))), Answer)


def test_no_client_at_all_ends_the_run_in_one_line(place, tmp_path):
    config = configuration(place)
    clients = [client_of(config, place / "dealt", client) for client in range(3)]
    lost = Loopback(clients, lambda client, request: [(None, 0.0)] if start_of(request) else None)
    with pytest.raises(UserError, match="round 1: in 3 attempts no client returned usable numbers"):
        deployed(config, place / "dealt", tmp_path / "run", lost)
    some = Loopback(clients, lambda client, request: [(None, 0.0)] if client != 1 else None)
    with pytest.raises(UserError, match="client 0, 2 did not enrol within 100 s"):
        deployed(config, place / "dealt", tmp_path / "other", some)


def test_clients_that_answer_greetings_slowly_enrol(place, undisturbed, tmp_path):
    """Each greeting takes longer than the server waits before the next one, as where many share a machine."""
    config = configuration(place)
    clients = [client_of(config, place / "dealt", client) for client in range(3)]
    greeted = []

    def slow(client, request):
        if isinstance(envelopes.unpack_request(request), Hello):
            greeted.append(client)
            return [(40.0, 20.0)]
        return None

    result, _ = deployed(config, place / "dealt", tmp_path / "run", Loopback(clients, slow))
    check_same(result, undisturbed, tmp_path / "run", place / "undisturbed")
    assert len(greeted) == 3 * 2 * 2  # twice in a minute, before the plan and with it


def test_a_client_that_cannot_be_reached_is_greeted_again_and_not_at_once(place, undisturbed, tmp_path):
    """Client 1 is started 45 seconds after the server; until then the network says that it is not there."""
    config, sent = configuration(place), []

    class Absent(Loopback):
        def _deliver(self, client, request, back):
            sent.append((client, self.clock()))
            if client != 1 or self.clock() >= 45:
                return super()._deliver(client, request, back)
            return Reply(client, request, None)

    clients = [client_of(config, place / "dealt", client) for client in range(3)]
    result, transport = deployed(config, place / "dealt", tmp_path / "run", Absent(clients))
    check_same(result, undisturbed, tmp_path / "run", place / "undisturbed")
    assert transport.clock() < 50
    assert len([client for client, at in sent if client == 1 and at < 45]) == 23
