"""The precision experiment, and what a run is told to expect of its pair."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import small_run

from experiments import _cli
from experiments.benchmarks import precision as experiment
from fedmezo_jax.llama import precision
from fedmezo_jax.llama.precision import WARN_ABOVE, expected_error
from fedmezo_jax.run import job


def test_errors_are_measured_against_the_derivative(tmp_path, monkeypatch, capsys):
    small_run.write_model(tmp_path / "model")
    small_run.write_data(tmp_path / "data.jsonl", 60)
    monkeypatch.setenv("FEDMEZO_CACHE", str(tmp_path / "cache"))
    arguments = ["--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--max-length", 64]
    arguments += ["--scales", "1e-3,1e-2", "--probes", 4, "--out", tmp_path / "out", "--test-examples", 4]
    arguments += ["--bases", "bfloat16,int8"]
    monkeypatch.setattr(sys, "argv", ["precision", *map(str, arguments)])
    _cli.run(experiment.main, experiment.Config, experiment.__doc__)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(rows) == 24
    [rounded] = [row for row in rows if (row["products"], row["estimator"]) == ("eight-bit", "forward-gradient")]
    assert 0 < rounded["error"] < 0.05
    for base in ("bfloat16", "int8"):
        own = [row for row in rows if (row["base"], row["products"]) == (base, "weights")]
        found = {(row["precision"], row["perturbation_scale"]): row["error"] for row in own}
        kinds = {row["estimator"]: row for row in own}
        assert found["float32", 1e-3] < 0.005
        assert found["paired", 1e-3] < found["bfloat16", 1e-3] / 5
        assert 0 < kinds["forward-gradient"]["error"] < 0.05
        assert (kinds["derivative"]["error"] == 0) == (base == "bfloat16")  # the first, which others are compared with
        assert kinds["derivative"]["loss"] == pytest.approx(np.log(200), rel=0.5)  # random weights, 200 tokens
    assert (tmp_path / "out" / "precision.png").exists()
    assert "int8, float32: take --perturbation-scale 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "scale"), [("bfloat16", 1e-3), ("bfloat16", 1e-4), ("float32", 0.1), ("paired", 1e-6)]
)
def test_a_noisy_pair_is_worth_a_warning(kind, scale):
    assert expected_error(kind, scale) > WARN_ABOVE


@pytest.mark.parametrize(("kind", "scale"), [("float32", 1e-3), ("paired", 1e-3), ("paired", 1e-2), ("bfloat16", 1e-2)])
def test_a_sound_pair_is_not(kind, scale):
    assert expected_error(kind, scale) < WARN_ABOVE


CPUS = {
    "Intel without bfloat16": ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
    "Intel with AVX-512 bfloat16": ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
    "Arm with bfloat16": ("Features\t: fp asimd bf16 i8mm", True),
    "Arm without": ("Features\t: fp asimd", False),
}


@pytest.mark.parametrize(("text", "has"), CPUS.values(), ids=CPUS)
def test_the_default_looks_at_the_cpu(monkeypatch, tmp_path, text, has):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{text}\n")
    assert precision._multiplies_bfloat16(file) == has
    assert not precision._multiplies_bfloat16(tmp_path / "absent")
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: has)
    monkeypatch.setattr(precision.jax, "default_backend", lambda: "cpu")
    assert precision.default_precision(sixteen_bit=True)[0] == ("paired" if has else "float32")
    assert precision.default_precision(sixteen_bit=False)[0] == "float32"
    assert precision.default_precision(sixteen_bit=True, differentiated=True)[0] == "float32"
    monkeypatch.setattr(precision.jax, "default_backend", lambda: "tpu")
    assert precision.default_precision(sixteen_bit=True)[0] == "paired"
    assert precision.default_precision(sixteen_bit=True, differentiated=True)[0] == "bfloat16"
    assert precision.default_precision(sixteen_bit=False, differentiated=True)[0] == "float32"


@pytest.mark.parametrize(("scale", "size"), [(4e-7, "250%"), (1e-8, "more than 1000%"), (1e-60, "more than 1000%")])
def test_the_warning_is_a_line_that_can_be_read(scale, size):
    run = SimpleNamespace(algorithm="fedmezo", estimator="two-point", perturbation_scale=scale, precision="float32")
    (line,) = job.warnings(SimpleNamespace(config=run), check_rate=False)
    assert f"is likely off by {size}: choose" in line
    assert len(line) < 250
