"""Signed runs: every signature holds, a changed record is named, and whoever forges a signature is left out."""

import json
from dataclasses import replace

import lying_clients
import numpy as np
import pytest
import small_run

from experiments import replay as command
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import client_failures, ledger, messages, signatures
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.replay import largest_difference, replay


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "signed") as folder:
        yield folder


def configuration(place, **changed):
    return small_run.configuration(place, **{"rounds": 3, "local_steps": 2, "signed": True} | changed)


def quiet(line):
    pass


@pytest.fixture(scope="module")
def run(place):
    config = configuration(place)
    return config, place / "run", fine_tune(config, place / "run", notify=quiet)


def test_a_signed_run_is_the_unsigned_one_and_is_replayed(run, place):
    config, folder, result = run
    plain = fine_tune(replace(config, signed=False), place / "plain", notify=quiet)
    assert largest_difference(plain.params, result.params) is None
    lines = []
    assert largest_difference(replay(folder / "run.ledger", notify=lines.append).params, result.params) is None
    assert "every signature holds, with the keys in its own header" in lines
    trusted = replay(folder / "run.ledger", identities=folder / "identities.json", notify=lines.append)
    assert largest_difference(trusted.params, result.params) is None
    assert "every signature holds, with the keys given" in lines
    signed, unsigned = result.metrics[0], plain.metrics[0]
    more = np.array(signed["client_uplink_bytes"]) - np.array(unsigned["client_uplink_bytes"])
    np.testing.assert_array_equal(more, 64)


def test_signatures_hold_by_the_library_itself(run):
    """Against cryptography's own verification, of a statement put together by hand."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    _, folder, _ = run
    keys = json.loads((folder / "identities.json").read_text())
    header, first, second, _ = ledger.records(folder / "run.ledger")
    entry = ledger.unpack_entry(second.payload)
    numbers = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    statement = b"fedmezo_jax update 1\0" + header.chain + first.chain + numbers + entry.updates[2]
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(keys["clients"][2])).verify(entry.signatures[2], statement)


def test_a_run_that_is_stopped_and_resumed_signs_on(run, place, monkeypatch):
    config, folder, _ = run
    stopped = []

    def stop(record):
        stopped.append(record)
        if len(stopped) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(config, place / "resumed", on_round=stop, notify=quiet)
    fine_tune(config, place / "resumed", resume=True, notify=quiet)
    assert (place / "resumed" / "run.ledger").read_bytes() == (folder / "run.ledger").read_bytes()


def rewritten(source, target, changes, keys=None):
    """The ledger with what ``changes`` makes of entries by their round; sealed anew if ``keys`` are given."""
    header, *rest = ledger.records(source)
    book = ledger.create(target, ledger.read_header(source))
    for record in rest:
        entry = ledger.unpack_entry(record.payload)
        changed = changes.get(entry.round, lambda entry: entry)(entry)
        if changed is None:
            continue
        if keys:
            context = signatures.Context(header.chain, book.chain)
            changed = signatures.sign_record(keys.server, context, changed._replace(seal=b""))
        book.append(changed)
    return target


def other_number(entry):
    update = messages.unpack_update(entry.updates[1])
    update = update._replace(projected_gradients=np.nextafter(update.projected_gradients, np.float32(9)))
    return entry._replace(updates=[entry.updates[0], messages.pack_update(update), *entry.updates[2:]])


def swapped(entry):
    one, two, *rest = entry.signatures
    return entry._replace(signatures=(two, one, *rest))


@pytest.mark.parametrize(
    ("change", "alone", "sealed"),
    [
        (other_number, "the server's", "client 1's"),
        (swapped, "the server's", "client 0's"),
        (lambda entry: entry._replace(weights=np.array([0, 1, 1], np.float32)), "the server's", None),
    ],
    ids=["a number", "two signatures", "a weight"],
)
def test_a_changed_record_is_the_first_that_fails(run, tmp_path, change, alone, sealed):
    """Who has no key is found by the server's signature; a server that changes a client's numbers, by the client's."""
    config, folder, _ = run
    with pytest.raises(UserError, match=f"round 2 is not signed as it should be: {alone} signature"):
        signatures.verify(rewritten(folder / "run.ledger", tmp_path / "a.ledger", {1: change}))
    server = rewritten(folder / "run.ledger", tmp_path / "b.ledger", {1: change}, signatures.simulated_keys(config))
    # Even where the server seals it anew, the clients have signed another chain from there on.
    named = f"round 2 .*: {sealed}" if sealed else "round 3 .*: client 0's"
    with pytest.raises(UserError, match=f"{named} signature does not hold"):
        signatures.verify(server)


def test_a_record_that_is_left_out_breaks_the_next(run, tmp_path):
    config, folder, _ = run
    keys = signatures.simulated_keys(config)
    with pytest.raises(UserError, match="round 1 is not signed"):
        signatures.verify(rewritten(folder / "run.ledger", tmp_path / "a", {0: lambda entry: None}, keys))
    # A shorter ledger is an earlier state of the run: its end is not protected.
    signatures.verify(rewritten(folder / "run.ledger", tmp_path / "b", {2: lambda entry: None}))


def test_a_ledger_with_other_keys_is_refused_where_the_true_ones_are_given(run, place, tmp_path, monkeypatch):
    config, folder, _ = run
    make = signatures.simulated_keys
    monkeypatch.setattr(signatures, "simulated_keys", lambda config: make(replace(config, seed=7)))
    fine_tune(config, tmp_path / "forged", notify=quiet)
    signatures.verify(tmp_path / "forged" / "run.ledger")
    with pytest.raises(UserError, match="other public keys than those given"):
        replay(tmp_path / "forged" / "run.ledger", identities=folder / "identities.json")
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UserError, match="holds no public keys"):
        replay(folder / "run.ledger", identities=tmp_path / "none.json")
    assert "identities" in command.Config.__dataclass_fields__


def test_a_message_with_a_forged_signature_is_its_client_s_failure_alone(run, place, monkeypatch):
    config, _, _ = run
    messages_of = {}

    def change(client, message):
        messages_of[client] = message
        if client == 0:
            return lying_clients.altered(message, losses=lambda losses: losses + 1)
        if client == 1:
            return lying_clients.altered(message, losses=lambda losses: losses * np.nan)._replace(signature=None)
        return message

    lying_clients.intercepted(monkeypatch, [1], change)
    result = fine_tune(config, place / "forgers", notify=quiet)
    failed = [(event["client"], event["why"]) for event in result.metrics[1]["failed"]]
    assert failed == [(0, client_failures.UNSIGNED), (1, client_failures.UNSIGNED)]
    signatures.verify(place / "forgers" / "run.ledger")
    assert largest_difference(replay(place / "forgers" / "run.ledger").params, result.params) is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"uplink": "lora"}, "--signed covers coefficients"),
        ({"algorithm": "fedavg"}, "--signed covers coefficients"),
        ({"on_divergence": "clip"}, "--on-divergence clip changes what clients have signed"),
    ],
)
def test_what_cannot_be_signed_is_refused(options, named):
    with pytest.raises(UserError, match=named):
        RunConfig(signed=True, **options)
