"""What ``import fedmezo_jax`` gives: its names, how little it imports, and that it does what the commands do."""

import ast
import doctest
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run

import fedmezo_jax as fmz
from experiments import _cli, fedmezo

ROOT = Path(__file__).parents[1]
HOMES = {
    "Cohort": "core.federated",
    "MezoConfig": "core.mezo",
    "RateConfig": "core.personalization",
    "Replay": "run.replay",
    "RunConfig": "run.config",
    "RunResult": "run.loop",
    "Task": "core.task",
    "UserError": "errors",
    "federated": "core.federated",
    "fine_tune": "run.job",
    "mezo_client": "core.client",
    "pair_loss_of": "core.mezo",
    "paper_config": "run.config",
    "replay": "run.replay",
    "run_key": "core.random",
    "sgd_client": "core.client",
}


def test_every_name_is_defined_once_and_documented():
    assert sorted(HOMES) == sorted(fmz.__all__)
    assert set(fmz.__all__) <= set(dir(fmz))
    for name, home in HOMES.items():
        thing = getattr(fmz, name)
        assert thing is getattr(importlib.import_module(f"fedmezo_jax.{home}"), name)
        assert thing.__module__ == f"fedmezo_jax.{home}"
        assert thing.__doc__
    definitions = [
        node.name
        for file in (ROOT / "fedmezo_jax").rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    only = HOMES.keys() - {"pair_loss_of"}  # llama.loss has one of its own, of a model and not of a plain loss
    assert {name: definitions.count(name) for name in only} == dict.fromkeys(only, 1)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fmz.nothing  # noqa: B018


IMPORT = """
import sys, logging, warnings
filters, handlers, levels = list(warnings.filters), list(logging.root.handlers), dict(logging.root.manager.loggerDict)
import jax, optax
before = list(warnings.filters)
import fedmezo_jax
from jax._src import xla_bridge
print(sorted({name.split(".")[0] for name in sys.modules}))
print(bool(xla_bridge._backends) or warnings.filters != before or logging.root.handlers != handlers)
"""


def test_the_import_is_light_and_has_no_side_effects():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    modules, effects = done.stdout.splitlines()
    loaded = set(ast.literal_eval(modules))
    assert "fedmezo_jax" in loaded
    assert loaded.isdisjoint({"transformers", "tokenizers", "orbax", "datasets", "tyro", "flax", "rich", "matplotlib"})
    assert (effects, done.stderr) == ("False", "")


def test_the_example_in_the_docstring_runs():
    results = doctest.testmod(fmz)
    assert results.attempted > 8
    assert results.failed == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("api")
    small_run.write_model(place / "model")
    small_run.write_data(place / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMEZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield place


@pytest.fixture(scope="module")
def config(place):
    return fmz.RunConfig(
        model=str(place / "model"),
        data=str(place / "data.jsonl"),
        clients=3,
        rounds=3,
        local_steps=2,
        max_length=64,
        test_examples=10,
        length_buckets=1,
        targets="v_proj",
        precision="float32",
        seed=5,
    )


@pytest.fixture(scope="module")
def finished(place, config):
    """A run by the function: its folder, its result, and what was called in which order."""
    calls = []
    result = fmz.fine_tune(
        config,
        place / "python",
        on_start=lambda context: calls.append(context.config.seed),
        on_round=lambda record: calls.append(record["round"]),
        check_rate=False,
    )
    return place / "python", result, calls


def command(monkeypatch, *argv):
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedmezo", *map(str, argv)])
    try:
        _cli.run(fedmezo.main, fedmezo.Config, fedmezo.__doc__)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def adapter_files(folder):
    return {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()}


def test_the_function_and_the_command_with_its_config_make_the_same_run(place, config, finished, monkeypatch):
    folder, result, calls = finished
    assert calls == [5, 1, 2, 3]
    assert command(monkeypatch, "--config", folder / "config.json", "--out", place / "command", "--no-check-rate") == 0
    for name in ("run.ledger", "config.json"):
        assert (place / "command" / name).read_bytes() == (folder / name).read_bytes()
    assert adapter_files(place / "command") == adapter_files(folder)
    (row, _) = json.loads((place / "command" / "results.json").read_text())["rows"]
    assert (row["loss_before"], row["loss_after"]) == (result.loss_before, result.loss_after)
    assert result.context.config == config
    assert [record["round"] for record in result.metrics] == [1, 2, 3]


def test_a_finished_run_is_refused_and_can_be_resumed(config, finished):
    folder, result, _ = finished
    before = adapter_files(folder), (folder / "run.ledger").read_bytes()
    with pytest.raises(fmz.UserError, match="holds a run already"):
        fmz.fine_tune(config, folder)
    with pytest.raises(fmz.UserError, match=r"seed \(5 there, 6 now\)"):
        fmz.fine_tune(replace(config, seed=6), folder, resume=True)
    again = fmz.fine_tune(config, str(folder), resume=True)
    assert (adapter_files(folder), (folder / "run.ledger").read_bytes()) == before
    assert again.loss_after == result.loss_after


def test_the_folder_is_locked_while_the_run_works_in_it(place, config):
    refused = []

    def second(context):
        with pytest.raises(fmz.UserError, match="another process is working in it"):
            fmz.fine_tune(config, place / "locked", resume=True)
        refused.append(True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fmz.fine_tune(config, place / "locked", on_start=second)
    assert refused == [True]
    assert not (place / "locked" / "run.ledger").exists()


def test_warnings_and_notices_reach_the_caller(place, config):
    lines = []

    def stop(context):
        assert lines == []

    def end(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fmz.fine_tune(
            replace(config, learning_rate=1e3), place / "warned", on_start=stop, on_round=end, notify=lines.append
        )
    assert any(line.startswith("warning: ") and "--learning-rate" in line for line in lines)


def test_replay_makes_any_round_again(config, finished):
    folder, result, _ = finished
    whole = fmz.replay(folder / "run.ledger")
    assert (whole.rounds, whole.ledger.config, whole.ledger.rounds) == (3, config, 3)
    jax.tree.map(np.testing.assert_array_equal, whole.params, result.params)
    start = fmz.replay(str(folder / "run.ledger"), config.model, until=0)
    jax.tree.map(np.testing.assert_array_equal, start.params, jax.device_get(result.context.params))
    for until, reason in ((4, "ends after round 3"), (-1, "must be 0 or more, not -1")):
        with pytest.raises(fmz.UserError, match=reason):
            fmz.replay(folder / "run.ledger", until=until)


@pytest.mark.parametrize("option", ["checkpoint_every", "eval_every"])
def test_an_interval_of_nothing_is_refused_before_anything_is_made(config, tmp_path, option):
    with pytest.raises(fmz.UserError, match=f"--{option.replace('_', '-')} must be at least 1, not 0"):
        fmz.fine_tune(config, tmp_path / "run", **{option: 0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"partition": "bogus"}, "--partition must be one of iid, dirichlet, .*, not bogus"),
        ({"precision": "float64"}, "--precision must be one of float32, .*, not float64"),
        ({"uplink": 3}, "--uplink must be one of coefficients, lora, not 3"),
        ({"algorithm": None}, "--algorithm must be one of fedmezo, fedavg, not None"),
    ],
)
def test_a_value_outside_its_choices_is_refused_from_python_too(changed, reason):
    with pytest.raises(fmz.UserError, match=reason):
        fmz.RunConfig(**changed)
    assert fmz.RunConfig(uplink=None, precision=None).uplink is None


# --config FILE


def parsed(monkeypatch, *argv):
    """What the command would do."""
    seen = []
    monkeypatch.setattr(fedmezo, "main", seen.append)
    monkeypatch.setattr(sys, "argv", ["fedmezo", *map(str, argv)])
    _cli.run(fedmezo.main, fedmezo.Config, fedmezo.__doc__)
    return seen[0]


def test_flags_come_before_the_file_and_the_file_before_the_defaults(finished, config, monkeypatch):
    file = finished[0] / "config.json"
    flags = ("--rounds", 7, "--uplink", "lora", "--out", "elsewhere")
    for given in (("--config", file, *flags), (*flags, f"--config={file}")):
        found = parsed(monkeypatch, *given)
        assert found.run == replace(config, rounds=7, uplink="lora")
        assert (found.out, found.config, found.resume) == (Path("elsewhere"), file, False)
    assert parsed(monkeypatch, "--clients", 2).run == fmz.RunConfig(clients=2)


FAULTS = {
    "unknown field": (lambda values: values | {"colour": "red"}, "colour is missing or unknown"),
    "missing field": (
        lambda values: {key: value for key, value in values.items() if key != "rounds"},
        "rounds is missing or unknown",
    ),
    "text for a number": (lambda values: values | {"clients": "3"}, "clients cannot be '3'"),
    "a fraction for a whole number": (lambda values: values | {"clients": 3.0}, "clients cannot be 3.0"),
    "truth for a number": (lambda values: values | {"seed": True}, "seed cannot be True"),
    "nothing": (lambda values: values | {"model": None}, "model cannot be None"),
    "no choice": (lambda values: values | {"partition": "bogus"}, "partition cannot be 'bogus'"),
    "no such size": (lambda values: values | {"rounds": 0}, "--rounds must be at least 1, not 0"),
    "no object": (lambda values: [values], "holds no JSON object"),
}


def one_line(monkeypatch, capsys, file, out):
    """The line in which the command refuses a file."""
    assert command(monkeypatch, "--config", file, "--out", out) == 2
    assert not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: ")
    return line


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_config_is_refused_in_one_line(fault, finished, tmp_path, monkeypatch, capsys):
    change, reason = FAULTS[fault]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(change(json.loads((finished[0] / "config.json").read_text()))))
    assert reason in one_line(monkeypatch, capsys, file, tmp_path / "out")


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_cannot_be_read_is_refused_in_one_line(content, tmp_path, monkeypatch, capsys):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    assert "cannot be read" in one_line(monkeypatch, capsys, file, tmp_path / "out")


def test_an_option_without_its_file_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "--out", tmp_path / "out", "--config") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--config" in line
