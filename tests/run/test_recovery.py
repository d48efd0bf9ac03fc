"""Folders of runs whose files are damaged, cut, lost or mixed up: what can be recovered is, and a notice says how."""

import gc
import json
import os
import random
import resource
import shutil
import stat
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from fedmezo_jax.core import federated
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import rounds, run_checkpoints, run_folder
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.context import build
from fedmezo_jax.run.loop import train
from fedmezo_jax.run.prepare import prepare


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is taken from the user's cache, and nothing is left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMEZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("recovery")
    small_run.write_model(place / "model")
    small_run.write_data(place / "data.jsonl")
    return place


ALGORITHMS = {
    "fedmezo": {"personalize": "model-diff", "server_optimizer": "momentum"},
    "fedavg": {"algorithm": "fedavg", "server_optimizer": "momentum"},
}


def configuration(place, algorithm="fedmezo"):
    given = {"clients": 3, "rounds": 5, "local_steps": 2, "max_length": 64, "test_examples": 10, "length_buckets": 1}
    files = {"model": str(place / "model"), "data": str(place / "data.jsonl")}
    return paper_config(**files, **given, lora_rank=2, targets="v_proj", **ALGORITHMS[algorithm])


def start(folder, setup, **options):
    """Runs or resumes as the command does; returns the notices."""
    said = run_folder.check_folder(folder, setup.config, resume=True)
    folder.mkdir(exist_ok=True)
    run_folder.write_json(folder / "config.json", asdict(setup.config))
    train(setup, folder, checkpoint_every=2, eval_every=2, notify=said.append, **options)
    return said


@pytest.fixture(scope="module")
def runs(place):
    """For each algorithm a setup and the folder of its undisturbed run, with checkpoints of rounds 4 and 5."""
    found = {}
    for algorithm in ALGORITHMS:
        setup, folder = prepare(configuration(place, algorithm)), place / algorithm
        assert start(folder, setup) == []
        found[algorithm] = setup, folder
    return found


@pytest.fixture
def damaged(runs, tmp_path):
    """A copy of the undisturbed run of FedMeZO to damage."""
    return shutil.copytree(runs["fedmezo"][1], tmp_path / "run")


@pytest.fixture
def damaged_fedavg(runs, tmp_path):
    return shutil.copytree(runs["fedavg"][1], tmp_path / "run")


def content(folder):
    """All that a run leaves and that is no time."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untimed = [{key: value for key, value in record.items() if "seconds" not in key} for record in records]
    book = folder / "run.ledger"
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return untimed, weights, book.read_bytes() if book.exists() else None


def resumed(folder, run):
    """Goes on without the adapter of before; the run ends as the undisturbed one. Returns the notices."""
    setup, undisturbed = run
    shutil.rmtree(folder / "adapter")
    said = start(folder, setup)
    assert content(folder) == content(undisturbed)
    assert newest(folder, setup)[1] == {}
    return said


def newest(folder, setup):
    """The progress that a resumed run starts from, and why it is no later one."""
    (init, _), _ = build(setup)
    like = rounds.begin(init(setup.params, setup.config.clients), setup.config, 1.0)
    with run_checkpoints.manager(folder) as manager:
        found, reasons = run_checkpoints.newest(manager, like, lambda step, seal: None)
    return found and jax.device_get(found.progress), reasons


# Checkpoints


def files_of(checkpoint):
    return sorted(file for file in checkpoint.rglob("*") if file.is_file())


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def empty_half(checkpoint):
    """Not its seal, whose loss has a message of its own: Orbax's names are random, and so is the seal's place."""
    for file in [file for file in files_of(checkpoint) if file.name != run_checkpoints.SEAL][::2]:
        file.unlink()


def on_all(change):
    def damage(checkpoint):
        for file in files_of(checkpoint):
            file.write_bytes(change(file.read_bytes()))

    return damage


DAMAGES = {
    "truncated": on_all(lambda content: content[: len(content) // 2]),
    "emptied": on_all(lambda content: b""),
    "zeroed": on_all(lambda content: bytes(len(content))),
    "half of its files deleted": empty_half,
    "all of its files deleted": lambda checkpoint: [file.unlink() for file in files_of(checkpoint)],
}


@pytest.fixture(scope="module")
def known(runs, tmp_path_factory):
    """What the checkpoints hold, by round."""
    setup, folder = runs["fedmezo"]
    older = shutil.copytree(folder, tmp_path_factory.mktemp("older") / "run")
    shutil.rmtree(older / "checkpoints" / "5")
    held = {5: newest(folder, setup)[0], 4: newest(older, setup)[0]}
    assert [int(held[step].state.round) for step in held] == [5, 4]
    assert not np.array_equal(held[4].state.params["v_proj"]["B"], held[5].state.params["v_proj"]["B"])
    return held


def is_replaced(folder, setup, known):
    """Whether the older checkpoint takes the place of the newest; checks that what is read is right bit for bit."""
    progress, reasons = newest(folder, setup)
    step = int(progress.state.round)
    jax.tree.map(np.testing.assert_array_equal, progress, known[step])
    assert list(reasons) == [5][: 5 - step]
    return step == 4


def test_sixty_flipped_bits_of_a_checkpoint_are_noticed(damaged, known, runs, capfd):
    setup, draw = runs["fedmezo"][0], random.Random(7)
    files = files_of(damaged / "checkpoints" / "5")
    for _ in range(60):
        (file,) = draw.choices(files, [file.stat().st_size for file in files])
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        assert is_replaced(damaged, setup, known)
        flip(file, bit)
    assert not is_replaced(damaged, setup, known)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("room", [0, 100, 1_000, 30_000, 100_000])
def test_a_disk_that_is_full_while_a_checkpoint_is_saved_is_one_error(room, tmp_path, capfd):
    state = federated.FederatedState({"A": jnp.arange(9_000.0), "B": jnp.ones(9_000)}, (), {}, jnp.int32(1))
    progress = rounds.Progress(state, None, jnp.float32(1))
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with run_checkpoints.manager(tmp_path) as manager:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
        try:
            with pytest.raises(UserError, match="the disk is full"):
                run_checkpoints.save(manager, tmp_path, progress, None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()  # asyncio tells of errors that nobody asked for when their tasks are collected
    assert capfd.readouterr() == ("", "")
    with run_checkpoints.manager(tmp_path) as manager:
        run_checkpoints.save(manager, tmp_path, progress, None)
        found, reasons = run_checkpoints.newest(manager, progress, lambda step, seal: None)
    assert reasons == {}
    jax.tree.map(np.testing.assert_array_equal, found.progress, progress)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_gives_way_to_the_older_one(damage, damaged, known, runs, capfd):
    DAMAGES[damage](damaged / "checkpoints" / "5")
    assert is_replaced(damaged, runs["fedmezo"][0], known)
    assert capfd.readouterr() == ("", "")


def test_a_run_goes_on_from_the_older_checkpoint(damaged, runs):
    empty_half(damaged / "checkpoints" / "5")
    (damaged / ".adapter.0123").mkdir()
    (damaged / ".adapter.0123" / "adapter_model.safetensors").write_bytes(b"unfinished")
    bad, *_, last = resumed(damaged, runs["fedmezo"])
    assert bad.startswith(f"{damaged / 'checkpoints' / '5.old'}: this checkpoint of round 5 is not used: its file ")
    assert last.endswith("going on from the checkpoint of round 4; run.ledger rebuilds rounds 5 to 5")
    assert not list(damaged.glob(".adapter.*"))


def test_a_run_without_a_good_checkpoint_goes_on_from_the_ledger(damaged, runs):
    """One checkpoint is damaged, and the other is of another run."""
    empty_half(damaged / "checkpoints" / "4")
    shutil.rmtree(damaged / "checkpoints" / "5")
    shutil.copytree(runs["fedavg"][1] / "checkpoints" / "5", damaged / "checkpoints" / "5")
    said = resumed(damaged, runs["fedmezo"])
    assert "checkpoint of round 5 is not used: run.ledger has another record of that round" in said[0]
    assert "checkpoint of round 4 is not used: its file" in said[1]
    assert said[-1].endswith("going on from the start; run.ledger rebuilds rounds 1 to 5")


def test_a_checkpoint_that_the_ledger_does_not_reach_is_not_used(damaged, runs):
    book = damaged / "run.ledger"
    book.write_bytes(book.read_bytes()[:-1])
    cut, bad, *_, last = resumed(damaged, runs["fedmezo"])
    assert "the record of round 5 was cut short" in cut
    assert "checkpoint of round 5 is not used: run.ledger ends after round 4" in bad
    assert last.endswith("going on from the checkpoint of round 4")


def test_fedavg_goes_on_from_the_older_checkpoint(damaged_fedavg, runs):
    empty_half(damaged_fedavg / "checkpoints" / "5")
    said = resumed(damaged_fedavg, runs["fedavg"])
    assert said[-1].endswith("going on from the checkpoint of round 4")


def test_fedavg_without_a_checkpoint_starts_over_and_keeps_its_metrics(damaged_fedavg, runs):
    before = (damaged_fedavg / "metrics.jsonl").read_bytes()
    shutil.rmtree(damaged_fedavg / "checkpoints")
    kept, last = resumed(damaged_fedavg, runs["fedavg"])
    assert kept == f"{damaged_fedavg / 'metrics.jsonl.old'}: the metrics recorded before"
    assert last.endswith("going on from the start")
    assert (damaged_fedavg / "metrics.jsonl.old").read_bytes() == before


# Metrics, ledger and config.json

METRICS = {
    "last line cut": lambda content: content[:-20],
    "a line lost": lambda content: content[: content[:-1].rindex(b"\n") + 1],
    "one bad byte": lambda content: content[:200] + b"\xff" + content[201:],
    "another digit": lambda content: content.replace(b'"round": 2', b'"round": 3'),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", METRICS)
def test_damaged_metrics_are_made_again(damage, damaged, runs):
    file = damaged / "metrics.jsonl"
    before = METRICS[damage](file.read_bytes())
    file.write_bytes(before)
    said = resumed(damaged, runs["fedmezo"])
    assert "checkpoint of round 5 is not used: metrics.jsonl has changed since it was saved" in said[0]
    assert said[-1].endswith("to 5")
    assert (damaged / "metrics.jsonl.old").read_bytes() == before


def test_fedavg_with_damaged_metrics_goes_on_without_those(damaged_fedavg, runs):
    setup, undisturbed = runs["fedavg"]
    file = damaged_fedavg / "metrics.jsonl"
    file.write_bytes(METRICS["one bad byte"](file.read_bytes()))
    said = start(damaged_fedavg, setup)
    assert "checkpoint of round 5 is not used: metrics.jsonl lacks its test loss" in said[0]
    assert said[-1].endswith("going on from the checkpoint of round 4")
    records, weights, _ = content(damaged_fedavg)
    expected, undisturbed_weights, _ = content(undisturbed)
    assert (records, weights) == (expected[4:], undisturbed_weights)
    assert start(damaged_fedavg, setup) == []


@pytest.mark.parametrize("lost", [["run.ledger"], ["run.ledger", "checkpoints"], ["run.ledger", "metrics.jsonl"]])
def test_a_run_whose_ledger_is_lost_is_refused_and_left_alone(lost, damaged, runs):
    for name in lost:
        path = damaged / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (damaged / "checkpoints").mkdir(exist_ok=True)
    before = {file: file.read_bytes() for file in damaged.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"run\.ledger is missing.*another --out"):
        start(damaged, runs["fedmezo"][0])
    assert {file: file.read_bytes() for file in damaged.rglob("*") if file.is_file()} == before


CONFIGS = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:50],
    "zeroed": lambda content: bytes(len(content)),
    "another digit": lambda content: content.replace(b'"clients": 3', b'"clients": 1'),
    "nested without end": lambda content: b"[" * 100_000,
    "no object": lambda content: b"[]",
    "missing": None,
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_config_is_recovered_from_the_ledger(damage, damaged, runs):
    config, file = runs["fedmezo"][0].config, damaged / "config.json"
    if change := CONFIGS[damage]:
        file.write_bytes(change(file.read_bytes()))
    else:
        file.unlink()
    (notice,) = run_folder.check_folder(damaged, config, resume=True)
    assert notice == f"{file} was missing or damaged: its content is recovered from run.ledger"
    with pytest.raises(UserError, match="holds a run already"):
        run_folder.check_folder(damaged, config, resume=False)
    with pytest.raises(UserError, match=r"another configuration: .*seed \(0 there, 1 now\)"):
        run_folder.check_folder(damaged, replace(config, seed=1), resume=True)


def test_a_damaged_config_without_a_ledger_is_refused(damaged_fedavg, runs):
    (damaged_fedavg / "config.json").write_bytes(b"")
    with pytest.raises(UserError, match=r"config\.json is damaged and there is no run\.ledger"):
        run_folder.check_folder(damaged_fedavg, runs["fedavg"][0].config, resume=True)


@pytest.mark.parametrize("write", [lambda at: run_folder.write_json(at / "config.json", {}), None])
def test_a_file_is_on_the_disk_before_it_takes_its_place(write, tmp_path, monkeypatch):
    """Against a power loss: a file system may otherwise keep the new name and lose the content."""
    events, fsync, replaced = [], os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(stat.S_ISDIR(os.fstat(handle).st_mode)), fsync(handle))
    )
    monkeypatch.setattr(Path, "replace", lambda *paths: (events.append("replace"), replaced(*paths)))
    (write or (lambda at: run_folder.keep_metrics(at, 0, copy=False)))(tmp_path)
    assert events == [False, "replace", True]


def test_what_is_set_aside_never_takes_the_place_of_another(tmp_path):
    for content in "abc":
        (tmp_path / "file").write_text(content)
        run_folder.set_aside(tmp_path / "file")
    assert [(tmp_path / f"file.old{end}").read_text() for end in ("", "-2", "-3")] == ["a", "b", "c"]
