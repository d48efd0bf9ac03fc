"""Cached hidden states: what they are, which are computed, and that a damaged or foreign record is not used."""

import dataclasses
import errno
import os
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import jax
import make_goldens
import numpy as np
import pytest
from llama_cases import random_lora, random_rows, write_case
from weight_files import weights_of, write_in

from fedmezo_jax.core.tree_hash import tree_hash
from fedmezo_jax.data.examples import HiddenBatch, TokenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama import prefix
from fedmezo_jax.llama.checkpoints.stored_base import StoredBase
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.llama.model import Llama

CASE = "ministral, window in one layer"


@dataclass
class Setting:
    """A model, its examples, and the tokens of every example that was computed."""

    model: Llama
    stored: StoredBase
    rows: TokenBatch
    folder: Path
    computed: list = field(default_factory=list)

    def states(self, *, model=None, base_hash="a", tokens=None, expected=1):
        tokens = self.rows.tokens if tokens is None else tokens
        return prefix.HiddenStates(self.below(model or self.model, base_hash), tokens, expected, self.folder)

    def below(self, model, base_hash="a"):
        setting = self

        class Counted(prefix.Prefix):
            def __call__(self, tokens, notify):
                setting.computed.extend(map(bytes, tokens))
                return super().__call__(tokens, notify)

        return Counted(model, self.stored, base_hash, self.folder)


@pytest.fixture
def setting(tmp_path):
    folder = write_case(tmp_path / "model", CASE)
    config = LlamaConfig.from_json(folder)
    rows = TokenBatch(*jax.device_get(random_rows(19)))
    model = Llama(config, 1.75, trained=(config.num_hidden_layers - 1,))
    return Setting(model, StoredBase(folder, config), rows, tmp_path / "hidden")


@pytest.fixture
def in_file(setting, monkeypatch):
    monkeypatch.setattr(prefix, "IN_MEMORY", 0)
    return setting


def everyone(setting):
    return np.arange(len(setting.rows.tokens))


def test_a_step_from_cached_states_and_the_trained_part_has_the_loss_of_the_whole_model(setting):
    model, base = setting.model, setting.stored.load()
    lora = jax.tree.map(lambda leaf: leaf[2:], random_lora(model.config, ("q_proj", "down_proj")))
    states, rest = HiddenBatch(setting.states()[everyone(setting)], *setting.rows[1:]), prefix.trained_part(model, base)
    jax.tree.map(np.testing.assert_array_equal, setting.stored.load_from(2)[0], rest)
    assert "embed_tokens" not in rest
    assert {leaf.shape[0] for leaf in jax.tree.leaves(rest["layers"])} == {1}
    expected = jax.jit(loss_of(model, base))(lora, setting.rows)
    np.testing.assert_allclose(jax.jit(loss_of(model, rest))(lora, states), expected, rtol=1e-6)
    assert not setting.folder.exists()  # a few kilobytes stay in memory


@pytest.mark.parametrize("case", ["2 key/value heads, untied", CASE, "smollm3, window", "qwen3, yarn"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layers_that_are_read_one_at_a_time_give_the_states_of_the_whole_model(tmp_path, monkeypatch, case, precision):
    folder = write_case(tmp_path / "model", case)
    config = LlamaConfig.from_json(folder)
    stored = StoredBase(folder, config, precision)
    model = Llama(config, precision=precision, trained=(config.num_hidden_layers - 1,))
    tokens = np.asarray(random_rows(19).tokens)
    expected = jax.jit(
        lambda base, rows: jax.lax.map(lambda row: model.apply({"params": base}, row[None], method="prefix")[0], rows)
    )(stored.load(), tokens)
    for layers_at_once, in_memory in ((1 << 30, 1 << 30), (1, 1 << 30), (1, 0)):
        monkeypatch.setattr(prefix, "LAYERS_AT_ONCE", layers_at_once)
        monkeypatch.setattr(prefix, "IN_MEMORY", in_memory)
        states = list(prefix.Prefix(model, stored, "a", tmp_path / "hidden")(tokens))
        np.testing.assert_array_equal(states, expected)


def test_the_whole_model_is_never_in_memory(tmp_path, monkeypatch):
    """NumPy's arrays, among them the weights held, which JAX on the CPU uses without a copy; and JAX's own."""
    raw = make_goldens.SIZES | {"model_type": "llama", "num_hidden_layers": 60, "intermediate_size": 4096}
    folder = write_in("safetensors", tmp_path / "model", raw, weights_of(raw))
    config = LlamaConfig.from_json(folder)
    stored = StoredBase(folder, config)
    model = Llama(config, trained=(59,))
    monkeypatch.setattr(prefix, "_SECONDS", -1)
    tokens = np.asarray(random_rows(40).tokens)
    layer, states = stored.layer_bytes, 4 * tokens.size * config.hidden_size

    def in_use():
        return sum(array.nbytes for array in jax.live_arrays())

    def peak(layers_at_once):
        monkeypatch.setattr(prefix, "LAYERS_AT_ONCE", layers_at_once)
        tracemalloc.start()
        before = in_use()
        held, base_hash = stored.load_from(59)
        below = prefix.Prefix(model, stored, base_hash, tmp_path)
        live = []
        for _ in below(tokens, lambda _: live.append(in_use() - before)):
            pass
        del held
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, max(live)

    peak(layer)  # what is traced of imports and compilation does not count
    host, device = peak(layer)
    assert host < (2 + 2 / 3) * layer + 3 * states  # the last layer, another, and a tensor that is read and checked
    assert device < 2 * layer + 3 * states
    assert peak(59 * layer) > (59 * layer, 59 * layer)


def test_the_hash_is_that_of_all_weights_whatever_is_held(setting):
    whole = setting.stored.load()
    for first in (0, 1, 3):
        held, found = setting.stored.load_from(first)
        assert found == tree_hash(whole)
        assert {leaf.shape[0] for leaf in jax.tree.leaves(held["layers"])} == {3 - first}


def test_a_tied_head_keeps_its_table(tmp_path):
    folder = write_case(tmp_path / "model", "1 key/value heads, tied")
    stored = StoredBase(folder, LlamaConfig.from_json(folder))
    kept, _ = stored.load_from(1)
    expected = prefix.trained_part(Llama(stored.config, trained=(1,)), stored.load())
    jax.tree.map(np.testing.assert_array_equal, kept, expected)
    assert "embed_tokens" in kept


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


def test_an_example_that_nobody_foresaw_is_computed_when_it_is_asked_for(setting):
    states = setting.states()
    states.compute(np.array([0]))
    assert states[np.array([0])].any()
    assert len(setting.computed) == 1
    np.testing.assert_array_equal(states[np.array([3])], setting.states()[np.array([3])])


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
        for changed in ({"trained": (1, 2)}, {"precision": "bfloat16"}, {"config": other})
    ]
    for changed in (*variants, *({"model": model} for model in models)):
        in_file.states(**changed)[every]
    assert len(in_file.computed) == 6 * len(every)
    assert len(list(in_file.folder.iterdir())) == 6


@pytest.mark.parametrize("in_memory", [0, 1 << 30])
def test_states_in_bfloat16_are_rounded_once_and_have_a_file_of_their_own(setting, monkeypatch, in_memory):
    monkeypatch.setattr(prefix, "IN_MEMORY", in_memory)
    exact, every = setting.states()[everyone(setting)], everyone(setting)
    below = setting.below(setting.model)
    for _ in range(2):
        states = prefix.HiddenStates(below, setting.rows.tokens, 1, setting.folder, "bfloat16")[every]
        np.testing.assert_array_equal(states, exact.astype(jax.numpy.bfloat16))
        assert states.itemsize == 2
    assert not in_memory or not setting.folder.exists()
    if not in_memory:
        small, large = sorted(file.stat().st_size for file in setting.folder.iterdir())
        assert small - 32 * len(every) == (large - 32 * len(every)) / 2


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "another file", "of another base", "records swapped"])
def test_a_damaged_record_is_computed_anew(in_file, damage):
    expected = in_file.states()[everyone(in_file)]
    (file,) = in_file.folder.iterdir()
    content, count = bytearray(file.read_bytes()), len(expected)
    size = len(content) // count
    if damage == "of another base":
        in_file.states(base_hash="b")[everyone(in_file)]
        (other,) = set(in_file.folder.iterdir()) - {file}
        content = other.read_bytes()
    elif damage == "a flipped bit":
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
    anew = {"another file": count, "of another base": count, "records swapped": 2}
    assert len(in_file.computed) == anew.get(damage, 1)


def test_a_full_disk_is_one_clear_line(in_file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"hidden: cannot hold .*No space left.*FEDMEZO_CACHE"):
        in_file.states()[everyone(in_file)]


def test_long_work_says_how_far_it_is(setting, monkeypatch):
    monkeypatch.setattr(prefix, "_SECONDS", -1)
    lines = []
    setting.states().compute(everyone(setting), lines.append)
    assert lines == [f"hidden states below layer 2: {share}" for share in ("84%", "100%")]  # 16 and 19 of 19
