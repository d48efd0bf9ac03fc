import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest
from data_files import GOOD, error_of, lines, write

from fedmezo_jax.data import files, sources
from fedmezo_jax.data.examples import Chat, Example, Message
from fedmezo_jax.data.records import parse_fields
from fedmezo_jax.data.synthetic.bundled import bundled

REAL = Path(os.environ.get("FEDMEZO_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD, Example("Add 1 and 1.", "", "2", "")),
        ({**GOOD, "input": "x", "category": "sums"}, Example("Add 1 and 1.", "x", "2", "sums")),
        ({**GOOD, "input": None, "category": None}, Example("Add 1 and 1.", "", "2", "")),
        ({"instruction": "a", "context": "b", "response": "c"}, Example("a", "b", "c", "")),
        ({"question": "a", "answer": "c"}, Example("a", "", "c", "")),
    ],
)
@pytest.mark.parametrize("style", ["jsonl", "lines in json", "list"])
def test_reads_the_usual_fields_in_every_layout(tmp_path, row, expected, style):
    text = {
        "jsonl": lines(row, row),
        "lines in json": "\n" + lines(row) + "\n" + lines(row).rstrip(),
        "list": json.dumps([row, row]),
    }
    path = write(tmp_path, "d.jsonl" if style == "jsonl" else "d.json", text[style])
    assert sources.load(str(path)) == [expected, expected]


def test_text_that_looks_like_a_line_break_stays_in_its_row(tmp_path):
    row = {"instruction": "a b\x85c", "output": "é"}
    for name, text in (
        ("d.jsonl", json.dumps(row, ensure_ascii=False)),
        ("e.json", json.dumps([row], ensure_ascii=False)),
    ):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte-order mark, as some editors write
        assert sources.load(str(path)) == [Example("a b\x85c", "", "é", "")]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (lines(GOOD) + '{"instruction": "a", \n' + lines(GOOD), 2, "broken JSON"),
        ("\n" + lines(GOOD) + '{"instruction": "b"}\n', 3, "output (or response, answer) is missing"),
        (lines(GOOD) + '{"output": "b"}\n', 2, "instruction (or question) is missing"),
        (lines(GOOD) + '{"instruction": "a", "output": null}\n', 2, "output is null; give it a text or remove this"),
        (lines(GOOD) + '{"question": null, "answer": "b"}\n', 2, "the field question is null"),
        (lines(GOOD) + '{"instruction": "a", "output": 3}\n', 2, "output must be text, not a number"),
        (lines(GOOD) + "7\n", 2, "must be a JSON object with instruction and output, not a number"),
        (lines(GOOD) + "[" * 100_000 + "\n", 2, "broken JSON"),
        ('[{"instruction": "a", "output": "b"},\n\n {"instruction": "a"}]', 3, "is missing"),
        ('[{"instruction": "a", "output": "b"},\n {"instruction" "a"}]', 2, "broken JSON"),
        ('[{"instruction": "a", "output": "b"}\n {"instruction": "a", "output": "b"}]', 2, "expected , or ]"),
        ('[{"instruction": "a", "output": "b"},\n {"instruction": "a", "output": "b"}', 2, "expected , or ]"),
        ('[{"instruction": "a", "output": "b"},\n', 2, "broken JSON"),
        ('[{"instruction": "a", "output": "b"},\n]', 2, "broken JSON"),
        ('[{"instruction": "a", "output": "b"}]\nmore', 2, "text after"),
        ("[\n" + "[" * 100_000, 2, "broken JSON"),
        ("[\n" + "9" * 5000 + "]", 2, "broken JSON"),
        ("\n" + "9" * 5000, 2, "broken JSON"),
        (lines(GOOD) + '{"instruction": "a", "output": "b\\ud83d"}', 2, "output holds half a character"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, text, line, words):
    path = write(tmp_path, "d.json", text)
    message = error_of(lambda: sources.load(str(path)))
    assert message.startswith(f"{path}, line {line}: ")
    assert words in message


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(GOOD).encode() + b'{"instruction": "\xff"}\n')
    assert error_of(lambda: sources.load(str(path))).startswith(f"{path}, line 2: not UTF-8")


@pytest.mark.parametrize("text", ["", "\n\n", "[]", " [ ]\n"])
def test_an_empty_file_is_an_error(tmp_path, text):
    path = write(tmp_path, "d.json", text)
    assert error_of(lambda: sources.load(str(path))) == f"{path} holds no rows"


def test_a_missing_file_is_named_with_every_place_looked_at(tmp_path):
    assert "nowhere.jsonl" in error_of(lambda: sources.load("nowhere.jsonl"))
    message = error_of(lambda: sources.load("nowhere.jsonl", data_dir=tmp_path))
    assert "no data file nowhere.jsonl or " + str(tmp_path / "nowhere.jsonl") in message
    write(tmp_path, "here.jsonl", lines(GOOD))
    assert len(sources.load("here.jsonl", data_dir=tmp_path)) == 1
    for name in ("gsm8k", "codealpaca", "alpaca", "dolly"):
        message = error_of(lambda name=name: sources.load(name, data_dir=tmp_path))
        assert str(tmp_path) in message
        assert name in message
    assert "cannot read" in error_of(lambda: files.read(tmp_path))


def test_an_unknown_name_lists_the_known_ones():
    message = error_of(lambda: sources.load("gsm9k"))
    assert all(name in message for name in ("'gsm9k'", "bundled", "gsm8k", "codealpaca", "alpaca", "dolly", ".jsonl"))


def test_bundled_depends_on_the_seed():
    assert sources.load("bundled", seed=5) == bundled(5, sources.BUNDLED_ROWS)
    assert sources.load("bundled", seed=6) != sources.load("bundled", seed=5)


def test_gsm8k_answers_are_as_in_the_paper(tmp_path):
    answer = "He has 2*3=<<2*3=6>>6 eggs.\nWith 1/2 more: 6+3=<<6+3=9>>9, not 6+4=<<6+4=10>>10.\n#### 1,009"
    write(tmp_path, "gsm8k.jsonl", lines({"question": "How many?", "answer": answer}))
    assert sources.load("gsm8k", data_dir=tmp_path) == [
        Example("How many?", "", answer.replace("#### 1,009", "The answer is 1,009"), "")
    ]


@pytest.mark.parametrize(
    ("instruction", "material", "category"),
    [
        ("Write a C++ program.", "", "C++"),
        ("Write a C# class.", "", "C#"),
        ("Write a program in C.", "", "C"),
        ("Translate this JavaScript code to Java.", "", "JavaScript"),
        ("Print a list with python.", "", "Python"),
        ("Use Python's json module.", "", "Python"),
        ("Sort numbers.", "Ruby", "Ruby"),
        ("Write a function in Go.", "", "Go"),
        ("Write a program that lets users go home.", "", "other"),
        ("Count the letters 'C' and c in a text.", "", "other"),
        ("Is MySQLish a word?", "", "other"),
    ],
)
def test_codealpaca_category_is_the_language_named_first(tmp_path, instruction, material, category):
    write(tmp_path, "codealpaca.jsonl", lines({"instruction": instruction, "input": material, "output": "x"}))
    assert sources.load("codealpaca", data_dir=tmp_path)[0].category == category


def test_codealpaca_keeps_the_category_of_the_file_and_drops_assembly(tmp_path):
    rows = [
        {**GOOD, "category": "Java"},
        {**GOOD, "category": "X86-64 Assembly"},
        {**GOOD, "input": "X86-64 Assembly"},
        {**GOOD, "instruction": "Use Python.", "category": "C"},
    ]
    write(tmp_path, "codealpaca.jsonl", lines(*rows))
    assert [example.category for example in sources.load("codealpaca", data_dir=tmp_path)] == ["Java", "C"]


NESTED = {"version": 1, "data": [GOOD, {"instruction": "b", "output": "c"}]}


@pytest.mark.parametrize(
    "text", [json.dumps(NESTED), json.dumps(NESTED, indent=2), json.dumps(NESTED, indent=2) + "\n"]
)
def test_one_object_around_a_list_of_rows_is_read_as_these_rows(tmp_path, text):
    assert [example.response for example in sources.load(str(write(tmp_path, "d.json", text)))] == ["2", "c"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (json.dumps({"data": [GOOD, {"instruction": "b"}]}, indent=2), 7, "is missing"),
        (json.dumps(NESTED, indent=2).replace('"output": "2"', '"output" "2"'), 6, "broken JSON"),
        (json.dumps(NESTED, indent=2)[:-1], 13, "broken JSON"),
        (json.dumps(NESTED, indent=2) + "\nmore", 14, "text after the first object"),
        (json.dumps(GOOD, indent=2) + "\n" + json.dumps(GOOD, indent=2), 5, "give one object a line, or a list"),
        ('{"instruction": "a", \n' + lines(GOOD, GOOD), 1, "broken JSON"),
        ('{"instruction": "a", "output": "b"\n' + lines(GOOD), 1, "broken JSON"),
        ('{"instruction": "a" "output": "b"}', 1, "broken JSON"),
        (json.dumps({"0": GOOD, "1": GOOD}), 1, "instruction (or question) is missing"),
        (json.dumps({"instruction": ["a"], "output": ["b"]}), 1, "instruction must be text, not a list"),
    ],
)
def test_a_fault_in_one_object_over_many_lines_is_named_by_its_line(tmp_path, text, line, words):
    path = write(tmp_path, "d.json", text)
    message = error_of(lambda: sources.load(str(path)))
    assert message.startswith(f"{path}, line {line}: ")
    assert words in message


def test_one_pretty_row_is_one_row_and_two_lists_are_a_question(tmp_path):
    assert len(sources.load(str(write(tmp_path, "a.json", json.dumps(GOOD, indent=2))))) == 1
    path = write(tmp_path, "b.json", json.dumps({"train": [GOOD], "test": [GOOD]}))
    assert "several lists of rows (train, test)" in error_of(lambda: sources.load(str(path)))


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "d.parquet"
    datasets.Dataset.from_list([GOOD]).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-9])
    assert error_of(lambda: sources.load(str(path))).startswith(f"{path}: is no Parquet file")
    datasets.Dataset.from_list([{"a": 1}]).to_parquet(path)
    assert error_of(lambda: sources.load(str(path))).startswith(f"{path}, row 0: the field instruction")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("instruction=ask,response=reply", Example("why", "", "so", "")),
        ("instruction=ask,response=reply,category=topic", Example("why", "", "so", "7")),
        (" instruction = ask , response = reply, input=context,", Example("why", "here", "so", "")),
        ("instruction=ask,response=reply,input=more", Example("why", "", "so", "")),
    ],
)
def test_a_field_map_names_the_parts(tmp_path, fields, expected):
    row = {"ask": "why", "reply": "so", "topic": 7, "context": "here", "more": None}
    if "input=context" not in fields.replace(" ", ""):
        del row["context"]
    path = write(tmp_path, "d.jsonl", lines(row))
    assert sources.load(str(path), fields=parse_fields(fields)) == [expected]


def test_a_part_can_be_left_empty(tmp_path):
    path = write(tmp_path, "d.jsonl", lines({**GOOD, "context": "unwanted", "": "a column without a name"}))
    assert sources.load(str(path), fields=parse_fields("input="))[0].input == ""
    assert sources.load(str(path))[0].input == "unwanted"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("question", "'question' is not PART=NAME"),
        ("prompt=question", "is not PART=NAME with PART one of instruction, input, response, category, messages"),
        ("instruction=a,instruction=b", "names instruction twice"),
        ("response=", "response cannot be left empty"),
        ("messages=turns,input=x", "chat data have messages and category alone"),
    ],
)
def test_a_field_map_that_says_nothing_is_refused(fields, words):
    assert words in error_of(lambda: parse_fields(fields))


def test_a_mapped_field_that_no_row_has_is_named_with_those_there_are(tmp_path):
    path = write(tmp_path, "d.jsonl", lines(GOOD))
    message = error_of(lambda: sources.load(str(path), fields={"category": "topc"}))
    assert message == f"{path}, line 1: --fields category=topc, but no row has topc; it has instruction, output"
    assert "bundled data have none" in error_of(lambda: sources.load("bundled", fields={"input": "x"}))


def test_real_gsm8k():
    if not (REAL / "gsm8k_train.jsonl").exists():
        pytest.skip(f"no gsm8k_train.jsonl in {REAL}: set FEDMEZO_DATA to the folder that holds it")
    examples = sources.load("gsm8k", data_dir=REAL)
    assert len(examples) == 7473
    assert all(example.response.rsplit("\n", 1)[1].startswith("The answer is ") for example in examples)
    assert not any("####" in example.response or example.input for example in examples)
    assert sum(example.response.count("<<") for example in examples) > 20_000


def test_real_codealpaca():
    if not (REAL / "codealpaca.jsonl").exists():
        pytest.skip(f"no codealpaca.jsonl in {REAL}: set FEDMEZO_DATA to the folder that holds it")
    examples = sources.load("codealpaca", data_dir=REAL)
    assert len(examples) == 4535
    assert Counter(example.category for example in examples).most_common(2) == [("Python", 1180), ("JavaScript", 856)]
    # The language read from the text agrees with the category that the file's makers gave.
    read = [sources._codealpaca(example._replace(category="")) for example in examples]
    agree = sum(a == b for a, b in zip(examples, read, strict=True))
    assert agree > 0.97 * len(examples)


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CHAT = Chat((Message("user", "hi"), Message("assistant", "ho")), "")


def test_chats_are_rows_with_messages(tmp_path):
    for name, text in (
        ("a.jsonl", lines({"messages": TURNS})),
        ("b.json", json.dumps([{"messages": TURNS}])),
        ("c.json", json.dumps({"messages": TURNS}, indent=1)),  # a single row, and no container of rows
        ("d.json", json.dumps({"data": [{"messages": TURNS}]}, indent=1)),
    ):
        assert sources.load(str(write(tmp_path, name, text))) == [CHAT]
    path = write(tmp_path, "e.jsonl", lines({"turns": TURNS, "topic": "greeting", "messages": None}))
    fields = parse_fields("messages=turns,category=topic")
    assert sources.load(str(path), fields=fields) == [CHAT._replace(category="greeting")]
    datasets.Dataset.from_list([{"messages": TURNS}]).to_parquet(tmp_path / "f.parquet")
    assert sources.load(str(tmp_path / "f.parquet")) == [CHAT]


SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "ho"},
    {"from": "tool", "value": "5"},
]
SPOKEN = Chat(
    (Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "ho"), Message("tool", "5")), ""
)


def test_sharegpt_s_conversations_are_chats(tmp_path):
    path = write(tmp_path, "a.jsonl", lines({"id": "x", "conversations": SHAREGPT}, {"conversations": SHAREGPT}))
    assert sources.load(str(path)) == [SPOKEN] * 2
    path = write(tmp_path, "b.json", json.dumps({"conversations": SHAREGPT}, indent=1))
    assert sources.load(str(path)) == [SPOKEN]
    path = write(tmp_path, "c.jsonl", lines({"talk": SHAREGPT}))
    assert sources.load(str(path), fields=parse_fields("messages=talk")) == [SPOKEN]
    datasets.Dataset.from_list([{"conversations": SHAREGPT}]).to_parquet(tmp_path / "d.parquet")
    assert sources.load(str(tmp_path / "d.parquet")) == [SPOKEN]


def test_a_content_may_be_a_list_of_texts(tmp_path):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    turns = [{"role": "user", "content": parts}, TURNS[1]]
    assert sources.load(str(write(tmp_path, "a.jsonl", lines({"messages": turns})))) == [CHAT]
    listed = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    datasets.Dataset.from_list([{"messages": listed}]).to_parquet(tmp_path / "b.parquet")
    assert sources.load(str(tmp_path / "b.parquet")) == [CHAT]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "part 1 of messages[0] is of type image_url: only text"),
        ({"type": "text", "text": None}, "part 1 of messages[0] is without a text"),
        ("i", "part 1 of messages[0] is without a text"),
        ({"text": "i"}, "part 1 of messages[0] is without a text"),
        ({"type": "text", "text": "\ud800"}, "half a character"),
    ],
    ids=str,
)
def test_a_part_that_is_no_text_is_refused_by_its_type(tmp_path, part, words):
    turns = [{"role": "user", "content": [{"type": "text", "text": "h"}, part]}, TURNS[1]]
    path = write(tmp_path, "d.jsonl", lines({"messages": TURNS}, {"messages": turns}))
    message = error_of(lambda: sources.load(str(path)))
    assert message.startswith(f"{path}, line 2: ")
    assert words in message


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "the field messages is null"),
        ([{"from": "human", "content": "hi"}, {"from": "gpt"}], "messages[1] must be"),
        ([{"from": "human", "value": "hi"}], "no message in messages is by the assistant"),
        ("hi", "must be a list of messages, not text"),
        ([], "messages is empty; remove this row"),
        ([{"role": "user"}], "messages[0] must be"),
        ([TURNS[0], {"role": "assistant", "content": None}], "messages[1] must be"),
        ([TURNS[0]], "no message in messages is by the assistant"),
    ],
)
def test_a_broken_chat_is_named_by_its_line(tmp_path, messages, words):
    path = write(tmp_path, "d.jsonl", lines({"messages": TURNS}, {"messages": messages}))
    message = error_of(lambda: sources.load(str(path)))
    assert message.startswith(f"{path}, line 2: ")
    assert words in message
