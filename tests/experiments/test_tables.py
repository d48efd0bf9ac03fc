"""Tables as printed: at any width of the terminal, every value stands there as a whole."""

import json
import re
from pathlib import Path

import pytest

from experiments import _cli

RESULTS = sorted((Path(_cli.__file__).parent / "results").glob("*.json"))


def text_of(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:,}" if isinstance(value, int) else value


def printed(rows, width, monkeypatch, capsys, title="title"):
    monkeypatch.setenv("COLUMNS", str(width))
    _cli.print_table(title, rows)
    return capsys.readouterr().out


def whole_values(out):
    """All that stands between borders, or after the name of a value."""
    return {
        part.strip()
        for line in out.splitlines()
        for part in (*re.split("[│┃]", line), *re.split("  +", line, maxsplit=1))
    }


def test_there_are_results():
    assert len(RESULTS) > 30


@pytest.mark.parametrize("width", [40, 80, 400])
@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_no_value_of_any_experiment_is_cut(file, width, monkeypatch, capsys):
    rows = json.loads(file.read_text())["rows"]
    out = printed([{key: row.get(key) for key in rows[0]} for row in rows], width, monkeypatch, capsys)
    assert "…" not in out
    whole = whole_values(out)
    for row in rows:
        for key in rows[0]:
            assert text_of(row.get(key)) in whole, key


def test_a_table_that_fits_is_a_table_within_the_width(monkeypatch, capsys):
    row = {"messages": "seeds", "loss_before": 6.0866, "forward_passes": 1234567, "seconds_per_round": 0.54}
    out = printed([row, row], 54, monkeypatch, capsys)
    assert max(map(len, out.splitlines())) <= 54
    assert [line for line in out.splitlines() if "1,234,567" in line] == [
        "│ seeds    │  6.087 │ 1,234,567 │    0.54 │",
    ] * 2


def test_a_table_that_does_not_fit_becomes_lines(monkeypatch, capsys):
    rows = [{"messages": form, "forward_passes": 1234567} for form in ("seeds", "lora")]
    assert printed(rows, 20, monkeypatch, capsys) == (
        "title\nmessages        seeds\nforward passes  1,234,567\n\nmessages        lora\nforward passes  1,234,567\n\n"
    )


@pytest.mark.parametrize("width", [20, 80])
def test_brackets_are_no_markup(width, monkeypatch, capsys):
    rows = [{"prompt": "[INST] [red]hi[/b]", "new_tokens": 3}]
    out = printed(rows, width, monkeypatch, capsys, title="model [bold] with [/x]")
    assert "[INST] [red]hi[/b]" in out
    assert "model [bold] with [/x]" in out


def test_wide_characters_and_several_lines(monkeypatch, capsys):
    rows = [{"response": "東京は日本の\n首都です", "new_tokens": 12345}]
    for width in (20, 30, 80):
        out = printed(rows, width, monkeypatch, capsys)
        assert all(part in out for part in ("東京は日本の", "首都です", "12,345"))
