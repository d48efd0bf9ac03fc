"""The study of learning rates that are too large: presets, seeds, and finished runs that are not run again."""

import json
import signal
import sys

import pytest

from experiments import _cli
from experiments.studies import divergence


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["divergence", *map(str, arguments)])
    try:
        _cli.run(divergence.main, divergence.Config, divergence.__doc__)
    except SystemExit as stop:
        return stop.code
    return 0


def test_every_rate_runs_with_every_seed_and_is_not_run_twice(tmp_path, monkeypatch):
    given = ("--preset", "smoke", "--factors", "1000,1", "--out", tmp_path / "out")
    assert run(monkeypatch, *given) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rates = [(row["learning_rate"], row["seed"]) for row in results["rows"]]
    assert rates == [(pytest.approx(rate), seed) for rate in (5e-4, 0.5) for seed in (0, 1)]
    # At a thousand times the usual rate the first step throws θ away: there is a warning, and the loss explodes.
    assert [row["first_warning"] for row in results["rows"]] == [None, None, 0, 0]
    assert [row["first_divergence"] is None for row in results["rows"]] == [True, True, False, False]
    assert (tmp_path / "out" / "divergence.png").read_bytes()[:4] == b"\x89PNG"
    asked = []

    def noted(config, *rest, **options):
        asked.append(config.seed)
        raise _cli.StoppedError(signal.SIGINT)

    monkeypatch.setattr(divergence, "fine_tune", noted)
    assert run(monkeypatch, *given) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == results["rows"]
    assert run(monkeypatch, *given, "--num-seeds", 3) == 130
    assert asked == [2]


@pytest.mark.parametrize("factors", ["1,1", "0,2", "-1", "x", "nan,1", "inf"])
def test_factors_that_are_none_are_one_line(tmp_path, monkeypatch, capsys, factors):
    assert run(monkeypatch, f"--factors={factors}", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "--factors" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
