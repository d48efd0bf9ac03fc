"""Server and clients must be alike before the first round: a difference is one line that names both values."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import small_run
from loopback import Loopback, client_of, deployed

from fedmezo_jax.data.buckets import Width
from fedmezo_jax.deploy import agreement, envelopes
from fedmezo_jax.deploy.client import Client
from fedmezo_jax.deploy.envelopes import Hello, Plan, Position, Refusal
from fedmezo_jax.deploy.examples import deal_out, read_own
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import client_failures
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.prepare import prepare


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "agreement") as folder:
        deal_out(small_run.configuration(folder), folder / "dealt")
        yield folder


def refused(place, out, change):
    """The line with which a run ends in which client 1 is changed; there is then no folder."""
    config = small_run.configuration(place)
    clients = [client_of(config, place / "dealt", client) for client in (0, 2)]
    clients.insert(1, change(config))
    with pytest.raises(UserError) as caught:
        deployed(config, place / "dealt", out, Loopback(clients))
    assert not out.exists()
    return str(caught.value)


def test_another_option(place, tmp_path):
    line = refused(place, tmp_path / "run", lambda config: client_of(replace(config, rounds=9), place / "dealt", 1))
    assert "client 1 differs from the server: --rounds (4 at the server, 9 at client 1): start both alike" in line


def test_another_base(place, tmp_path):
    def change(config):
        other = shutil.copytree(place / "model", tmp_path / "model")
        weights = safetensors.numpy.load_file(other / "model.safetensors")
        weights["model.norm.weight"][0] += 1e-6
        safetensors.numpy.save_file(weights, other / "model.safetensors")
        return Client(1, read_own(config, [place / "dealt" / "client-1.jsonl"], str(other)))

    line = refused(place, tmp_path / "run", change)
    hashes = line.split("base weights (")[1]
    assert len({word for word in hashes.split() if len(word) == 64}) == 2
    assert "--" not in line


@pytest.mark.parametrize("package", ["jax", "jaxlib", "numpy", "optax"])
def test_another_version(place, tmp_path, package, monkeypatch):
    def change(config):
        with monkeypatch.context() as patch:
            known = agreement.versions()
            patch.setattr(agreement, "versions", lambda: known | {package: "0.0.1"})
            return client_of(config, place / "dealt", 1)

    line = refused(place, tmp_path / "run", change)
    assert f"{package} ({agreement.versions()[package]} at the server, 0.0.1 at client 1)" in line
    assert line.count("at the server") == 1


class Liar:
    """A client whose enrolment is changed."""

    def __init__(self, client, change):
        self.client, self.change = client, change

    def handle(self, request):
        response = envelopes.unpack_response(self.client.handle(request))
        if isinstance(response, envelopes.Enrolment):
            response = response._replace(**self.change(response))
        return envelopes.pack(response)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said: {"facts": dict(said.facts) | {"jax": "9"}}, "at the server, 9 at client 1"),
        (
            lambda said: {"shape": Width(2**40, 2**40)},
            "client 1 has a table of examples that is wider than --max-length",
        ),
    ],
)
def test_a_client_that_says_it_is_alike_and_is_not(change, said, place, tmp_path):
    """The server looks for itself, before it allocates anything."""
    line = refused(place, tmp_path / "run", lambda config: Liar(client_of(config, place / "dealt", 1), change))
    assert said in line


def test_other_examples_than_before(place, tmp_path):
    """A client that is restarted with other examples is left out; the others go on."""
    config, lines = small_run.configuration(place), []
    clients = [client_of(config, place / "dealt", client) for client in range(3)]

    def restart(record):
        if record["round"] == 2:
            own = read_own(config, [place / "dealt" / "client-0.jsonl"])
            clients[1] = Client(1, own)

    result, _ = deployed(
        config, place / "dealt", tmp_path / "run", Loopback(clients), on_round=restart, notify=lines.append
    )
    failed = [(record["round"], *event.values()) for record in result.metrics for event in record["failed"]]
    assert failed == [(3, 1, 1, client_failures.DROPPED), (4, 1, 1, client_failures.MISMATCHED)]
    assert "notice: client 1 has other examples than it enrolled with" in lines


def test_examples_that_do_not_fit_the_plan(place):
    client = client_of(small_run.configuration(place), place / "dealt", 0)
    hello = Hello(bytes(8), client._facts, Plan(Width(16, 8), (Width(16, 8),), 1))
    response = envelopes.unpack_response(client.handle(envelopes.pack(hello)))
    assert isinstance(response, Refusal)
    assert "was agreed on" in response.reason


@pytest.mark.parametrize(("tokens", "labels", "at_once"), [(1 << 40, 8, 1), (64, 1 << 40, 1), (64, 8, 1 << 40)])
def test_a_plan_that_would_fill_a_client_s_memory(tokens, labels, at_once, place):
    client = client_of(small_run.configuration(place), place / "dealt", 0)
    shape = Width(tokens, labels)
    hello = Hello(bytes(8), client._facts, Plan(shape, (shape,), at_once))
    response = envelopes.unpack_response(client.handle(envelopes.pack(hello)))
    assert isinstance(response, Refusal)
    assert "--max-length" in response.reason


def test_work_for_a_run_that_a_client_does_not_know(place):
    """It asks to be greeted, whatever the request holds."""
    client = client_of(small_run.configuration(place), place / "dealt", 0)
    start = envelopes.Start(bytes(8), bytes(16), 0, np.inf, b"", b"", b"", envelopes.Progressed(0, []))
    assert envelopes.unpack_response(client.handle(envelopes.pack(start))) == Position(bytes(8), -1)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"uplink": "lora"}, "send coefficients"),
        ({"dropout": 0.1}, "real ones fail by themselves"),
        ({"deadline": 2.0}, "real ones fail by themselves"),
        ({"secure_sum": True, "directions_shared": True}, "public key"),
        ({"signed": True}, "private key"),
    ],
)
def test_what_cannot_be_deployed(changed, line, place, tmp_path):
    config = small_run.configuration(place, **changed)
    with pytest.raises(UserError, match=line):
        Client(0, read_own(config, [place / "dealt" / "client-0.jsonl"]))
    with pytest.raises(UserError, match=line):
        deployed(config, place / "dealt", tmp_path / "run", Loopback([]), keys=None)


def test_the_server_knows_of_the_clients_examples_their_lengths_alone(place, tmp_path):
    """What it keeps is what they enrolled with, and in its table of training examples there is no word."""
    config = small_run.configuration(place, rounds=1)
    result, _ = deployed(config, place / "dealt", tmp_path / "run")
    rows = result.context.task.train
    assert not np.any(rows.tokens)
    assert not np.any(rows.labels)
    kept = json.loads((tmp_path / "run" / "enrolments.json").read_text())["clients"]
    assert all(client.keys() == {"shape", "lengths", "labels"} for client in kept)


@pytest.mark.parametrize("partition", ["iid", "length"])
def test_the_plan_is_that_of_all_examples_in_one_place(partition, place, tmp_path):
    """Widths of steps, blocks of clients and tokens: against the simulation's, which sees the examples."""
    config = RunConfig(
        **{"model": str(place / "model"), "data": "bundled", "clients": 4, "participation": 0.7, "max_length": 64},
        **{"test_examples": 10, "local_steps": 4, "partition": partition, "learning_rate": 1e-3, "rounds": 1},
    )
    simulated = prepare(config)
    deal_out(config, tmp_path / "data")
    result, transport = deployed(config, tmp_path / "data", tmp_path / "run")
    ours, theirs = result.context.task, simulated.task
    assert ours.widths == theirs.widths
    assert (ours.block_size, ours.least_width) == (theirs.block_size, theirs.least_width)
    assert [len(part) for part in ours.parts] == [len(part) for part in theirs.parts]
    for client, part in zip(transport.clients, theirs.parts, strict=True):
        np.testing.assert_array_equal(client._task.train[1], theirs.train[1][part])
        np.testing.assert_array_equal(client._task.train.labels, theirs.train.labels[part])
    np.testing.assert_array_equal(ours.test.labels, theirs.test.labels)
