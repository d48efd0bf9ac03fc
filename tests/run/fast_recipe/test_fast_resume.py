"""Runs of the fast recipe that are stopped and gone on with."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from fast_runs import FACTORS, ROUNDS, TAKEN, begun, content, poison, script, start

from fedmezo_jax.run import automatic_rate, ledger, rounds, run_folder
from fedmezo_jax.run.replay import largest_difference, replay


class StopError(Exception):
    """The power cut."""


def cut_after(patch, count):
    """The power goes when the ledger has ``count`` rounds: the last one is in no metrics and in no checkpoint."""
    append = ledger.Ledger.append

    def cut(book, entry):
        chain = append(book, entry)
        if book.rounds == count:
            raise StopError
        return chain

    patch.setattr(ledger.Ledger, "append", cut)


SETTINGS = {
    "steady": lambda patch, first: None,
    "scripted": script,
    "lost": lambda patch, first: poison(patch),
}


def stopped_and_resumed(setup, folder, setting, stop, monkeypatch):
    """Stopped after a record of the ledger, and gone on with."""
    with monkeypatch.context() as patch:
        setting(patch, 0)
        cut_after(patch, stop)
        with pytest.raises(StopError):
            start(folder, setup)
    assert begun(folder) == stop
    assert len(run_folder.read_metrics(folder)) == stop - 1
    searched, choose = [], automatic_rate.choose_step
    with monkeypatch.context() as patch:
        setting(patch, stop)
        patch.setattr(automatic_rate, "first_rate", lambda *_: pytest.fail("the rate was measured again"))
        patch.setattr(automatic_rate, "choose_step", lambda *given: searched.append(1) or choose(*given))
        run = start(folder, setup)
    # What is in the ledger is decided, and a round without usable numbers has no update to search along.
    assert len(searched) == sum(bool(entry.weights.any()) for entry in run.entries[stop:])
    return run


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_ends_as_an_undisturbed_one(name, stop, request, setup, tmp_path, monkeypatch):
    expected = request.getfixturevalue(name)
    run = stopped_and_resumed(setup, tmp_path / "run", SETTINGS[name], stop, monkeypatch)
    assert content(run.folder) == content(expected.folder)
    assert (run.result.loss_before, run.result.loss_after) == (expected.result.loss_before, expected.result.loss_after)


def test_the_ledger_alone_makes_the_run_again(run, tmp_path, monkeypatch):
    """Without checkpoints, the clients' work and validation losses."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(folder / name)
    for module, name in ((automatic_rate, "first_rate"), (automatic_rate, "choose_step"), (rounds, "run_round")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the ledger was not used"))
    again = start(folder, run.setup)
    assert len(again.thetas) == ROUNDS
    assert content(folder) == content(run.folder)


def test_momentum_and_the_clients_own_rates_are_rebuilt_too(setup, tmp_path, monkeypatch):
    """Both hang on what earlier rounds were, those among them that were taken in part or not at all."""
    ours = setup._replace(config=replace(setup.config, personalize="model-diff", server_optimizer="momentum"))
    with monkeypatch.context() as patch:
        script(patch)
        whole = start(tmp_path / "whole", ours)
    assert [entry.step for entry in whole.entries] == TAKEN
    assert any(len(set(entry.learning_rates)) > 1 for entry in whole.entries)
    resumed = stopped_and_resumed(ours, tmp_path / "cut", script, 3, monkeypatch)
    assert content(resumed.folder) == content(whole.folder)
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(resumed.folder / name)
    start(resumed.folder, ours)
    assert content(resumed.folder) == content(whole.folder)
    assert largest_difference(replay(whole.folder / "run.ledger").params, whole.result.params) is None


def test_a_run_that_sends_its_lora_is_the_same_run(setup, steady, tmp_path, monkeypatch):
    """The server reconstructs with the program that the clients use, so it is the same adapter bit for bit."""
    ours = setup._replace(config=replace(setup.config, uplink="lora"))
    whole = start(tmp_path / "whole", ours)
    assert largest_difference(whole.result.params, steady.result.params) is None
    assert largest_difference(replay(whole.folder / "run.ledger").params, whole.result.params) is None
    resumed = stopped_and_resumed(ours, tmp_path / "cut", SETTINGS["steady"], 3, monkeypatch)
    assert content(resumed.folder) == content(whole.folder)


def test_back_propagation_finds_its_rate_and_goes_on_after_a_stop(setup, tmp_path):
    ours = setup._replace(config=replace(setup.config, algorithm="fedavg"))
    whole = start(tmp_path / "whole", ours)
    assert whole.result.loss_after < whole.result.loss_before
    rate = np.float32(whole.result.metrics[0]["learning_rates"][0])
    for record in whole.result.metrics:
        np.testing.assert_array_equal(np.float32(record["learning_rates"]), rate)
        rate = rate * np.float32(FACTORS[record["server_step"]])

    def cut(record):
        if record["round"] == 3:
            raise StopError

    with pytest.raises(StopError):
        start(tmp_path / "cut", ours, on_round=cut)
    start(tmp_path / "cut", ours)
    assert content(tmp_path / "cut") == content(whole.folder)
