"""Studies: each runs at its smallest scale, is resumed, and says with what certainty."""

import importlib
import json
import math
import signal
import sys
from dataclasses import asdict

import numpy as np
import pytest

from experiments import _cli
from experiments.studies import result_cache, runner
from fedmezo_jax.run.sweep import Curve

STUDIES = [
    *("batch_size", "ceiling", "clients", "convergence", "local_steps", "lora_rank", "model_size"),
    *("personalised_rates", "perturbation_scale", "shared_directions", "single_client", "partitioners"),
]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_s_paper_preset_is_the_paper_s(name):
    paper = importlib.import_module(f"experiments.studies.{name}").PRESETS["paper"]
    assert (paper.run.rounds, paper.run.lora_rank, paper.run.lora_alpha, paper.num_seeds) == (500, 128, 256.0, 3)
    assert paper.run.model == "openlm-research/open_llama_3b_v2"
    assert len(paper.variants) > 1


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    module = importlib.import_module(f"experiments.studies.{name}")
    try:
        _cli.run(module.main, runner.Config, module.__doc__)
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_study_runs_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    given = ("perturbation_scale", "--preset", "smoke", "--out", tmp_path / "out")
    assert run(monkeypatch, *given) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["variant"] for row in results["rows"]] == ["μ = 0.0002", "μ = 0.001", "μ = 0.005", "μ = 0.02"]
    assert (tmp_path / "out" / "perturbation_scale.png").read_bytes()[:4] == b"\x89PNG"
    curves = json.loads((tmp_path / "out" / "curves.json").read_text())["curves"]
    assert [curve["variant"] for curve in curves[:2]] == ["μ = 0.0002"] * 2
    assert [curve["rounds"] for curve in curves] == [[0, 1, 2]] * 8
    losses = [curve["test_loss"][-1] for curve in curves[:2]]
    assert results["rows"][0]["loss_after"] == pytest.approx(np.mean(losses))
    # A second time everything is read from what is finished.
    monkeypatch.setattr(runner, "sweep", None)
    assert run(monkeypatch, *given) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["rows"] == results["rows"]
    assert again["seconds"] == pytest.approx(results["seconds"])
    # What is not finished is run, and nothing else.
    asked = []

    def noted(setups, *rest):
        asked.extend(setup.config.seed for setup in setups)
        raise _cli.StoppedError(signal.SIGINT)

    monkeypatch.setattr(runner, "sweep", noted)
    assert run(monkeypatch, *given, "--num-seeds", 3) == 130
    assert set(asked) == {2}


def test_runs_are_kept_by_all_their_settings(tmp_path):
    kept = result_cache.ResultCache(tmp_path / "finished")
    curve = Curve([0, 2], [3.0, 2.5], [3.0, 2.6], 0.1)
    points = {run: {"run": asdict(run), "eval_every": 2} for run in (runner.SMOKE, runner.SMALL)}
    for run_config, point in points.items():
        kept.store(point, curve._replace(seconds_per_round=float(run_config.rounds))._asdict(), 1.0)
    found, seconds = runner._finish([runner.SMALL, runner.SMOKE], 2, tmp_path / "finished")
    assert seconds == 2.0
    assert found == {run: curve._replace(seconds_per_round=float(run.rounds)) for run in points}
    assert kept.load(points[runner.SMOKE] | {"eval_every": 1}) is None


def test_a_confidence_interval_by_hand():
    # Of 1, 2, 3: mean 2, standard error 1/√3, and Student's t with 2 degrees of freedom has 2.92 at 95 %.
    assert runner.half_width(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.91998558 / math.sqrt(3))
    assert runner.half_width(np.array([1.0])) is None


def outcomes(losses):
    """An outcome for each method and rate that ends at the given test losses, one a seed."""
    swept = runner.swept({label: ({}, tuple(rates)) for label, rates in losses.items()})
    ends = [loss for rates in losses.values() for loss in rates.values()]
    return [
        runner.Outcome(
            label,
            runner.replace(runner.SMOKE, **fields),
            [Curve([0, 2], [3.0, loss], [3.0, 3.0], 0.1) for loss in each],
        )
        for (label, fields), each in zip(swept.items(), ends, strict=True)
    ]


def test_a_method_is_shown_at_its_best_rate_and_a_best_rate_at_an_end_is_marked():
    inside = {0.1: [2.0, 2.0], 0.2: [1.0, 1.2], 0.4: [0.5, math.nan]}
    found = outcomes({"a, b": inside, "c": {0.1: [2.0], 0.2: [1.0]}, "d": {0.1: [1.0], 0.2: [2.0]}})
    tuned = runner.tune(found)
    assert {label: one.best.config.learning_rate for label, one in tuned.items()} == {"a, b": 0.2, "c": 0.2, "d": 0.1}
    assert [one.at_an_end for one in tuned.values()] == [False, True, True]
    marked = [(row["best"], row["at_an_end_of_the_sweep"]) for row in runner.tuned_rows(found)]
    no, best, edge = (False, False), (True, False), (True, True)
    assert marked == [no, best, no, no, edge, edge, no]


def test_the_best_rate_is_chosen_by_the_seeds_that_all_rates_have():
    found = outcomes({"a": {0.1: [2.0], 0.2: [1.0, 4.0, 4.0], 0.4: [1.5]}})
    assert runner.tune(found)["a"].best.config.learning_rate == 0.2


def test_other_seeds_are_run_at_the_best_rate_alone(tmp_path, monkeypatch):
    """The loss of a run is its rate's distance from 2; 1 more for the second seed, which must not change the choice."""
    asked = []

    def sweep(setups, eval_every, on_round):
        configs = [setup.config for setup in setups]
        asked.extend((one.batch_size, one.learning_rate, one.seed) for one in configs)
        return [Curve([0, 1], [9.0, abs(one.learning_rate - 2) + one.seed], [], 0.1) for one in configs]

    monkeypatch.setattr(runner, "sweep", sweep)
    variants = runner.swept({"a": ({"batch_size": 1}, (1.0, 2.0, 3.5)), "b": ({"batch_size": 2}, (1.0, 1.8, 4.0))})
    presets = {"smoke": runner.Preset(runner.SMOKE, 2, 1, variants, sweep_seeds=1)}
    config = runner.Config(preset="smoke", out=tmp_path / "out")
    _, found = runner.run(config, "estimators", presets, title="a study", conclude=runner.tuned_rows)
    first = [(1, 1.0, 0), (1, 2.0, 0), (1, 3.5, 0), (2, 1.0, 0), (2, 1.8, 0), (2, 4.0, 0)]
    assert (sorted(asked[:6]), sorted(asked[6:])) == (first, [(1, 2.0, 1), (2, 1.8, 1)])
    assert [len(outcome.curves) for outcome in found] == [1, 2, 1, 1, 2, 1]


def test_other_rounds_change_those_of_every_variant_alike(tmp_path, monkeypatch):
    def sweep(setups, eval_every, on_round):
        return [Curve([0, one.config.rounds], [2.0, 1.0], [], 0.1) for one in setups]

    monkeypatch.setattr(runner, "sweep", sweep)
    presets = {"smoke": runner.Preset(runner.SMOKE, 1, 1, {"the preset's": {}, "its own": {"rounds": 12}})}
    config = runner.Config(preset="smoke", out=tmp_path / "out", rounds=runner.SMOKE.rounds // 2)
    _, found = runner.run(config, "estimators", presets, title="a study", conclude=runner.rows)
    assert [outcome.config.rounds for outcome in found] == [runner.SMOKE.rounds // 2, 6]


@pytest.mark.parametrize("preset", ["huge", "smollm2"])  # the second is one of other studies
def test_an_unknown_preset_is_one_line(monkeypatch, capsys, preset):
    assert run(monkeypatch, "partitioners", "--preset", preset) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert preset in error
