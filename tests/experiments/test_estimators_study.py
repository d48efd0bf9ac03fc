"""The study of estimators compares its methods at equal compute."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.studies import estimators, runner
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.sweep import Curve


@pytest.mark.parametrize("preset", ["small", "paper", "smollm2"])
def test_every_method_has_the_compute_of_the_paper_s(preset):
    run, decoder = estimators.PRESETS[preset].run, estimators._DECODERS[preset]
    whole = estimators.compute(run, decoder)
    for label, fields in estimators.PRESETS[preset].variants.items():
        config = paper_config(**vars(run) | dict(fields))
        assert estimators.compute(config, decoder) == pytest.approx(whole, rel=0.12), label  # in whole rounds


def test_compute_by_hand():
    """Two losses a step; one and five tangents, which share one more product with the head; forward and backward."""
    sizes = {"rounds": 3, "clients": 4, "participation": 1.0, "local_steps": 10, "batch_size": 2}
    decoder = estimators.Decoder(layers=5, head=0.5)
    assert estimators.compute(paper_config(**sizes), decoder) == 3 * 4 * 10 * 2 * 2 * 5.5
    fast = paper_config(**sizes, estimator="forward-gradient", directions=5, layers="last:2")
    assert estimators.compute(fast, decoder) == 3 * 4 * 10 * 2 * (6 * 2 + 2 * 0.5)
    backward = replace(fast, estimator="backward-gradient")
    assert estimators.compute(backward, decoder) == 3 * 4 * 10 * 2 * 2 * 2.5


def outcome(label, losses, **fields):
    """Two seeds, the second 5 % above the first; the loss after each round."""
    curves = [Curve(list(range(len(losses))), [loss * (1 + 0.05 * i) for loss in losses], [], 0.1) for i in range(2)]
    config = paper_config(rounds=len(losses) - 1, **fields)
    return runner.Outcome(f"{label}, η = {config.learning_rate:g}", config, curves)


def test_when_a_method_was_as_good_as_the_paper_s():
    paper = outcome(estimators.PAPER_METHOD, [2.0, 1.9, 1.8], learning_rate=1e-3)
    good = outcome("good", [2.0, 1.7, 1.6], learning_rate=1e-2)
    bad = outcome("bad", [2.0, 2.0, 1.9], learning_rate=1e-2, directions=2)
    broken = outcome("broken", [2.0, 2.0, np.nan], learning_rate=1e-2)
    rows = estimators.conclude(estimators.TINY, [paper, good, bad, broken])
    assert [row["compute"] for row in rows] == [1, 1, 2, 1]
    assert [row["compute_to_its_loss"] for row in rows] == [1, 0.5, None, None]
    assert [row["drop_over_its_drop"] for row in rows] == [1, pytest.approx(2), pytest.approx(0.5), None]
    assert rows[0]["p_paired"] is None
    assert rows[3]["p_paired"] is None


def test_frozen_layers_are_counted_once_for_each_example_that_was_used():
    """A round uses 4 · 2 · 2 examples, all different; a client has hundreds."""
    sizes = {"clients": 4, "local_steps": 2, "batch_size": 2}
    paper = outcome(estimators.PAPER_METHOD, [2.0, 1.9, 1.8], learning_rate=1e-3, **sizes)
    late = outcome("late", [2.0, 1.9, 1.8], learning_rate=1e-3, **sizes, layers="last:2")
    early = outcome("early", [2.0, 1.7, 1.6], learning_rate=1e-2, **sizes, layers="last:2")
    rows = estimators.conclude(estimators.TINY, [paper, late, early])
    whole, round_of_states = estimators.compute(paper.config, estimators.TINY), 3 * 16
    assert [row["hidden_states"] for row in rows] == [0, 2 * round_of_states / whole, 2 * round_of_states / whole]
    expected = [0, 2 * round_of_states / whole, round_of_states / whole]
    assert [row["hidden_states_to_its_loss"] for row in rows] == expected


def test_a_method_is_compared_with_the_paper_s_on_the_seeds_that_it_has():
    paper = outcome(estimators.PAPER_METHOD, [2.0, 1.8], learning_rate=1e-3)
    good = outcome("good", [2.0, 1.6], learning_rate=1e-2)
    tried = outcome("good", [2.0, 1.7], learning_rate=2e-2)
    tried = tried._replace(curves=tried.curves[:1])
    rows = estimators.conclude(estimators.TINY, [paper, good, tried])
    # Differences of 0.2 and 0.21: t = 41 with one degree of freedom.
    assert rows[1]["p_paired"] == pytest.approx(0.0155, abs=1e-4)
    assert rows[2]["p_paired"] is None
    assert rows[2]["drop_over_its_drop"] == pytest.approx(0.3 / 0.2)  # of the first seed


def test_only_some_methods_and_rates_are_compared_with_the_paper_s(monkeypatch):
    asked = []

    def run(config, name, presets, **rest):
        asked.extend(presets["smollm2"].variants)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", run)
    with pytest.raises(KeyboardInterrupt):
        estimators.main(estimators.Config("smollm2", only="back-propagation, up and down, last 1"))
    methods = ["two-point, all layers"] * 4 + ["back-propagation, up and down, last 1"] * 3
    assert list(map(runner.method_of, asked)) == methods
    with pytest.raises(UserError, match="--only: unknown 'Adam'; choose from two-point, all layers; forward"):
        estimators.main(estimators.Config("smollm2", only="Adam"))
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        estimators.main(estimators.Config("smollm2", only="back-propagation, up and down, last 1", rates=(3.5e-3, 0.1)))
    assert asked == ["two-point, all layers, η = 0.0035", "back-propagation, up and down, last 1, η = 0.1"]
    with pytest.raises(UserError, match=r"--rates: 0\.3 is in no method's sweep"):
        estimators.main(estimators.Config("smollm2", rates=(3.5e-3, 0.3)))
    with pytest.raises(UserError, match="--rates has none for 'forward gradient, n = 10, up and down, last 1'"):
        estimators.main(estimators.Config("smollm2", rates=(3.5e-3, 0.1)))
