"""The main job's command line: what a run leaves behind, and that bad input costs one line and leaves nothing."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import small_run

from experiments import _cli, fedmezo
from fedmezo_jax.llama.checkpoints.adapter import load_adapter
from fedmezo_jax.llama.config import LlamaConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is taken from the user's cache, and nothing is left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMEZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    small_run.write_model(place / "model")
    small_run.write_data(place / "data.jsonl")
    return place


def arguments(place, **changed):
    given = {
        "model": place / "model",
        "data": place / "data.jsonl",
        "out": place / "run",
        "clients": 3,
        "rounds": 3,
        "local-steps": 2,
        "max-length": 64,
        "length-buckets": 1,
        "test-examples": 10,
        "targets": "v_proj",
        "precision": "paired",
        "checkpoint-every": 2,
    }
    options = [(f"--{name}", *([] if value is None else [str(value)])) for name, value in (given | changed).items()]
    return [*itertools.chain(*options), "--no-check-rate"]


def command(argv, monkeypatch):
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedmezo", *argv])
    try:
        _cli.run(fedmezo.main, fedmezo.Config, fedmezo.__doc__)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(place):
    """A whole run, as a user starts it, and its output."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "experiments.fedmezo", *arguments(place)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return place / "run", done


def test_a_run_leaves_its_files(place, finished):
    folder, _ = finished
    names = {"config.json", "run.ledger", "results.json", "loss.png", "metrics.jsonl", "adapter", "checkpoints"}
    assert {file.name for file in folder.iterdir()} >= names
    config = json.loads((folder / "config.json").read_text())
    assert (config["clients"], config["targets"], config["learning_rate"]) == (3, "v_proj", "auto")  # given and default
    assert config["model"] == str(place / "model")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert load_adapter(folder / "adapter", LlamaConfig.from_json(place / "model")).targets == ("v_proj",)


def test_results_hold_the_printed_table(place, finished):
    folder, done = finished
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {"command", "versions", "host", "seconds", "rows"}
    assert results["command"] == " ".join(["python -m experiments.fedmezo", *arguments(place)])
    assert results["versions"]["jax"] == jax.__version__
    assert results["host"]["devices"] == 1
    assert results["seconds"] > 0
    coefficients, lora = results["rows"]
    assert (coefficients["messages"], lora["messages"]) == ("coefficients", "lora")
    assert all(isinstance(value, str | int | float) for row in results["rows"] for value in row.values())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in (lora, coefficients):
        assert row["loss_after"] == metrics[-1]["test_loss"] != row["loss_before"]
        assert row["forward_passes"] == 3 * 3 * 2 * 11  # rounds, clients, steps, a loss and ten tangents
        assert row["seconds_per_round"] in [record["seconds"] for record in metrics[1:]]
        assert f"{row['loss_before']:.4g}" in done.stdout
        assert f"{row['uplink_bytes']:,}" in done.stdout
    assert {size for record in metrics for size in record["client_uplink_bytes"]} == {coefficients["uplink_bytes"]}
    assert {size for record in metrics for size in record["client_downlink_bytes"]} == {coefficients["downlink_bytes"]}
    assert coefficients["uplink_bytes"] * 3 == metrics[0]["uplink_bytes"]
    own = 2 * 10 * 4  # two steps of ten projected gradients
    assert own + 2 * 4 < coefficients["uplink_bytes"] < own + 2 * 4 + 20  # and two losses
    assert 2 * own < coefficients["downlink_bytes"] < 2 * own + 40  # those of the two others
    assert lora["uplink_bytes"] > 4 * 8 * (32 + 16)  # one layer
    assert "test loss" in done.stdout
    assert done.stderr == ""


def test_a_finished_run_is_not_overwritten_but_can_be_resumed(place, finished, monkeypatch, capsys):
    folder, _ = finished
    before = contents(folder)
    assert command(arguments(place), monkeypatch) == 2
    assert "--resume" in one_line(capsys)
    assert contents(folder) == before
    for changed, named in (
        ({"seed": 1}, "seed (0 there, 1 now)"),
        ({"clients": 2, "rounds": 9}, "clients (3 there, 2 now), rounds (3 there, 9 now)"),
    ):
        assert command([*arguments(place, **changed), "--resume"], monkeypatch) == 2
        assert named in one_line(capsys)
        assert contents(folder) == before
    assert command([*arguments(place), "--resume"], monkeypatch) == 0
    after = contents(folder)
    kept = [file for file in before if file.name not in ("results.json", "loss.png")]
    assert {file: after[file] for file in kept} == {file: before[file] for file in kept}
    rows = [json.loads(files[Path("results.json")])["rows"] for files in (before, after)]
    assert rows[0] == rows[1]


def test_fedavg_learns_and_reports_no_seeds(place, monkeypatch, capsys):
    """With ``paired``, too, which losses at a single point must do without."""
    changed = {"algorithm": "fedavg", "local-optimizer": "adam", "learning-rate": 0.03}
    folder = place / "fedavg"
    assert command(arguments(place, out=folder, **changed), monkeypatch) == 0
    (row,) = json.loads((folder / "results.json").read_text())["rows"]
    assert row["messages"] == "lora"
    assert row["forward_passes"] == 3 * 3 * 2 * 2  # a back-propagated step counts as two
    assert row["loss_after"] < row["loss_before"] - 0.5
    losses = [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[2] < losses[0] - 0.5
    adapter = load_adapter(folder / "adapter", LlamaConfig.from_json(place / "model"))
    assert all(halves["B"].any() for halves in adapter.lora.values())
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_leaves_one_line(number, place):
    command = [sys.executable, "-m", "experiments.fedmezo", *arguments(place, out=place / "early")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert errors.splitlines()[0].split(";")[0] == f"stopped by {number.name}"
    assert len(errors.splitlines()) == 1
    assert not (place / "early").exists()


def one_line(capsys):
    """The only line on standard error."""
    written = capsys.readouterr().err
    assert written.endswith("\n")
    (line,) = written.splitlines()
    assert line.startswith("error: ")
    assert "---" not in line  # nothing is left of the parser's frames
    assert "──" not in line
    return line


BAD = {
    "unknown model": ({"model": "gpt"}, "unknown model 'gpt'"),
    "model folder without weights": ({"model": "{place}/empty"}, "has no config.json"),
    "unknown data": ({"data": "novels"}, "unknown data 'novels'"),
    "no such file": ({"data": "{place}/nowhere.jsonl"}, "nowhere.jsonl"),
    "line break in a name": ({"data": "no\nwhere.jsonl"}, "no where.jsonl"),
    "missing field": ({"data": "{place}/field.jsonl"}, "field.jsonl, line 2"),
    "broken JSON": ({"data": "{place}/broken.jsonl"}, "broken.jsonl, line 3"),
    "no data folder": ({"data": "gsm8k", "data-dir": "{place}/empty"}, "gsm8k"),
    "no categories": ({"data": "{place}/plain.jsonl"}, "no categories"),
    "more clients than rows": ({"clients": 189}, "189 clients but only 156 rows"),
    "no training rows": ({"test-examples": 198}, "198 test examples of 198"),
    "no row fits": ({"max-length": 8}, "--max-length"),
    "longer than the model": ({"max-length": 65}, "--max-length 65: the model takes 64"),
    "rank 0": ({"lora-rank": 0}, "--lora-rank must be at least 1, not 0"),
    "unknown target": ({"targets": "q_proj,query"}, "unknown LoRA target 'query'"),
    "target twice": ({"targets": "q_proj,q_proj"}, "twice"),
    "no target": ({"targets": ""}, "LoRA target"),
    "negative mu": ({"perturbation-scale": -1e-3}, "--perturbation-scale must be above 0, not -0.001"),
    "learning rate nan": ({"learning-rate": "nan"}, "--learning-rate must be above 0"),
    "learning rate inf": ({"learning-rate": "inf"}, "--learning-rate must be above 0"),
    "no participation": ({"participation": 0}, "--participation must be above 0 and at most 1"),
    "rates below zero": ({"personalize-scale": 1}, "--personalize-scale"),
    "certain dropout": ({"dropout": 1}, "--dropout must be at least 0 and below 1"),
    "no time at all": ({"deadline": 0}, "--deadline must be above 0"),
    "no attempt": ({"attempts": 0}, "--attempts must be at least 1"),
    "coefficients of fedavg": (
        {"algorithm": "fedavg", "uplink": "coefficients"},
        "--uplink must be lora with --algorithm fed",
    ),
    "shared directions of fedavg": (
        {"algorithm": "fedavg", "directions-shared": None},
        "--directions-shared: --algorithm fed",
    ),
    "clipped parameters": ({"on-divergence": "clip", "uplink": "lora"}, "--on-divergence clip bounds coefficients"),
    "parameters of shared directions": (
        {"directions-shared": None, "uplink": "lora"},
        "--uplink lora: with --directions-shared",
    ),
    "decay of shared directions": ({"directions-shared": None, "weight-decay": 0.1}, "--weight-decay"),
    "no rounds": ({"rounds": 0}, "--rounds must be at least 1"),
    "negative seed": ({"seed": -1}, "--seed"),
    "no checkpoint": ({"checkpoint-every": 0}, "--checkpoint-every must be at least 1"),
    "unknown flag": ({"lora-rnak": 4}, "--lora-rnak"),
    "no number": ({"clients": "many"}, "--clients"),
    "no whole number": ({"clients": 2.5}, "--clients"),
    "no choice": ({"partition": "random"}, "--partition"),
    "out is a file": ({"out": "{place}/data.jsonl"}, "data.jsonl is a file"),
    "out in a file": ({"out": "{place}/data.jsonl/run"}, "--out"),
    "out holds other files": ({"out": "{place}/others"}, "holds other files"),
}


@pytest.fixture(scope="module")
def faulty(place):
    """Data files, each with a fault, and folders that are no runs."""
    lines = (place / "data.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (place / "field.jsonl").write_text(f'{lines[0]}\n{{"instruction": "Say yes."}}\n{lines[1]}\n')
    (place / "broken.jsonl").write_text(f"{lines[0]}\n{lines[1]}\n{lines[2][:-2]}\n")
    plain = [json.dumps({key: value for key, value in row.items() if key != "category"}) for row in rows]
    (place / "plain.jsonl").write_text("\n".join(plain))
    (place / "empty").mkdir()
    (place / "others").mkdir()
    (place / "others" / "thesis.txt").write_text("chapter one")
    return place


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_costs_one_line_and_leaves_nothing(fault, faulty, monkeypatch, capsys):
    changed, named = BAD[fault]
    changed = {name: value and str(value).format(place=faulty) for name, value in changed.items()}
    monkeypatch.chdir(faulty)
    before = contents(faulty), sorted(faulty.rglob("*"))
    assert command(arguments(faulty, **{"out": faulty / "new" / fault} | changed), monkeypatch) == 2
    assert named in one_line(capsys)
    assert (contents(faulty), sorted(faulty.rglob("*"))) == before


def test_help_explains_every_option(monkeypatch, capsys):
    assert command(["--help"], monkeypatch) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for option in ("--model", "--perturbation-scale", "--personalize", "--resume", "--out"):
        assert option in shown.out


def test_a_folder_that_may_not_be_written_to_is_refused_at_once(place, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # the superuser may write anywhere
    assert command(arguments(place, out=place / "new"), monkeypatch) == 2
    assert "may not be written to" in one_line(capsys)
