"""Cached hidden states: what they are, which are computed, and that a damaged or foreign record is not used."""

import dataclasses
import errno
import os
from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
from llama_cases import load, random_lora, random_rows

from fedmezo_jax.data.examples import HiddenBatch, TokenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama import prefix
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.llama.model import Llama

CASE = "2 key/value heads, untied"


@dataclass
class Setting:
    """A model, its examples, and the tokens of every example that was computed."""

    model: Llama
    base: dict
    rows: TokenBatch
    folder: object
    computed: list = field(default_factory=list)
    loaded: int = 0

    def states(self, *, model=None, base_hash="a", tokens=None, expected=1):
        tokens = self.rows.tokens if tokens is None else tokens
        return prefix.HiddenStates(self.below(model or self.model, base_hash), tokens, expected, self.folder)

    def below(self, model, base_hash="a"):
        setting = self

        class Counted(prefix.Prefix):
            def __call__(self, tokens):
                setting.computed.extend(map(bytes, tokens))
                return super().__call__(tokens)

        def load():
            self.loaded += 1
            return self.base

        return Counted(model, jax.device_put(self.base), base_hash, load)


@pytest.fixture
def setting(tmp_path):
    config, base = load(CASE)
    first = config.num_hidden_layers - 1
    rows = TokenBatch(*jax.device_get(random_rows(19)))
    return Setting(Llama(config, 1.75, trained=(first,)), base, rows, tmp_path / "hidden")


@pytest.fixture
def in_file(setting, monkeypatch):
    monkeypatch.setattr(prefix, "IN_MEMORY", 0)
    return setting


def everyone(setting):
    return np.arange(len(setting.rows.tokens))


def test_a_step_from_cached_states_and_the_trained_part_has_the_loss_of_the_whole_model(setting):
    model, base = setting.model, setting.base
    lora = jax.tree.map(lambda leaf: leaf[1:], random_lora(model.config, ("q_proj", "down_proj")))
    states, rest = HiddenBatch(setting.states()[everyone(setting)], *setting.rows[1:]), prefix.trained_part(model, base)
    assert "embed_tokens" not in rest
    assert {leaf.shape[0] for leaf in jax.tree.leaves(rest["layers"])} == {1}
    expected = jax.jit(loss_of(model, base))(lora, setting.rows)
    np.testing.assert_allclose(jax.jit(loss_of(model, rest))(lora, states), expected, rtol=1e-6)
    assert not setting.folder.exists()  # a few kilobytes stay in memory


def test_a_tied_head_keeps_its_table():
    config, base = load("1 key/value heads, tied")
    assert "embed_tokens" in prefix.trained_part(Llama(config, trained=(1,)), base)


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_only_the_examples_that_are_asked_for_are_computed_and_each_once(setting, monkeypatch, kept):
    if kept == "in a file":
        monkeypatch.setattr(prefix, "IN_MEMORY", 0)
    states = setting.states()
    states.compute(np.array([5, 2, 5]))
    assert setting.computed == [bytes(setting.rows.tokens[i]) for i in (2, 5)]
    picked = states[np.array([[5, 2], [7, 5]])]
    assert picked.shape == (2, 2, *states.shape[1:])
    np.testing.assert_array_equal(picked[0, 0], picked[1, 1])
    np.testing.assert_array_equal(states[5:6][0], picked[0, 0])
    np.testing.assert_array_equal(states[5], picked[0, 0])
    assert states[:0].shape == (0, *states.shape[1:])
    assert setting.computed[2:] == [bytes(setting.rows.tokens[7])]


def test_the_others_beside_an_example_do_not_change_its_states(setting):
    together = setting.states()[everyone(setting)]
    for i in (0, 4, len(together) - 1):
        np.testing.assert_array_equal(setting.states()[np.array([i])][0], together[i])


def test_the_weights_that_were_let_go_are_loaded_for_an_example_that_nobody_foresaw(setting):
    below = setting.below(setting.model)
    states = prefix.HiddenStates(below, setting.rows.tokens, 1, setting.folder)
    states.compute(np.array([0]))
    below.release()
    assert states[np.array([0])].any()
    assert setting.loaded == 0
    np.testing.assert_array_equal(states[np.array([3])], setting.states()[np.array([3])])
    assert setting.loaded == 1


def test_a_file_holds_the_same_states_and_is_used_again(in_file, monkeypatch):
    first = in_file.states()[everyone(in_file)]
    count = len(in_file.computed)
    np.testing.assert_array_equal(in_file.states()[everyone(in_file)], first)
    assert len(in_file.computed) == count == len(first)
    monkeypatch.setattr(prefix, "IN_MEMORY", 1 << 30)
    np.testing.assert_array_equal(in_file.states()[everyone(in_file)], first)
    assert len(list(in_file.folder.iterdir())) == 1


def test_other_weights_tokens_cuts_precisions_and_configs_have_files_of_their_own(in_file):
    every, variants = everyone(in_file), ({}, {"base_hash": "b"}, {"tokens": in_file.rows.tokens[::-1]})
    other = dataclasses.replace(in_file.model.config, family="mistral", sliding_window=4, layers_with_window=(0, 1))
    models = [
        in_file.model.clone(**changed)
        for changed in ({"trained": (0, 1)}, {"precision": "bfloat16"}, {"config": other})
    ]
    for changed in (*variants, *({"model": model} for model in models)):
        in_file.states(**changed)[every]
    assert len(in_file.computed) == 6 * len(every)
    assert len(list(in_file.folder.iterdir())) == 6


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "another file", "records swapped"])
def test_a_damaged_record_is_computed_anew(in_file, damage):
    expected = in_file.states()[everyone(in_file)]
    (file,) = in_file.folder.iterdir()
    content, count = bytearray(file.read_bytes()), len(expected)
    size = len(content) // count
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 4
    elif damage == "cut short":
        content = content[:-8]
    elif damage == "another file":
        content = bytearray(b"\x80\x04K\x01.") * 99
    else:
        content[:size], content[size : 2 * size] = content[size : 2 * size], content[:size]
    file.write_bytes(content)
    in_file.computed.clear()
    np.testing.assert_array_equal(in_file.states()[everyone(in_file)], expected)
    assert len(in_file.computed) == {"another file": count, "records swapped": 2}.get(damage, 1)


def test_a_full_disk_is_one_clear_line(in_file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"hidden: cannot hold .*No space left.*FEDMEZO_CACHE"):
        in_file.states()[everyone(in_file)]


def test_long_work_says_how_far_it_is(setting, monkeypatch):
    monkeypatch.setattr(prefix, "_SECONDS", -1)
    lines = []
    setting.states().compute(np.arange(3), lines.append)
    assert lines == [f"hidden states below layer 1: {done} of 3" for done in range(3)]
