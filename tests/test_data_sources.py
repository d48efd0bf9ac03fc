import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest

from fedmezo_jax.data import records, sources
from fedmezo_jax.data.bundled import bundled
from fedmezo_jax.data.examples import Example
from fedmezo_jax.errors import UserError

GOOD = {"instruction": "Add 1 and 1.", "output": "2"}
REAL = Path(os.environ.get("FEDMEZO_DATA") or Path(__file__).parents[2] / "shared" / "data")


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def error_of(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


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
        (lines(GOOD) + '{"instruction": "a", "output": null}\n', 2, "output (or response, answer) is missing"),
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
    assert "cannot read" in error_of(lambda: records.read(tmp_path))


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
        Example("How many?", "", "He has 2*3=6 eggs.\nWith 1/2 more: 6+3=9, not 6+4=10.\nThe answer is 1,009", "")
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


class Hub:
    """Stands in for the hub's two clients and notes what was asked."""

    def __init__(self, monkeypatch, rows, fault=None):
        self.rows, self.fault, self.asked = rows, fault, []
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.load_dataset", self.load_dataset)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", self.dataset_info)

    def dataset_info(self, repo_id, *, timeout):
        if self.fault:
            raise self.fault

    def load_dataset(self, path, name=None, *, split):
        self.asked.append((path, name, split))
        return datasets.Dataset.from_list(self.rows)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("gsm8k", ("openai/gsm8k", "main", "train")),
        ("codealpaca", ("sahil2801/CodeAlpaca-20k", None, "train")),
        ("alpaca", ("tatsu-lab/alpaca", None, "train")),
        ("dolly", ("databricks/databricks-dolly-15k", None, "train")),
        ("someone/some-set", ("someone/some-set", None, "train")),
    ],
)
def test_named_sets_come_from_their_hub_ids(monkeypatch, name, asked):
    hub = Hub(monkeypatch, [{**GOOD, "input": ""}, {"instruction": "b", "output": "c", "input": "d"}])
    assert [example[:3] for example in sources.load(name)] == [("Add 1 and 1.", "", "2"), ("b", "d", "c")]
    assert hub.asked == [asked]


def test_a_hub_that_does_not_answer_points_to_local_files(monkeypatch):
    Hub(monkeypatch, [], fault=ConnectionError("no route\nto host"))
    message = error_of(lambda: sources.load("alpaca"))
    assert "tatsu-lab/alpaca" in message
    assert "(no route)" in message
    assert "--data-dir" in message


def test_a_hub_row_without_a_known_field_is_named(monkeypatch):
    Hub(monkeypatch, [{"text": "a"}])
    assert error_of(lambda: sources.load("a/b")) == "a/b, row 0: the field instruction (or question) is missing"


def test_real_gsm8k():
    if not (REAL / "gsm8k_train.jsonl").exists():
        pytest.skip(f"no gsm8k_train.jsonl in {REAL}: set FEDMEZO_DATA to the folder that holds it")
    examples = sources.load("gsm8k", data_dir=REAL)
    assert len(examples) == 7473
    assert all(example.response.rsplit("\n", 1)[1].startswith("The answer is ") for example in examples)
    assert not any("<<" in example.response or "####" in example.response or example.input for example in examples)


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
