"""Robust rules against reference implementations, what liars can do to them, and where they may be applied."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import optimize

from fedmezo_jax.core import aggregation, client, federated, mezo, personalization, random
from fedmezo_jax.core.robust_rules import RULES
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.config import RunConfig

BY_DISTANCE = ("krum", "multi-krum", "polar-krum", "geometric-median")


def vectors(clients, width=12, seed=0):
    return np.random.default_rng([seed, clients]).standard_normal((clients, width))


@pytest.mark.flower
@pytest.mark.parametrize(("clients", "liars"), [(3, 0), (5, 1), (8, 2), (10, 2), (21, 5)])
def test_the_rules_agree_with_flower(clients, liars):
    reference = pytest.importorskip("flwr.server.strategy.aggregate")
    rows = vectors(clients)
    rows[-1] *= 50
    results = [([row], 1) for row in rows]
    expected = {
        "median": reference.aggregate_median(results),
        "trimmed-mean": reference.aggregate_trimmed_avg(results, (liars + 0.5) / clients),
        "krum": reference.aggregate_krum(results, liars, 0),
        "multi-krum": reference.aggregate_krum(results, liars, clients - liars),
    }
    for name, (vector,) in expected.items():
        np.testing.assert_allclose(RULES[name](rows, liars), vector, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("clients", [3, 8, 21])
def test_the_geometric_median_has_the_least_sum_of_distances(clients):
    rows = vectors(clients)
    rows[-1] *= 50

    def total(point):
        return np.sum(np.linalg.norm(rows - point, axis=1))

    found = RULES["geometric-median"](rows, 0)
    best = optimize.minimize(total, np.median(rows, axis=0), method="BFGS", options={"gtol": 1e-8})
    assert total(found) <= best.fun + 1e-9
    np.testing.assert_allclose(found, best.x, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_treats_clients_alike_and_keeps_what_all_agree_on(name):
    rows, order = vectors(9), np.random.default_rng(1).permutation(9)
    np.testing.assert_allclose(RULES[name](rows[order], 2), RULES[name](rows, 2), atol=1e-9)
    np.testing.assert_allclose(RULES[name](np.tile(rows[:1], (9, 1)), 2), rows[0], atol=1e-12)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [1e2, 1e6, 1e14])
def test_two_liars_of_nine_cannot_move_a_rule_far(name, size):
    """Whatever they say, the result stays within the honest clients' spread, where the mean goes where they want."""
    rows = vectors(9)
    honest = RULES[name](rows[2:], 0)
    rows[:2] = size
    assert np.linalg.norm(RULES[name](rows, 2) - honest) < 2 * np.linalg.norm(rows[2:], axis=1).max()
    assert np.linalg.norm(rows.mean(axis=0)) > 10 * np.linalg.norm(rows[2:], axis=1).max()


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_rules_by_distance_are_the_same_along_shared_directions_and_over_theta(name):
    """Krum picks the same client; the geometric median is the same point, up to √(m/D)."""
    coefficients = vectors(8, 6).astype(np.float32).reshape(8, 3, 2)
    directions = np.random.default_rng(2).choice([-1.0, 1.0], (6, 40_000))
    updates = -coefficients.reshape(8, 6).astype(np.float64) @ directions
    rule = aggregation.aggregator_of(name, 0.25)
    expected = -rule.combine_coefficients(np.ones(8), coefficients).ravel() @ directions
    params = {"a": np.ones(10_000, np.float32), "b": np.zeros((3, 10_000), np.float32)}
    uploads = [{"a": 1 + row[:10_000], "b": row[10_000:].reshape(3, 10_000)} for row in updates]
    found = rule.combine_params(params, np.ones(8), iter(uploads))
    whole = np.concatenate([found["a"], found["b"].ravel()])
    tolerance = 1e-5 if name != "geometric-median" else np.sqrt(6 / 40_000)
    assert np.linalg.norm(whole - expected) <= tolerance * np.linalg.norm(expected)


def test_polar_krum_finds_flipped_signs_among_honest_vectors_of_any_length():
    """Two of ten point the other way and are of usual length; two honest ones are three times as long."""
    rows = 1 + 0.7 * vectors(10, 40)
    rows[:2] *= 3
    rows[-2:] *= -1
    np.testing.assert_allclose(RULES["polar-krum"](rows, 2), rows[:-2].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(RULES["multi-krum"](rows, 2), rows[2:].mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("length", [0.0, 1e-6, 0.02, 50.0, 1e6, 1e100])
def test_polar_krum_leaves_out_vectors_of_another_length(length):
    """Even where they point the honest way."""
    rows = 1 + 0.7 * vectors(10, 40)
    rows[-2:] = length
    np.testing.assert_allclose(RULES["polar-krum"](rows, 2), rows[:-2].mean(axis=0), rtol=1e-12)


START = {"w": np.linspace(-1, 1, 6, dtype=np.float32), "m": np.ones((2, 5), np.float32)}


def loss(params, batch):
    return jnp.mean((params["m"].sum(axis=0)[:, None] * params["w"] - batch) ** 2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", get_args(aggregation.Aggregation))
def test_a_round_withstands_a_client_that_sends_a_hundred_times_its_numbers(name, shared):
    """A round with two liars stays near the one without; the mean is carried away."""
    init, round = federated.federated(
        client.mezo_client(mezo.MezoConfig(1e-2, directions=2)),
        personalization.RateConfig(1e-3),
        directions_shared=shared,
        aggregator=aggregation.aggregator_of(name, 0.25),
        bound_norms=name == "norm-clip",
    )
    draw = np.random.default_rng(4)
    batches = draw.normal(size=(8, 3, 5, 6)).astype(np.float32)
    cohort = federated.Cohort(np.arange(8), np.ones(8, np.float32), batches)
    state, key = init(jax.tree.map(jnp.asarray, START), 8), random.run_key(1)
    report = jax.device_get(round.work(state, Partial(mezo.pair_loss_of(loss)), cohort, key))
    lies = report.projected_gradients.copy()
    lies[:2] *= -100

    def moved(gradients):
        after = round.apply(
            state, np.arange(8), np.ones(8, np.float32), report._replace(projected_gradients=gradients), key
        )
        return np.concatenate([np.ravel(after.params[k] - START[k]) for k in START]), after

    honest, _ = moved(report.projected_gradients)
    lied, after = moved(lies)
    longest = max(
        np.linalg.norm(np.concatenate([np.ravel(round.upload(state, i, report, i, key)[k] - START[k]) for k in START]))
        for i in range(8)
    )
    if name == "mean":
        assert np.linalg.norm(lied - honest) > 10 * longest
    else:
        assert np.linalg.norm(lied - honest) < 2 * longest
    if name == "norm-clip":
        norms = np.asarray(after.signals.norms)
        own = 1e-3 / 2 * np.linalg.norm(lies.reshape(8, -1), axis=1)
        np.testing.assert_allclose(norms, own, rtol=1e-5)


def test_norms_are_bounded_by_the_median_of_all_clients_that_are_known():
    known = np.array([1.0, np.nan, 3.0, 500.0, 2.0], np.float32)
    share = np.array([0.5, 0.5], np.float32)
    # Clients 3 and 0 take part; the median of 1, 3, 500 and 2 is 2.5, though the liar is half of the round.
    np.testing.assert_allclose(aggregation.clip_norms(share, known[[3, 0]], known), [0.5 * 2.5 / 500, 0.5])
    zeros = np.zeros(2, np.float32)
    np.testing.assert_array_equal(aggregation.clip_norms(share, zeros, zeros), share)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"aggregation": "norm-clip", "uplink": "lora"}, "--aggregation norm-clip"),
        ({"aggregation": "norm-clip", "algorithm": "fedavg"}, "--aggregation norm-clip"),
        ({"aggregation": "median", "weighting": "samples"}, "--weighting samples"),
        *(
            ({"aggregation": f"{kind}krum", "clients": 4}, "--byzantine-share 0.25")
            for kind in ("", "multi-", "polar-")
        ),
        ({"aggregation": "median", "byzantine_share": 0.5}, "--byzantine-share"),
        ({"aggregation": "average"}, "--aggregation"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(options, named):
    with pytest.raises(UserError, match=named):
        RunConfig(**options)


def test_every_rule_has_its_name_on_the_command_line():
    assert {*RULES, "mean", "norm-clip"} == set(get_args(aggregation.Aggregation))
