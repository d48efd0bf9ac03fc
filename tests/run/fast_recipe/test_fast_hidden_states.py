"""Runs from hidden states, and what commands make of an adapter of some layers."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from fast_runs import command, content, results, start

from experiments import evaluate, generate, merge
from experiments import replay as replay_command
from fedmezo_jax.data.examples import HiddenBatch, TokenBatch
from fedmezo_jax.run import messages
from fedmezo_jax.run.prepare import OpenModel, prepare
from fedmezo_jax.run.replay import largest_difference


def test_from_hidden_states_or_from_tokens_it_is_the_same_run_up_to_rounding(config, setup, steady, tmp_path):
    """A cached state is what the frozen layers give in a program of their own, which XLA may fuse and sum in another
    order: some 1e-7 of a float32 loss, and of its slopes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenModel, "first", 0)
        whole = prepare(replace(config, layers="last:1"))
    run = start(tmp_path / "whole", whole._replace(config=config))
    assert isinstance(whole.task.train, TokenBatch)
    assert isinstance(setup.task.train, HiddenBatch)
    assert [entry.step for entry in run.entries] == [entry.step for entry in steady.entries]
    for ours, theirs in zip(run.entries, steady.entries, strict=True):
        for one, other in zip(ours.updates, theirs.updates, strict=True):
            one, other = messages.unpack_update(one), messages.unpack_update(other)
            size = np.sqrt(np.mean(other.projected_gradients**2))
            np.testing.assert_allclose(one.projected_gradients, other.projected_gradients, rtol=0, atol=1e-4 * size)
            np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
    assert run.result.loss_after == pytest.approx(steady.result.loss_after, rel=1e-5)
    assert (largest_difference(run.result.params, steady.result.params) or 0) < 1e-4


def test_the_device_holds_the_layers_from_the_first_trained_one_on_alone(setup):
    assert {leaf.shape[0] for leaf in jax.tree.leaves(setup.task.base["layers"])} == {1}
    assert set(setup.task.base) == {"layers", "norm", "lm_head"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(setup.params)} == {1}


def test_other_commands_take_an_adapter_of_some_layers(config, steady, tmp_path, monkeypatch, capsys):
    adapter = steady.folder / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    merged = tmp_path / "merged"
    assert command(merge, monkeypatch, "--model", config.model, "--adapter", adapter, "--out", merged) == 0
    data = ("--data", config.data, "--max-length", 64, "--test-examples", 10)
    subjects = {"adapter": ("--model", config.model, "--adapter", adapter), "merged": ("--model", merged)}
    said = {}
    assert command(evaluate, monkeypatch, *subjects["adapter"], *data, "--out", tmp_path / "loss") == 0
    assert results(tmp_path / "loss")[0]["value"] == pytest.approx(steady.result.loss_after, rel=1e-5)
    for name, subject in subjects.items():
        asked = ("--prompt", "first red green", "--prompt", "both sun moon", "--instruct", "--max-new-tokens", 8)
        assert command(generate, monkeypatch, *subject, *asked, "--out", tmp_path / name) == 0
        said[name] = results(tmp_path / name)
    assert said["adapter"] == said["merged"]
    book, out = steady.folder / "run.ledger", tmp_path / "replayed"
    assert command(replay_command, monkeypatch, book, "--out", out) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in (out / "adapter").iterdir()} == content(steady.folder)[1]
