"""Rows that are too long, and tokens kept from one run to the next."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from token_data import make_tokenizer

from fedmezo_jax.data import encode as module
from fedmezo_jax.data.encode import encode
from fedmezo_jax.data.examples import Chat, Example, Message
from fedmezo_jax.data.synthetic.bundled import bundled
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.registry import load_tokenizer
from fedmezo_jax.llama.tokenizers.lazy import LazyTokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(pad_token="<pad>")


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip((*one.rows, *one[1:]), (*other.rows, *other[1:]), strict=True))


def test_overlong_examples_are_truncated_if_a_label_is_left_and_counted(tokenizer):
    examples = [
        Example("Hi.", "", "Ho.", ""),
        Example("Hi.", "", "Ho. " * 200, ""),
        Example("Hi. " * 200, "", "Ho.", ""),
    ]
    whole = encode(examples, tokenizer, 5000)
    assert (whole.skipped, whole.truncated) == (0, 0)
    first = int(whole.rows.label_positions[1, 0])  # the last token of the prompt, and so of room without a label
    for room, cut in ((first + 60, 1), (first + 2, 2)):
        encoded = encode(examples, tokenizer, room, overlong="truncate")
        assert encoded.kept.tolist() == [0, 1]
        assert (encoded.skipped, encoded.truncated) == (1, cut)
        assert encoded.rows.tokens.shape[1] <= room
        labels = int(encoded.rows.label_weights[1].sum())
        assert labels == room - first - 1
        assert encoded.rows.tokens[1, :room].tolist() == whole.rows.tokens[1, :room].tolist()
        assert encoded.rows.labels[1, :labels].tolist() == whole.rows.labels[1, :labels].tolist()
    assert encode(examples, tokenizer, first + 60).kept.tolist() == [0]
    with pytest.raises(UserError, match=rf"no row fits into {first + 1} tokens"):
        encode(examples[1:], tokenizer, first + 1, overlong="truncate")


def test_every_row_has_a_label_whatever_the_cut(tokenizer):
    tokenizer = make_tokenizer(pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    chats = [
        Chat((Message("user", "a " * n), Message("assistant", "b " * n), Message("user", "c " * n)), "")
        for n in range(1, 30)
    ]
    for room in range(8, 60):
        encoded = encode(chats, tokenizer, room, overlong="truncate")
        assert (encoded.rows.label_weights.sum(axis=1) >= 1).all()
        assert len(encoded.kept) + encoded.skipped == len(chats)
        assert encoded.rows.label_positions.max() + 2 <= room


def test_tokens_are_kept_by_content_and_tokenizer(tokenizer, tmp_path, monkeypatch):
    examples = bundled(0, 50)
    calls = []
    original = module._tokenise_pairs
    monkeypatch.setattr(module, "_tokenise_pairs", lambda *args, **named: calls.append(1) or original(*args, **named))
    first = encode(examples, tokenizer, 500, cache=tmp_path)
    assert len(calls) == 1
    assert equal(encode(examples, tokenizer, 500, cache=tmp_path), first)
    short = encode(examples, tokenizer, 80, overlong="truncate", cache=tmp_path)  # the same tokens, cut otherwise
    assert len(calls) == 1
    assert equal(short, encode(examples, tokenizer, 80, overlong="truncate"))
    calls.clear()
    changed = [examples[0]._replace(response=examples[0].response + "!"), *examples[1:]]
    others = {
        "content": (changed, tokenizer, "alpaca"),
        "order": (examples[::-1], tokenizer, "alpaca"),
        "style": (examples, tokenizer, "plain"),
        "begin": (examples, make_tokenizer(begin=True, pad_token="<pad>"), "alpaca"),
        "end": (examples, make_tokenizer(pad_token="<pad>", eos_token="<pad>"), "alpaca"),
        "padding": (examples, make_tokenizer(), "alpaca"),
    }
    for what, (given, by, style) in others.items():
        kept = encode(given, by, 500, style=style, cache=tmp_path)
        assert calls, what
        assert equal(kept, encode(given, by, 500, style=style)), what
        calls.clear()


def test_another_template_gives_other_tokens(tmp_path):
    tokenizer = make_tokenizer(pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    first = encode(bundled(0, 5), tokenizer, 500, style="chat", cache=tmp_path)
    tokenizer.chat_template = TEMPLATE.replace(": ", " says ")
    assert not equal(first, encode(bundled(0, 5), tokenizer, 500, style="chat", cache=tmp_path))


def test_a_cache_that_cannot_be_written_or_read_costs_time_and_nothing_else(tokenizer, tmp_path):
    examples = bundled(0, 20)
    expected = encode(examples, tokenizer, 500)
    (tmp_path / "file").write_text("")
    assert equal(encode(examples, tokenizer, 500, cache=tmp_path / "file" / "tokens"), expected)
    encode(examples, tokenizer, 500, cache=tmp_path / "tokens")
    (kept,) = (tmp_path / "tokens").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert equal(encode(examples, tokenizer, 500, cache=tmp_path / "tokens"), expected)


def test_tokenising_is_silent_and_leaves_no_progress_bar(tokenizer, tmp_path, capfd):
    datasets.enable_progress_bars()
    encode(bundled(0, 30), tokenizer, 500, cache=tmp_path)
    encode(bundled(0, 30), tokenizer, 500)
    assert capfd.readouterr() == ("", "")


def test_without_the_package_that_keeps_them_the_tokens_are_the_same(tokenizer, tmp_path, monkeypatch):
    examples = bundled(0, 30)
    kept = encode(examples, tokenizer, 500, cache=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert equal(encode(examples, tokenizer, 500, cache=tmp_path / "none"), kept)


def in_folder(path, **settings):
    """A model folder's tokenizer that counts how often it is opened."""
    make_tokenizer(**settings).save_pretrained(path)
    opened = []
    return LazyTokenizer(path, lambda folder: opened.append(folder) or load_tokenizer(folder)), opened


def test_a_tokenizer_is_not_opened_where_its_tokens_are_kept(tmp_path):
    examples, cache = bundled(0, 20), tmp_path / "tokens"
    (first, opened), (again, never) = (in_folder(tmp_path / "model", pad_token="<pad>") for _ in range(2))
    expected = encode(examples, load_tokenizer(tmp_path / "model"), 500)
    assert equal(encode(examples, first, 500, cache=cache), expected)
    assert equal(encode(examples, again, 500, cache=cache), expected)
    assert (len(opened), never) == (1, [])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_any_other_file_of_the_tokenizer_has_it_opened(tmp_path, name):
    cache, file = tmp_path / "tokens", tmp_path / "model" / name
    first, _ = in_folder(tmp_path / "model", pad_token="<pad>")
    encode(bundled(0, 5), first, 500, cache=cache)
    changed, opened = in_folder(tmp_path / "model", pad_token="<pad>")
    file.write_text(file.read_text() + "\n" if file.exists() else "new")
    encode(bundled(0, 5), changed, 500, cache=cache)
    assert opened


FIRST_ROUND = """
import sys
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.prepare import prepare
prepare(RunConfig(rounds=1, test_examples=8, layers="last:1"))
print([name for name in ("transformers", "datasets", "pandas", "matplotlib", "scipy") if name in sys.modules])
"""


def test_a_second_run_imports_nothing_that_only_the_first_one_needs(tmp_path):
    environment = os.environ | {"FEDMEZO_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_ROUND]
    for imported in (["transformers", "datasets", "pandas"], []):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(imported)
