"""The theory's experiments: what they conclude from made-up measurements, and that each runs and goes on."""

import json
import sys

import numpy as np
import pytest

from experiments import _cli
from experiments.studies import (
    best_rank,
    convergence_rate,
    effective_rank,
    heterogeneity_index,
    result_cache,
    runner,
    theory_bounds,
)
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.sweep import Curve
from fedmezo_jax.theory.spectrum import Probe

MODULES = (heterogeneity_index, effective_rank)  # the others compile for minutes


def command(module, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--preset", "smoke", *map(str, argv)])
    _cli.run(module.main, module.Config, module.__doc__)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_smoke_leaves_its_files_and_measures_nothing_twice(module, tmp_path, monkeypatch, capsys):
    name = module.__name__.split(".")[-1]
    command(module, monkeypatch, "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(isinstance(value, str | int | float | None) for row in results["rows"] for value in row.values())
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "config.json").exists()
    (tmp_path / "results.json").unlink()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "points").glob("*.json")}
    assert kept
    victim = sorted(kept)[0]
    victim.unlink()  # as if the sweep had been stopped before it
    command(module, monkeypatch, "--out", tmp_path)
    again = json.loads((tmp_path / "results.json").read_text())["rows"]
    for file, when in kept.items():
        assert (file.stat().st_mtime_ns == when) == (file != victim)
    for old, new in zip(results["rows"], again, strict=True):
        for key, value in old.items():
            if isinstance(value, float):
                assert new[key] == pytest.approx(value, rel=1e-3, abs=1e-6, nan_ok=True), key
            else:
                assert new[key] == value
    capsys.readouterr()


def test_best_rank_smoke_reads_the_effective_ranks(tmp_path, monkeypatch, capsys):
    rows = [
        {
            "model": "tiny",
            "data": "bundled",
            "state": state,
            "layer": "all",
            "lora_rank": rank,
            "effective_rank": rank / 2,
        }
        | {"effective_rank_positive": rank * 2.0}
        for rank in (2, 4)
        for state in ("trained", "start")
    ]
    rows[1]["effective_rank_positive"] = -1
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"rows": rows}))
    command(best_rank, monkeypatch, "--out", tmp_path / "out", "--effective-rank", file)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["effective_rank_positive"] for row in found] == [4.0, 8.0]
    assert (tmp_path / "out" / "best_rank.png").exists()
    file.write_text("{}")
    with pytest.raises(SystemExit) as stop:
        command(best_rank, monkeypatch, "--out", tmp_path / "out", "--effective-rank", file)
    assert stop.value.code == 2
    assert "measured.json" in capsys.readouterr().err


def outcome(rank, rate, after):
    curves = [Curve([0, 1], [2.0, value], [2.0], 0.1) for value in after]
    return runner.Outcome("", paper_config(lora_rank=rank, learning_rate=rate), curves)


def test_best_rank_picks_each_ranks_best_rate_and_pairs_by_seed():
    rows = best_rank.conclude(
        [
            outcome(4, 1e-3, [1.9, 1.7]),
            outcome(4, 2e-3, [1.6, 1.4]),
            outcome(16, 1e-3, [1.4, 1.2]),
            outcome(16, 2e-3, [9.0, 0.1]),
        ],
        {},
    )
    four, sixteen = rows
    assert (four["best_learning_rate"], sixteen["best_learning_rate"]) == (2e-3, 1e-3)
    assert four["loss_after"] == pytest.approx(1.5)
    assert four["above_the_best"] == pytest.approx(0.2)
    assert four["above_band_90"] == pytest.approx(0, abs=1e-9)  # the seeds agree on the gap
    assert sixteen["above_the_best"] == 0


def test_points_are_kept_by_all_their_settings(tmp_path):
    made = []

    def work(point):
        made.append(point["x"])
        if point["x"] == 3:
            raise KeyboardInterrupt
        return point["x"] ** 2

    with pytest.raises(KeyboardInterrupt):
        result_cache.measure(tmp_path / "p", [{"x": x, "y": 0} for x in (1, 2, 3)], work)
    found, seconds = result_cache.measure(tmp_path / "p", [{"x": x, "y": 0} for x in (2, 1)], work)
    assert found == [4, 1]
    assert seconds > 0
    assert made == [1, 2, 3]
    assert result_cache.measure(tmp_path / "p", [{"x": 1, "y": 1}], work)[0] == [1]
    assert made == [1, 2, 3, 1]
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="a file in its way"):
        result_cache.measure(tmp_path / "f" / "points", [{"x": 1}], work)


def test_heterogeneity_summary_of_made_up_rankings():
    """Round-wise ranks as the gradients do, model-diff the other way round; five-round is known in the last two."""
    gradient, unknown = [1.0, 2, 3, 4], [np.nan] * 4
    run = {
        "indices": {
            "round-wise": [gradient] * 3,
            "five-round": [unknown, gradient, gradient[::-1]],
            "model-diff": [gradient[::-1]] * 3,
            "model-diff, shared directions": [[1.0, 2, 4, 3]] * 3,
        },
        "gradient": [gradient, gradient],
        "halves": [[gradient, [2.0, 1, 3, 4]]] * 2,
        "label": [4.0, 3, 2, 1],
    }
    rows = {row["index"]: row for row in heterogeneity_index.summary(0.5, [run, run])}
    assert rows["round-wise"]["to_gradient"] == pytest.approx(1)
    assert rows["round-wise"]["to_label"] == pytest.approx(-1)
    assert rows["five-round"]["to_gradient"] == pytest.approx(0)
    assert rows["five-round"]["round_to_round"] == pytest.approx(-1)
    assert rows["model-diff"]["to_gradient"] == pytest.approx(-1)
    assert rows["model-diff, shared directions"]["to_gradient"] == pytest.approx(0.8)
    assert rows["gradient disparity"]["to_gradient"] == pytest.approx(0.8)  # of its halves
    assert heterogeneity_index.rank_correlation([1, 1], [1, 2]) == 0


def test_bounds_from_made_up_measurements():
    """d = 98, so that γ = (98·r + 96)/100; H = diag(4, 2, 0, …): r = 1.5, γ = 2.43."""
    probe = Probe(6.0, 6.0, 6.0, 4.0, 0.0, 4.0, 0.0)._asdict()
    at = {"gradient": 2.0, "client_gradients": [1.0, 3.0], "noisy": [2.5, 6.5], "disparities": [0.5, 0.25]}
    at |= {"probes": [probe, probe], "parameters": 98, "curvature": [1.0, 3.0]}
    found = theory_bounds.conclude(paper_config(clients=2, local_steps=5, rounds=10), {"at": [at]})
    value = {row["quantity"]: row["value"] for row in found.rows}
    assert value["r = tr(H₊)/‖H₊‖"] == pytest.approx(1.5)
    assert value["γ"] == pytest.approx(2.43)
    assert (value["c_g"], value["σ_g²"]) == pytest.approx((2, 0.5), rel=1e-6)
    assert value["η ≤ N/(3 c_g H L)"] == pytest.approx(2 / (3 * 2 * 5 * 4), rel=1e-6)
    changes = np.array([[-0.1, 0.5], [-0.3, 0.7]])
    rows = theory_bounds.descent_rows(found, (0.01, 1.0), {"changes": changes.tolist()})
    small, large = (next(row for row in rows if row["quantity"] == name) for name in ("η = 0.01", "η = 1"))
    assert (small["value"], small["error"]) == pytest.approx((-0.2, 0.1))
    noisy = 4.5
    assert small["bound"] == pytest.approx(-0.01 * 2 + 1e-4 / 2 * 4 * 2.43 * noisy)
    assert small["second_order"] == pytest.approx(-0.01 * 2 + 1e-4 / 2 * (6 * noisy + 2 * 2))
    assert small["remark"] == ""
    assert "vacuous" in large["remark"]
    limit = next(row["value"] for row in rows if row["quantity"].startswith("η up to which one step's bound, with r,"))
    assert limit == pytest.approx(2 * 2 / (4 * 2.43 * noisy))


def test_slope_of_made_up_runs():
    rows = [{"varied": "H", "local_steps": h, "gradient": 3 * h**-0.5} for h in (2, 4, 8)]
    assert convergence_rate.slope("local_steps", rows)["slope"] == pytest.approx(-0.5)
