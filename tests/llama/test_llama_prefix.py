"""Cached hidden states: what they are, and that a damaged or foreign file is not used."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from llama_cases import load, random_lora, random_rows

from fedmezo_jax.llama import prefix
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.llama.model import Llama

CASE = "2 key/value heads, untied"


@dataclass
class Setting:
    model: Llama
    base: dict
    rows: object
    folder: object

    def states(self, **changed):
        given = {"model": self.model, "base": self.base, "rows": self.rows, "folder": self.folder, "base_hash": "a"}
        return prefix.hidden_states(**(given | changed))


@pytest.fixture
def setting(tmp_path):
    config, base = load(CASE)
    first = config.num_hidden_layers - 1
    return Setting(Llama(config, 1.75, trained=(first,)), base, jax.device_get(random_rows(19)), tmp_path / "hidden")


def test_a_step_from_cached_states_and_the_trained_part_has_the_loss_of_the_whole_model(setting):
    model, base = setting.model, setting.base
    lora = jax.tree.map(lambda leaf: leaf[1:], random_lora(model.config, ("q_proj", "down_proj")))
    states, rest = setting.states(), prefix.trained_part(model, base)
    assert "embed_tokens" not in rest
    assert {leaf.shape[0] for leaf in jax.tree.leaves(rest["layers"])} == {1}
    expected = jax.jit(loss_of(model, base))(lora, setting.rows)
    np.testing.assert_allclose(jax.jit(loss_of(model, rest))(lora, states), expected, rtol=1e-6)
    assert not setting.folder.exists()  # a few kilobytes stay in memory


def test_a_tied_head_keeps_its_table():
    config, base = load("1 key/value heads, tied")
    assert "embed_tokens" in prefix.trained_part(Llama(config, trained=(1,)), base)


@pytest.fixture
def computed(monkeypatch):
    """Everything goes to a file; counts how often it is computed."""
    monkeypatch.setattr(prefix, "IN_MEMORY", 0)
    calls, compute = [], prefix._compute
    monkeypatch.setattr(prefix, "_compute", lambda *given: (calls.append(1), compute(*given))[1])
    return calls


def test_a_file_holds_the_same_states_and_is_used_again(setting, computed, monkeypatch):
    first = setting.states()
    again = setting.states()
    assert len(computed) == 1
    assert isinstance(first.hidden, np.memmap)
    monkeypatch.setattr(prefix, "IN_MEMORY", 1 << 30)
    for states in (first, again):
        np.testing.assert_array_equal(states.hidden, setting.states().hidden)
    assert sorted(path.suffix for path in setting.folder.iterdir()) == [".blake2b", ".npy"]


def test_other_weights_tokens_cuts_and_precisions_have_files_of_their_own(setting, computed):
    setting.states()
    setting.states(base_hash="b")
    setting.states(rows=setting.rows._replace(tokens=setting.rows.tokens[::-1]))
    setting.states(model=setting.model.clone(trained=(0, 1)))
    setting.states(model=setting.model.clone(precision="bfloat16"))
    assert len(computed) == 5
    assert len(list(setting.folder.glob("*.npy"))) == 5


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "no checksum", "another array", "a pickle"])
def test_a_damaged_file_is_computed_anew(setting, computed, damage):
    expected = np.array(setting.states().hidden)
    (file,) = setting.folder.glob("*.npy")
    content = bytearray(file.read_bytes())
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "cut short":
        file.write_bytes(content[:-8])
    elif damage == "no checksum":
        file.with_suffix(".blake2b").unlink()
    else:
        other = np.zeros(3) if damage == "another array" else np.array([{}], object)
        np.save(file, other, allow_pickle=True)
        file.with_suffix(".blake2b").write_text(prefix._checksum(file))
    np.testing.assert_array_equal(setting.states().hidden, expected)
    assert len(computed) == 2
