"""The study of attacks: what liars send, by hand; that rules withstand them; and that nothing is run twice."""

import json
import sys

import numpy as np
import pytest

from experiments import _cli
from experiments.studies import attacks
from fedmezo_jax.core.federated import RoundReport
from fedmezo_jax.errors import UserError

DRAW = np.random.default_rng(0)
GRADIENTS = DRAW.standard_normal((8, 3, 2)).astype(np.float32)
LOSSES = np.ones((8, 3), np.float32)
LYING = np.arange(8) >= 6


def sent(attack, lying=LYING):
    report = RoundReport(LOSSES, GRADIENTS, np.ones(8, np.float32))
    return attacks.told(report, attack, lying, np.random.default_rng(1))


@pytest.mark.parametrize("attack", attacks.LIES)
def test_only_liars_say_something_else(attack):
    told = sent(attack)
    np.testing.assert_array_equal(told.projected_gradients[~LYING], GRADIENTS[~LYING])
    assert np.all(np.isfinite(told.projected_gradients))
    assert (attack == attacks.LABEL_FLIP) == np.array_equal(told.projected_gradients, GRADIENTS)
    assert (attack == attacks.LYING_LOSSES) != np.array_equal(told.losses, LOSSES)
    np.testing.assert_array_equal(GRADIENTS[0, 0], sent(attack, np.zeros(8, bool)).projected_gradients[0, 0])


def test_what_liars_say_by_hand():
    honest = GRADIENTS[:6].astype(np.float64)
    np.testing.assert_allclose(sent("sign flip × 10").projected_gradients[6], -10 * GRADIENTS[6])
    # The inner product of the mean of all with the honest mean is just below zero.
    whole, mean = sent("inner product").projected_gradients.mean(axis=0), honest.mean(axis=0)
    assert -0.2 * np.sum(mean**2) < np.sum(whole * mean) < 0
    # Two of eight need three honest clients more on their side of the median: half of six, so z = Φ⁻¹(1/2) = 0.
    np.testing.assert_allclose(sent("a little is enough").projected_gradients[7], mean, rtol=1e-5, atol=1e-6)
    noise = sent("noise × 100").projected_gradients[6:]
    assert 50 < np.sqrt(np.mean(noise**2) / np.mean(honest**2)) < 200


def test_the_study_finds_a_rule_that_withstands_the_noise_and_runs_nothing_twice(tmp_path, monkeypatch):
    chosen = ["noise × 100", attacks.LABEL_FLIP, attacks.LYING_LOSSES]
    options = ["--preset", "smoke", "--num-seeds", "1", "--out", str(tmp_path / "out"), "--attacks", *chosen]
    monkeypatch.setattr(sys, "argv", ["attacks", *options])
    _cli.run(attacks.main, attacks.Config, attacks.__doc__)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    loss = {(row["attack"], row["rates"], row["aggregation"]): row["loss_after"] for row in results["rows"]}
    assert len(loss) == (1 + 2 + 1 + 1) * len(attacks.RULES)
    clean = loss[attacks.NO_ATTACK, "the same", "mean"]
    assert loss["noise × 100", "the same", "mean"] > clean + 1
    for rule in ("median", "trimmed-mean", "krum", "multi-krum", "polar-krum", "geometric-median"):
        assert abs(loss["noise × 100", "the same", rule] - clean) < 0.1
    assert loss[attacks.LABEL_FLIP, "the same", "mean"] != clean
    assert (tmp_path / "out" / "attacks.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(attacks, "_final_losses", None)
    _cli.run(attacks.main, attacks.Config, attacks.__doc__)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == results["rows"]


def test_with_own_directions_the_rules_act_on_rebuilt_parameters(tmp_path):
    out, rules, kinds = tmp_path / "out", ("mean", "norm-clip", "geometric-median"), ("noise × 100", attacks.A_LITTLE)
    attacks.main(attacks.Config("smoke", num_seeds=1, own_directions=True, out=out, rules=rules, attacks=kinds))
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["directions"] for row in rows} == {"own"}
    loss = {(row["attack"], row["aggregation"]): row["loss_after"] for row in rows if row["rates"] == "the same"}
    assert set(loss) == {(attack, rule) for attack in (attacks.NO_ATTACK, "noise × 100") for rule in rules}
    assert {row["rates"] for row in rows} == {"the same"}  # no lies about losses were asked for
    clean = loss[attacks.NO_ATTACK, "mean"]
    assert loss["noise × 100", "mean"] > clean + 0.5
    for rule in ("norm-clip", "geometric-median"):
        assert abs(loss["noise × 100", rule] - clean) < 0.1


@pytest.mark.parametrize(
    ("options", "named"),
    [({"rules": ("krum",)}, "--rules must have mean"), ({"attacks": ("sign flop",)}, "--attacks .* not 'sign flop'")],
)
def test_rules_without_the_mean_and_unknown_attacks_are_refused(options, named, tmp_path):
    with pytest.raises(UserError, match=named):
        attacks.main(attacks.Config("smoke", out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
