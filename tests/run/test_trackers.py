"""Trackers get every round once, whatever happens to the run, and the run is the same with them."""

import json
import sys
from types import SimpleNamespace

import pytest
import small_run

from experiments import fedmezo
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import trackers

RECORDS = [
    {
        "round": i,
        "train_loss": 1.0 / i if i != 2 else None,
        "participants": [0, 4, 7],
        "learning_rates": [0.5, 1.0],
        "failed": [{"attempt": 1, "client": 3, "why": "dropped out"}] * i,
        "diverged": i == 3,
        "clipped": i,
    }
    for i in range(1, 5)
]
CURVES = [
    {"train_loss": 1.0, "participants": 3, "learning_rates": 0.75, "failed": 1, "diverged": 0, "clipped": 1},
    {"participants": 3, "learning_rates": 0.75, "failed": 2, "diverged": 0, "clipped": 2},
    {"train_loss": 1 / 3, "participants": 3, "learning_rates": 0.75, "failed": 3, "diverged": 1, "clipped": 3},
    {"train_loss": 0.25, "participants": 3, "learning_rates": 0.75, "failed": 4, "diverged": 0, "clipped": 4},
]


def two_sessions(name, folder):
    """A run that stops after round 3, and goes on from a checkpoint of round 2."""
    for records in (RECORDS[:3], RECORDS):
        with trackers.opened(name, folder, {"rounds": 4}) as log:
            for record in records:
                log(record)


def events(folder):
    """What TensorBoard reads: by step, name and value; a step that occurs twice would be in two pairs."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = folder.glob("tensorboard/events.out.tfevents.*")
    found = [event for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
    return [(event.step, {value.tag: number(value) for value in event.summary.value}) for event in found]


def number(value):
    return value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value


def test_tensorboard_reads_one_curve(tmp_path):
    pytest.importorskip("tensorboard")
    two_sessions("tensorboard", tmp_path)
    found = events(tmp_path)
    assert [step for step, _ in found] == [1, 2, 3, 4]
    for (_, values), expected in zip(found, CURVES, strict=True):
        assert values == pytest.approx(expected, rel=1e-6)


def test_trackio_s_database_has_one_curve(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    two_sessions("trackio", tmp_path / "mine")
    two_sessions("trackio", tmp_path / "other" / "mine")  # another run of the same name
    storage = sqlite_storage.SQLiteStorage
    names = storage.get_runs("fedmezo")
    assert len(set(names)) == len(names) == 2
    for name in names:
        found = [{key: row[key] for key in row.keys() - {"timestamp"}} for row in storage.get_logs("fedmezo", name)]
        assert found == [{**curve, "step": step} for step, curve in enumerate(CURVES, 1)]


def test_wandb_is_told_each_round_of_one_run(tmp_path, monkeypatch):
    """By a stand-in; like the service, it ignores steps that a run has."""
    runs, finished = {}, []

    def init(*, project, id, name, dir, config, resume):
        assert (project, resume, dir, config) == ("fedmezo", "allow", tmp_path, {"rounds": 4})
        logged = runs.setdefault(id, {})
        return SimpleNamespace(
            log=lambda values, step: logged.setdefault(step, values), finish=lambda: finished.append(id)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    two_sessions("wandb", tmp_path)
    (logged,) = runs.values()
    assert logged == dict(enumerate(CURVES, 1))
    assert len(finished) == 2


def test_a_missing_tracker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--track trackio needs trackio: pip install trackio"):
        fedmezo.main(fedmezo.Config(None, out=tmp_path / "out", track="trackio"))
    assert not (tmp_path / "out").exists()


def test_a_tracked_run_that_is_stopped_and_resumed_is_the_run_itself(tmp_path_factory, monkeypatch):
    pytest.importorskip("tensorboard")
    with small_run.place(tmp_path_factory, "tracked") as place:
        run = small_run.configuration(place)

        def main(name, **options):
            fedmezo.main(fedmezo.Config(run, out=place / name, checkpoint_every=2, check_rate=False, **options))

        main("plain")
        curves = trackers.curves

        def stop(record):
            if record["round"] == 3:
                raise KeyboardInterrupt
            return curves(record)

        monkeypatch.setattr(trackers, "curves", stop)
        with pytest.raises(KeyboardInterrupt):
            main("tracked", track="tensorboard")
        monkeypatch.setattr(trackers, "curves", curves)
        assert [step for step, _ in events(place / "tracked")] == [1, 2]
        main("tracked", track="tensorboard", resume=True)
        for file in ("run.ledger", "config.json", "adapter/adapter_model.safetensors"):
            assert (place / "tracked" / file).read_bytes() == (place / "plain" / file).read_bytes()
        records = [json.loads(line) for line in (place / "tracked" / "metrics.jsonl").read_text().splitlines()]
        found = events(place / "tracked")
        assert [step for step, _ in found] == [record["round"] for record in records] == [1, 2, 3, 4]
        for (_, values), record in zip(found, records, strict=True):
            assert values["train_loss"] == pytest.approx(record["train_loss"], rel=1e-6)
            assert values["uplink_bytes"] == record["uplink_bytes"]
