"""Clients that fail, and the ways a run's process and disk can."""

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from multiprocessing import forkserver

import jax
import numpy as np
import pytest
import small_run
from lying_clients import altered, intercepted

from experiments import _cli, fedmezo
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import client_failures, divergence, ledger, loop, messages, run_checkpoints, run_folder
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.loop import train
from fedmezo_jax.run.prepare import prepare


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is taken from the user's cache, and nothing is left in it. Sessions of one run share compiled code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMEZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("faults")
    small_run.write_model(place / "model")
    small_run.write_data(place / "data.jsonl")
    return place


@pytest.fixture(scope="module")
def config(place):
    return paper_config(
        model=str(place / "model"),
        data=str(place / "data.jsonl"),
        clients=4,
        rounds=4,
        local_steps=2,
        max_length=64,
        test_examples=10,
        length_buckets=1,
        lora_rank=2,
        targets="v_proj",
    )


def start(folder, config, **changed):
    config = dataclasses.replace(config, **changed)
    folder.mkdir(exist_ok=True)
    said = []
    result = train(prepare(config), folder, checkpoint_every=2, eval_every=2, notify=said.append)
    return result, said


def same_run(one, other):
    """Whether two folders hold one run: all of its numbers, and nothing but times may differ."""
    assert (one / "run.ledger").read_bytes() == (other / "run.ledger").read_bytes()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    records, others = (
        [
            json.loads(line) | {"seconds": 0, "host_seconds": 0}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (one, other)
    )
    assert records == others


# Clients


def test_dropouts_and_stragglers_are_drawn_at_their_rates():
    counts = {client_failures.DROPPED: 0, client_failures.LATE: 0}
    for t in range(500):
        for why in client_failures.absent(3, t, 0, 20, 0.2, 1.5).values():
            counts[why] += 1
    # 20 %; and of the others those whose log-normal time, of median 1 and σ = 1/2, exceeds 1.5: 1 − Φ(2·ln 1.5)
    assert counts[client_failures.DROPPED] == pytest.approx(2000, abs=4 * (10_000 * 0.2 * 0.8) ** 0.5)
    assert counts[client_failures.LATE] == pytest.approx(8000 * 0.2087, abs=4 * (8000 * 0.21 * 0.79) ** 0.5)
    assert client_failures.absent(3, 0, 0, 20, 0.0, None) == {}
    assert client_failures.absent(3, 7, 0, 20, 0.5, None) != client_failures.absent(3, 7, 1, 20, 0.5, None)


def test_a_round_goes_on_without_those_who_fail(config, tmp_path):
    result, _ = start(tmp_path, config, dropout=0.4, deadline=1.5, rounds=6, weighting="samples")
    failed = [event for record in result.metrics for event in record["failed"]]
    assert {event["why"] for event in failed} == {client_failures.DROPPED, client_failures.LATE}
    for record, entry in zip(result.metrics, ledger.entries(tmp_path / "run.ledger"), strict=True):
        out = {event["client"]: event["why"] for event in record["failed"] if event["attempt"] == entry.attempt + 1}
        assert [id for id, weight in zip(entry.ids, entry.weights, strict=True) if not weight] == sorted(out)
        assert len(set(entry.weights[entry.weights > 0])) == (entry.weights > 0).sum()  # their numbers of rows
        for id, size in zip(record["participants"], record["client_uplink_bytes"], strict=True):
            assert (size == 0) == (out.get(id) == client_failures.DROPPED)  # who is late has sent
    assert np.isfinite(result.loss_after)


def poisoned(monkeypatch, rounds, clients):
    """Lets these clients come back with NaN in these rounds."""
    poison = lambda m: altered(m, projected_gradients=lambda c: c * np.float32(np.nan))  # noqa: E731
    intercepted(monkeypatch, rounds, lambda id, m: poison(m) if id in clients else m)


def exploded(monkeypatch, rounds):
    """Lets the losses of these rounds be twice as high."""
    intercepted(monkeypatch, rounds, lambda id, m: altered(m, losses=lambda losses: losses * 2))


def test_a_client_that_returns_nan_is_left_out_and_named(config, tmp_path, monkeypatch):
    poisoned(monkeypatch, [1], [2])
    result, said = start(tmp_path, config)
    assert result.metrics[1]["failed"] == [{"attempt": 1, "client": 2, "why": client_failures.NOT_FINITE}]
    assert [record["failed"] for record in result.metrics[::2]] == [[], []]
    assert said == [f"round 2: client 2 {client_failures.NOT_FINITE}: left out"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    _, entry, *_ = ledger.entries(tmp_path / "run.ledger")
    np.testing.assert_array_equal(entry.weights, [1, 1, 0, 1])


def test_a_round_in_which_all_fail_is_tried_with_others_and_not_for_ever(config, tmp_path, monkeypatch):
    poisoned(monkeypatch, [2], [0, 1, 2, 3, 4, 5, 6, 7])
    wider = {"clients": 8, "participation": 0.25, "attempts": 4}
    with pytest.raises(UserError, match=r"round 3: in 4 attempts no client.*NaN.*--learning-rate"):
        start(tmp_path / "stuck", config, **wider)
    assert len(list(ledger.entries(tmp_path / "stuck" / "run.ledger"))) == 2
    monkeypatch.undo()
    poisoned(monkeypatch, [2], [0, 1, 2, 3, 4, 5])
    for name in ("stuck", "fresh"):  # what was stopped goes on, and ends as what was not
        result, _ = start(tmp_path / name, config, **wider)
    same_run(tmp_path / "stuck", tmp_path / "fresh")
    record = result.metrics[2]
    assert max(event["attempt"] for event in record["failed"]) >= 1
    assert set(record["participants"]) & {6, 7}
    assert record["forward_passes"] == result.metrics[0]["forward_passes"] * max(
        1, 1 + max(event["attempt"] for event in record["failed"] if event["client"] not in record["participants"])
    )


# A loss that explodes


def test_divergence_is_reported_and_the_run_goes_on(config, tmp_path, monkeypatch):
    plain, nothing = start(tmp_path / "plain", config)
    exploded(monkeypatch, [2])
    result, said = start(tmp_path / "diverged", config)
    assert [record["diverged"] for record in result.metrics] == [False, False, True, False]
    (notice,) = said
    assert notice.startswith("round 3: the loss has exploded")
    assert nothing == []
    jax.tree.map(np.testing.assert_array_equal, result.params, plain.params)


def test_unusual_projected_gradients_are_clipped(config, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "CLIP", 0.5)
    result, said = start(tmp_path, config, on_divergence="clip")
    first, *later = result.metrics
    assert first["clipped"] == 0  # nothing is known yet of what is usual
    assert said == [f"round {r['round']}: {r['clipped']} steps were clipped" for r in later if r["clipped"]] != []
    usual = []
    for record, entry in zip(result.metrics, ledger.entries(tmp_path / "run.ledger"), strict=True):
        largest = max(np.abs(messages.unpack_update(message).projected_gradients).max() for message in entry.updates)
        if usual:
            assert largest <= 0.5 * np.median(usual) * (1 + 1e-5)
        usual.append(record["median_gradient"])


def test_a_diverged_round_is_rolled_back_at_half_the_rates(config, tmp_path, monkeypatch):
    """θ is again where the last round that was kept began; so after round 3 there are the effects of round 1 alone."""
    after_one, _ = start(tmp_path / "one", config, rounds=1)
    exploded(monkeypatch, [2, 3])
    result, said = start(tmp_path / "whole", config, rounds=6, on_divergence="rollback")
    assert [record["rolled_back"] for record in result.metrics] == [False, False, True, True, False, False]
    assert sum("rolled back, learning rates halved" in notice for notice in said) == 2
    for record, rate in zip(result.metrics, [1e-3, 1e-3, 1e-3, 5e-4, 2.5e-4, 2.5e-4], strict=True):
        np.testing.assert_allclose(record["learning_rates"], rate, rtol=1e-6)
    undone, _ = start(tmp_path / "undone", config, rounds=4, on_divergence="rollback")
    jax.tree.map(np.testing.assert_array_equal, undone.params, after_one.params)


def test_a_run_stopped_after_a_roll_back_knows_where_to_go_back_to(config, tmp_path, monkeypatch):
    """Two rounds in a row are rolled back, a checkpoint between them."""
    exploded(monkeypatch, [1, 2])
    options = {"on_divergence": "rollback", "server_optimizer": "momentum", "server_learning_rate": 0.5}

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # and a run that is stopped on the way knows where to go back to
        save = run_checkpoints.save
        patch.setattr(run_checkpoints, "save", lambda *given: (save(*given), cut()))
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "cut", config, **options)
    for name in ("cut", "never"):
        start(tmp_path / name, config, **options)
    same_run(tmp_path / "cut", tmp_path / "never")


def test_when_all_diverge_the_round_is_rolled_back_too(config, tmp_path, monkeypatch):
    poisoned(monkeypatch, [1], [0, 1, 2, 3])
    result, said = start(tmp_path, config, on_divergence="rollback")
    assert said[-1].startswith("round 2: the loss has exploded")
    assert [record["rolled_back"] for record in result.metrics] == [False, True, False, False]
    assert result.metrics[1]["train_loss"] is None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


# The process and the disk


def arguments(place, out, *more):
    given = {
        **{"model": place / "model", "data": place / "data.jsonl", "out": place / out, "clients": 3, "rounds": 30},
        **{
            "local-steps": 2,
            "batch-size": 1,
            "max-length": 64,
            "test-examples": 4,
            "lora-rank": 2,
            "targets": "v_proj",
        },
        **{"length-buckets": 1, "checkpoint-every": 3, "eval-every": 2, "personalize": "model-diff"},
    }
    return [*(part for name, value in given.items() for part in (f"--{name}", str(value))), "--no-check-rate", *more]


def session(argv, errors=os.devnull, room=None, ends=True):
    """A process of its own that runs the command.

    With ``room`` no file can grow beyond it once training begins; one that never ``ends`` waits before it would write
    the adapter, so that a signal always meets it.
    """

    def fill(*_):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    if room:
        fedmezo.describe = fill
    if not ends:
        loop.save_adapter = lambda *_, **__: time.sleep(3600)
    sys.argv = ["fedmezo", *argv]
    for name, stream in ((os.devnull, sys.stdout), (errors, sys.stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream.fileno())  # what does not go through sys.stderr counts
    _cli.run(fedmezo.main, fedmezo.Config, fedmezo.__doc__)


@pytest.fixture(scope="module")
def sessions():
    """Starts processes that have imported everything already: a session is then its own work alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # without it the preload fails, and says nothing
        forkserver.ensure_running()

    def begin(*given):
        process = context.Process(target=session, args=given)
        process.start()
        return process

    return begin


@pytest.fixture(scope="module")
def undisturbed(place, sessions):
    """A whole run, and the seconds it took when all of its programs were compiled already."""
    for name in ("first", "whole"):
        begin = time.monotonic()
        process = sessions(arguments(place, name))
        process.join()
        assert process.exitcode == 0
        seconds = time.monotonic() - begin
    same_run(place / "first", place / "whole")
    return place / "whole", seconds


def test_killed_at_twenty_moments_and_resumed_it_ends_as_if_undisturbed(place, sessions, undisturbed):
    whole, seconds = undisturbed
    folder, draw = place / "killed", random.Random(5)
    book = folder / "run.ledger"
    kills, lengths = 0, []
    while kills < 20:
        process = sessions(arguments(place, "killed", "--resume"))
        if kills % 2:  # any moment: while it loads, compiles, draws pictures, or is about to end
            process.join(draw.uniform(0, seconds / 3))
        else:  # or just after a record: between it and its metrics, inside a checkpoint, inside the next record
            size = book.stat().st_size if book.exists() else 0
            while process.is_alive() and (book.stat().st_size if book.exists() else 0) <= size:
                time.sleep(0.0005)
            process.join(draw.uniform(0, 0.03))
        alive = process.is_alive()
        process.kill()
        process.join()
        assert alive or process.exitcode == 0
        kills += alive
        lengths.append(book.stat().st_size if book.exists() else 0)
        if not alive and kills < 20:  # it came to its end: kill another from its start
            same_run(folder, whole)
            folder.rename(place / f"ended-{len(lengths)}")
    process = sessions(arguments(place, "killed", "--resume"))
    process.join()
    assert process.exitcode == 0
    same_run(folder, whole)
    assert len(set(lengths)) > 8  # it did get on between the kills


def test_a_torn_record_is_cut_off_and_a_flipped_bit_is_refused(place, sessions, undisturbed, monkeypatch, capsys):
    whole, _ = undisturbed
    folder = place / "torn"
    process = sessions(arguments(place, "torn"))
    while not (folder / "metrics.jsonl").exists() or len(run_folder.read_metrics(folder)) < 4:
        time.sleep(0.001)
    process.kill()
    process.join()
    book = folder / "run.ledger"
    good = book.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 4
    book.write_bytes(flipped)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    monkeypatch.setattr(sys, "argv", ["fedmezo", *arguments(place, "torn", "--resume")])
    with pytest.raises(SystemExit) as stop:
        _cli.run(fedmezo.main, fedmezo.Config, "")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "record of round" in line
    assert "bytes" in line
    after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {file.name for file in after if after[file] != before.get(file)} <= {"config.json"}
    assert book.read_bytes() == flipped
    book.write_bytes((whole / "run.ledger").read_bytes()[: len(good) + 40])  # a part of the next record
    _cli.run(fedmezo.main, fedmezo.Config, "")
    assert "cut short" in capsys.readouterr().out
    same_run(folder, whole)


def test_a_second_process_in_a_folder_is_refused(place, sessions, undisturbed, monkeypatch, capsys):
    process = sessions(arguments(place, "shared"))
    while not (place / "shared" / "run.ledger").exists():
        time.sleep(0.001)
    monkeypatch.setattr(sys, "argv", ["fedmezo", *arguments(place, "shared", "--resume")])
    with pytest.raises(SystemExit) as stop:
        _cli.run(fedmezo.main, fedmezo.Config, "")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another process is working in it" in line
    process.join()
    assert process.exitcode == 0
    same_run(place / "shared", undisturbed[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_run_in_one_line_and_it_goes_on_later(number, place, sessions, undisturbed):
    out, errors = f"stopped-{number}", place / f"stopped-{number}.txt"
    process = sessions(arguments(place, out), errors, None, False)
    while not (place / out / "run.ledger").exists():
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    assert errors.read_text() == f"stopped by {number.name}; go on with --resume\n"
    process = sessions(arguments(place, out, "--resume"))
    process.join()
    assert process.exitcode == 0
    same_run(place / out, undisturbed[0])


@pytest.mark.parametrize("room", [600, 2_500, 5_000])
def test_a_full_disk_costs_one_line_and_the_run_goes_on_later(room, place, sessions, undisturbed):
    """As the room grows it is the ledger's header or a checkpoint that finds none."""
    out, errors = f"full-{room}", place / f"full-{room}.txt"
    process = sessions(arguments(place, out), errors, room)
    process.join()
    assert process.exitcode == 2
    (line,) = errors.read_text().splitlines()
    assert line == f"error: {place / out}: the disk is full: make room, then go on with --resume"
    process = sessions(arguments(place, out, "--resume"))
    process.join()
    assert process.exitcode == 0
    same_run(place / out, undisturbed[0])
