"""Named data sets: from the hub, by a stand-in, and from files as their publishers write them."""

import json

import datasets
import pytest
from data_files import GOOD, error_of, lines

from fedmezo_jax.data import files, sources
from fedmezo_jax.data.examples import Example


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
    assert error_of(lambda: sources.load("a/b")) == (
        "a/b, row 0: the field instruction (or question) is missing; the row has text "
        "(--fields instruction=NAME takes another)"
    )


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [("a/b:main", "main", "train"), ("a/b:main:test", "main", "test"), ("a/b::test", None, "test")],
)
def test_a_hub_set_may_have_a_configuration_and_a_split(monkeypatch, name, config, split):
    hub = Hub(monkeypatch, [GOOD])
    assert len(sources.load(name)) == 1
    assert hub.asked == [("a/b", config, split)]


# The rows of the paper's table as their publishers write them, and what each must become.
PUBLISHED = {
    "alpaca": (
        {"instruction": "Name a fruit.", "input": "", "output": "Pear.", "text": "Below is ..."},
        Example("Name a fruit.", "", "Pear.", ""),
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"},
        Example("Who?", "Ada wrote it.", "Ada.", "closed_qa"),
    ),
    "gsm8k": (
        {"question": "2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
        Example("2+3?", "", "2+3=<<2+3=5>>5\nThe answer is 5", ""),
    ),
    "codealpaca": (
        {"instruction": "Port this Java method.", "input": "Python", "output": "pass"},
        Example("Port this Java method.", "Python", "pass", "Python"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_each_set_of_the_paper_loads_by_name_from_a_file_of_any_format_and_from_the_hub(
    tmp_path, monkeypatch, name, suffix
):
    row, expected = PUBLISHED[name]
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list([row, row]).to_parquet(path)
    else:
        path.write_text(lines(row, row) if suffix == ".jsonl" else json.dumps([row, row], indent=2))
    assert sources.load(name, data_dir=tmp_path) == [expected, expected]
    Hub(monkeypatch, [row])
    assert sources.load(name) == [expected]
