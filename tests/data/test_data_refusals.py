"""Data that make no examples or no rows: the message names their file."""

import pytest
from data_files import GOOD, error_of, lines, write
from test_data_prompt import make_tokenizer

from fedmezo_jax.data import sources
from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.table import tabulate

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_a_first_row_with_null_messages_is_a_chat_without_any_unless_it_has_an_instruction(tmp_path):
    path = write(tmp_path, "d.jsonl", lines({"messages": None}, {"messages": TURNS}))
    assert error_of(lambda: sources.load(str(path))) == f"{path}, line 1: the field messages is null"
    path = write(tmp_path, "e.jsonl", lines({**GOOD, "messages": None}))
    assert sources.load(str(path)) == [Example("Add 1 and 1.", "", "2", "")]
    path = write(tmp_path, "f.jsonl", lines({"messages": []}, {"messages": TURNS}))
    assert error_of(lambda: sources.load(str(path))).startswith(f"{path}, line 1: messages is empty")


def test_a_file_without_a_row_of_the_named_set_is_named(tmp_path):
    path = write(tmp_path, "gsm8k.jsonl", lines({"messages": TURNS}))
    assert error_of(lambda: sources.load("gsm8k", data_dir=tmp_path)).startswith(f"{path}, line 1: neither this row")
    path = write(tmp_path, "codealpaca.jsonl", lines({**GOOD, "category": "X86-64 Assembly"}))
    assert error_of(lambda: sources.load("codealpaca", data_dir=tmp_path)).startswith(f"{path}, line 1: neither this")


@pytest.mark.parametrize(
    ("settings", "row", "words"),
    [
        ({"max_length": 8}, GOOD, "no row fits into 8 tokens"),
        ({"test_examples": 3}, GOOD, "3 test examples of 3"),
        ({}, {"messages": TURNS[1:]}, "no row has anything to learn"),
        ({}, {"messages": [{"role": "user", "content": "refused"}, *TURNS]}, "chat 0 (counted from 0): "),
    ],
)
def test_rows_that_make_no_table_are_named_with_their_file(tmp_path, settings, row, words):
    tokenizer = make_tokenizer(pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'refused' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    path = write(tmp_path, "d.jsonl", lines(row, row, row))
    usual = {
        "data_dir": None,
        "fields": "",
        "style": "alpaca",
        "max_length": 500,
        "overlong": "skip",
        "test_examples": 1,
    }
    message = error_of(lambda: tabulate(str(path), tokenizer, **usual | settings, seed=0))
    assert message.startswith(f"--data {path}: ")
    assert words in message
