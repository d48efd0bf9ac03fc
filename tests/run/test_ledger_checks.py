"""Ledgers that somebody made: with every checksum right, and a field that no run of their configuration can have."""

import copy
import re
import sys
import tracemalloc
from dataclasses import asdict

import msgpack
import numpy as np
import pytest

from experiments import _cli
from experiments import replay as command
from fedmezo_jax.core.aggregation import sample_participants
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import client_failures, ledger, ledger_checks, messages, replay
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.ledger import Entry

CONFIG = paper_config(
    **{"clients": 5, "participation": 0.6, "rounds": 4, "local_steps": 3, "directions": 2, "learning_rate": 1e-3},
    **{
        "weighting": "samples",
        "on_divergence": "rollback",
        "personalize": "model-diff",
        "seed": 7,
        "precision": "float32",
    },
)
HEADER = ledger.make_header(asdict(CONFIG), "ab" * 32, {"jax": "1.2.3"}, CONFIG.fixed_rate)
DRAW = np.random.RandomState(0)


def numbers(*shape):
    return (1e-3 * DRAW.standard_normal(shape)).astype(np.float32)


def participants(t, attempt=0):
    return sample_participants(CONFIG.seed, t, CONFIG.clients, CONFIG.participants, attempt)


def updates(t, ids):
    return [messages.pack_update(messages.Update(t, int(id), 10 + int(id), numbers(3, 2), numbers(3))) for id in ids]


def good_entries():
    """Plain; a client left out; rolled back; tried a second time, at half the learning rate."""
    made = []
    for t, attempt, damping in ((0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 1, 0.5)):
        ids = participants(t, attempt)
        rates = np.array([0.5, 1, 1.5], np.float32) * np.float32(1e-3) * damping
        made.append(Entry(t, attempt, ids, (10 + ids).astype(np.float32), rates, updates(t, ids), []))
    first, second, third, fourth = made
    second.weights[1] = 0
    second.updates[1] = None
    second = second._replace(failed=[(0, int(second.ids[1]), client_failures.DROPPED)])
    fourth = fourth._replace(failed=[(0, int(id), client_failures.LATE) for id in participants(3)])
    return [first, second, third._replace(rolled_back=True), fourth]


def write(file, header, payloads):
    """A ledger of these contents whose chain is right."""
    book = ledger.create(file, header)
    for payload in payloads:
        book._write(payload if isinstance(payload, bytes) else msgpack.packb(payload))
    return file


def raw():
    """Header and entries of the good ledger as plain objects."""
    return copy.deepcopy(HEADER), [msgpack.unpackb(ledger.pack_entry(entry)) for entry in good_entries()]


def test_the_good_ledger_is_accepted_and_comes_back(tmp_path):
    header, payloads = raw()
    file = write(tmp_path / "run.ledger", header, payloads)
    assert ledger_checks.run_config(ledger.read_header(file), file) == CONFIG
    found = [ledger.pack_entry(entry) for entry in ledger_checks.entries(file, CONFIG)]
    assert found == list(map(msgpack.packb, payloads))
    assert [entry.round for entry in ledger_checks.entries(file, CONFIG, 2)] == [2, 3]


MUTATIONS = {}


def mutation(name):
    """Adds ``change(header, payloads)``, which returns the payloads if it does not change them in place."""
    return lambda change: MUTATIONS.__setitem__(name, change)


def floats(*values):
    return np.array(values, "<f4").tobytes()


def ints(*values):
    return np.array(values, "<i4").tobytes()


def field(name, value, t=1):
    """Sets one field of round ``t``."""

    def change(header, payloads):
        payloads[t][name] = value(payloads[t][name]) if callable(value) else value

    MUTATIONS[f"{name} of round {t + 1}: {str(value)[:40]} {len(MUTATIONS)}"] = change


def vector(name, place, value, t=1):
    """Sets one number of a vector of round ``t``."""

    def change(header, payloads):
        content = np.frombuffer(payloads[t][name], "<i4" if name == "ids" else "<f4").copy()
        content[place] = value
        payloads[t][name] = content.tobytes()

    MUTATIONS[f"{name}[{place}] of round {t + 1} = {value}"] = change


def configured(**changes):
    """Changes the configuration, its hash made anew."""

    def change(header, payloads):
        header["config"].update(changes)
        header["config_hash"] = ledger.config_hash(header["config"])
        header["distribution"] = header["config"]["distribution"]

    MUTATIONS[f"config: {changes}"] = change


def in_header(name, value):
    MUTATIONS[f"header: {name} = {str(value)[:30]!r}"] = lambda header, payloads: header.update({name: value})


def client_update(name, place=0, t=0, **changed):
    """Replaces fields of a client's update."""

    def change(header, payloads):
        update = messages.unpack_update(payloads[t]["updates"][place])._replace(**changed)
        payloads[t]["updates"][place] = messages.pack_update(update)

    MUTATIONS[f"update: {name}"] = change


for _value in (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e30, 12.5):
    vector("weights", 0, _value)
vector("weights", 1, 1.0)  # of a client that failed
for _value in (np.nan, np.inf, -1e-3, 0.0, 4e-4, 1.6e-3, 1e30):
    vector("learning_rates", 2, _value)
vector("learning_rates", 2, 1.5e-3, t=3)  # before it was halved
for _value in (-1, 5, 2**31 - 1):
    vector("ids", 0, _value)
field("ids", lambda content: content[:4] * 3)
field("ids", lambda content: content[::-1])
field("ids", lambda content: content[4:8] + content[:4] + content[8:])
field("ids", b"")
field("ids", lambda content: content + ints(4))
field("ids", lambda content: content[:-1])
field("ids", [0, 1, 2])
field("ids", None)
field("weights", b"")
field("weights", floats(11, 0))
field("weights", floats(0, 0, 0))
field("weights", "heavy")
field("learning_rates", floats(1e-3))
for _value in (-1, 0, 2, 2**63, 1.0, True, None, "1"):
    field("round", _value)
for _value in (-1, 1, 3, 10**18, None, 0.0):
    field("attempt", _value)
field("attempt", 0, t=3)
for _value in (None, [], {}, b"", [None], [b"", None, b""], [b"update"] * 3, [1, 2, 3], [[], [], []]):
    field("updates", _value)
field("updates", lambda content: [*content, None])
field("updates", lambda content: content[::-1])
field("updates", lambda content: [None, None, None], t=0)
field("updates", lambda content: [content[0], content[0], content[2]])  # the client that failed has one
client = int(participants(1)[1])
for _value in (
    [],
    None,
    {},
    b"failed",
    [[0, client]],
    [[0, client, "dropped out", 1]],
    [[0, client, 3]],
    [[0, client, "was tired"]],
    [[0, client, client_failures.LATE]] * 2,
    [[1, client, client_failures.DROPPED]],
    [[-1, client, client_failures.DROPPED]],
    [[0, 10**6, client_failures.DROPPED]],
    [["0", client, client_failures.DROPPED]],
    [[0, client, client_failures.NOT_FINITE]],  # and its message is not there
):
    field("failed", _value)
field("failed", lambda events: events[:-1], t=3)
field("failed", lambda events: [*events[:-1], events[0]], t=3)
for _value in (-1, 1, 2**62, 1.5, None, "0", True):
    field("clipped", _value)
for _value in (1, None, "no", b""):
    field("rolled_back", _value)
client_update("another round", round=1)
client_update("another client", client=4)
client_update("other rows", samples=99)
client_update("a step less", projected_gradients=numbers(2, 2), losses=numbers(2))
client_update("a direction more", projected_gradients=numbers(3, 3))
client_update("NaN", projected_gradients=np.full((3, 2), np.nan, np.float32))
client_update("an infinite loss", losses=np.full(3, np.inf, np.float32))
client_update("huge", projected_gradients=np.full((3, 2), 3e38, np.float32))

for _changes in (
    {"clients": 10**18},
    {"clients": 10**8, "participation": 1e-8},
    {"clients": 4},
    {"clients": 0},
    {"clients": -5},
    {"clients": "5"},
    {"clients": 5.0},
    {"clients": True},
    {"clients": None},
    {"participation": 0.8},
    {"participation": float("nan")},
    {"local_steps": 2},
    {"local_steps": 10**15},
    {"directions": 1},
    {"rounds": 3},
    {"attempts": 1},
    {"seed": 8},
    {"seed": -1},
    {"learning_rate": float("inf")},
    {"learning_rate": 1e-2},
    {"learning_rate": "1e-3"},
    {"personalize": "frozen"},
    {"personalize": "by magic"},
    {"personalize_scale": 0.1},
    {"on_divergence": "warn"},
    {"weighting": "equal"},
    {"algorithm": "fedavg"},
    {"distribution": "bogus"},
    {"server_optimizer": "hope"},
    {"precision": "int4"},
    {"targets": "x_proj"},
    {"targets": None},
    {"lora_rank": 0},
    {"lora_alpha": float("inf")},
    {"model": 3},
    {"unknown": 1},
):
    configured(**_changes)

for _name, _value in (
    ("config_hash", "00" * 32),
    ("config_hash", None),
    ("base_hash", 5),
    ("distribution", "rademacher"),
    ("distribution", "bogus"),
    ("keys", "mt19937"),
    ("format", "a novel"),
    ("version", 1),
    ("version", 2),
    ("version", None),
    ("config", None),
    ("config", {}),
    ("config", [1]),
    ("versions", {}),
    ("versions", None),
    ("backend", {"platform": "cpu"}),
    ("backend", "cpu"),
    ("extra", 1),
):
    in_header(_name, _value)


@mutation("a config edited under an old hash")
def _(header, payloads):
    header["config"]["server_learning_rate"] = 2.0


@mutation("a config without seed")
def _(header, payloads):
    del header["config"]["seed"]
    header["config_hash"] = ledger.config_hash(header["config"])


@mutation("other clients than the seed draws, and all else right")
def _(header, payloads):
    ids = next(ids for t in range(99) if (ids := participants(t)).tolist() != participants(0).tolist())
    payloads[0] |= {"ids": ints(*ids), "weights": floats(*(10 + ids)), "updates": updates(0, ids)}


@mutation("two rounds swapped")
def _(header, payloads):
    return [payloads[1], payloads[0], *payloads[2:]]


@mutation("a round missing")
def _(header, payloads):
    return [payloads[0], *payloads[2:]]


@mutation("a round twice")
def _(header, payloads):
    return [payloads[0], payloads[0], *payloads[1:]]


@mutation("a round too many")
def _(header, payloads):
    return [*payloads, payloads[-1] | {"round": 4}]


@mutation("a field missing")
def _(header, payloads):
    del payloads[0]["clipped"]


@mutation("a field more")
def _(header, payloads):
    payloads[0]["more"] = 1


@mutation("something after an entry")
def _(header, payloads):
    return [msgpack.packb(payloads[0]) + b"\0", *payloads[1:]]


@mutation("no msgpack")
def _(header, payloads):
    return [b"\xc1" * 50]


@mutation("an empty record")
def _(header, payloads):
    return [b""]


@mutation("an array that promises 2**32 entries")
def _(header, payloads):
    return [b"\xdd\xff\xff\xff\xff"]


@mutation("nested arrays that promise as much as there are bytes")
def _(header, payloads):
    packed = msgpack.packb(payloads[0])
    return [packed[: packed.index(b"\xa6failed") + 7] + b"\xdd\0\x01\0\0" * 900 + bytes(2**16)]


@pytest.mark.parametrize("name", MUTATIONS, ids=lambda name: re.sub(" at 0x[0-9a-f]+", "", name))
def test_it_is_refused_in_one_line_and_nothing_is_made_of_it(name, tmp_path, monkeypatch, capsys):
    header, payloads = raw()
    payloads = MUTATIONS[name](header, payloads) or payloads
    file = write(tmp_path / "run.ledger", header, payloads)
    monkeypatch.setattr(sys, "argv", ["replay", str(file), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(replay, "base_of_ledger", lambda *_: pytest.fail("the ledger was accepted"))
    tracemalloc.start()
    try:
        with pytest.raises(SystemExit) as stop:
            _cli.run(command.main, command.Config, "")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: ")
    assert most < 2e7
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"clients": 10**8, "participation": 3e-8}, "100000000 clients are more than"),
        ({"local_steps": 10**9}, "more than 268435456 projected gradients"),
    ],
)
def test_a_run_too_large_to_be_real_is_refused_by_its_configuration_alone(changes, why, tmp_path):
    header = ledger.make_header(asdict(CONFIG) | changes, "ab" * 32, {"jax": "1.2.3"}, CONFIG.fixed_rate)
    with pytest.raises(UserError, match=why):
        ledger_checks.run_config(header, tmp_path)


def test_a_resumed_run_refuses_it_too(tmp_path):
    header, payloads = raw()
    payloads[1]["weights"] = floats(-1, 0, 1)
    file = write(tmp_path / "run.ledger", header, payloads)
    with pytest.raises(UserError, match="record of round 2 does not fit the run: a weight is negative"):
        list(ledger_checks.entries(file, CONFIG, 3))
