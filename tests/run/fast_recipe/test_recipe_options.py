"""The options --recipe and --config."""

import sys

from fast_runs import command

from experiments import _cli, fedmezo
from fedmezo_jax.run.config import RunConfig, paper_config, recipe_of


def parsed(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["fedmezo", *map(str, argv)])
    return _cli._parse(fedmezo.Config, fedmezo.__doc__)


def test_a_recipe_says_where_the_options_start_from(monkeypatch):
    assert parsed(monkeypatch, "--recipe", "paper").run == paper_config()
    assert parsed(monkeypatch, "--recipe=fast").run == RunConfig() == parsed(monkeypatch).run
    given = parsed(monkeypatch, "--layers", "last:1", "--recipe", "paper", "--directions", 3).run
    assert given == paper_config(layers="last:1", directions=3)
    paper = paper_config()
    assert (paper.estimator, paper.directions, paper.distribution) == ("two-point", 1, "gaussian")
    assert (paper.layers, paper.learning_rate, paper.server_learning_rate) == ("all", 1e-3, 1.0)


def test_a_recipe_and_a_config_are_refused_together(steady, tmp_path, monkeypatch, capsys):
    for recipe in ("paper", "fast"):
        given = ("--recipe", recipe, "--config", steady.folder / "config.json", "--out", tmp_path / "out")
        assert command(fedmezo, monkeypatch, *given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == "error: --recipe and --config both say where to start from: give one of them"
    assert command(fedmezo, monkeypatch, "--recipe", "secret", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "recipe" in line
    assert not (tmp_path / "out").exists()


def test_a_configuration_is_of_the_recipe_whose_options_it_has():
    assert recipe_of(RunConfig(rounds=3, model="smollm2-135m")) == "fast"
    assert recipe_of(paper_config(clients=3)) == "paper"
    assert recipe_of(RunConfig(estimator="backward-gradient")) is None
    assert recipe_of(paper_config(learning_rate=2e-3)) is None
