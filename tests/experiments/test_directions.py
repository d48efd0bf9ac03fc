"""The benchmark of directions: a row for each estimator and number, from all layers and from hidden states."""

import json
import sys

import pytest
from test_memory import MANY_LAYERS

from experiments import _cli
from experiments.benchmarks import directions

SMALL = MANY_LAYERS | {"num_hidden_layers": 3}


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_a_row_for_each_estimator_and_number(layers, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    options = ["--setting", "2x1x8x2", "--layers", layers, "--directions", "1,3", "--repeats", "1"]
    model, out = str(tmp_path / "config.json"), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["directions", "--model", model, *options, "--out", str(out)])
    _cli.run(directions.main, directions.Config, directions.__doc__)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["estimator"], row["directions"]) for row in rows] == [
        (estimator, count) for estimator in ("two-point", "forward-gradient", "backward-gradient") for count in (1, 3)
    ]
    by_name = {(row["estimator"], row["directions"]): row for row in rows}
    for row in rows:
        other = by_name["two-point", row["directions"]]
        assert row["over_two_point"] == pytest.approx(row["seconds"] / other["seconds"])
        assert row["temporary_bytes"] > 0


@pytest.mark.parametrize("options", [("--directions", "1,0"), ("--directions", "two"), ("--repeats", "0")])
def test_options_that_make_no_sense(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["directions", *options, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        _cli.run(directions.main, directions.Config, directions.__doc__)
    assert left.value.code == 2
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
