"""Rows that are too long, and tokens kept from one run to the next."""

import sys

import datasets
import numpy as np
import pytest
from token_data import make_tokenizer

from fedmezo_jax.data import encode as module
from fedmezo_jax.data.encode import encode
from fedmezo_jax.data.examples import Chat, Example, Message
from fedmezo_jax.data.synthetic.bundled import bundled
from fedmezo_jax.errors import UserError

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
