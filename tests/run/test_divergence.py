"""The learning-rate check on a loss whose gradient and Hessian are known, and when a round has diverged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmezo_jax.core import client, mezo
from fedmezo_jax.core.federated import RoundReport
from fedmezo_jax.run import divergence
from fedmezo_jax.run.config import paper_config

D = 30
CURVATURE = np.linspace(0.0, 2.0, D, dtype=np.float32)
THETA = np.linspace(-1, 1, D, dtype=np.float32)
TARGETS = np.random.RandomState(0).standard_normal((6, D)).astype(np.float32)


def quadratic(params, batch):
    """½ Σ h·(θ − t)²: gradient h·(θ − t) and Hessian diag(h)."""
    return 0.5 * jnp.sum(CURVATURE * (params["w"] - batch) ** 2)


@pytest.fixture(scope="module")
def probe():
    key = jax.random.key(1, impl="threefry2x32")
    return divergence.probe(
        mezo.pair_loss_of(quadratic), {"w": jnp.asarray(THETA)}, jnp.asarray(TARGETS), key, 0.1, 4000
    )


def test_the_probe_measures_gradient_noise_and_curvature(probe):
    gradients = CURVATURE * (THETA - TARGETS.astype(np.float64))
    pairs = gradients @ gradients.T
    common = (pairs.sum() - np.trace(pairs)) / (6 * 5)
    assert probe.trace == pytest.approx(CURVATURE.sum(), rel=0.05)
    assert probe.noisy_gradient == pytest.approx(np.trace(pairs) / 6, rel=0.08)
    assert probe.gradient == pytest.approx(common, rel=0.1)


def test_beyond_the_largest_rate_a_step_raises_the_loss():
    """Batches have targets t ~ N(0, I), so that f(θ) = ½ Σ h·θ² and a constant."""
    squares = (CURVATURE * THETA) ** 2
    exact = divergence.Probe(squares.sum(), (squares + CURVATURE**2).sum(), CURVATURE.sum())
    config, largest = mezo.MezoConfig(1e-2), exact.largest_rate

    def change(key, rate):
        batch = jax.random.normal(jax.random.fold_in(key, 9), (D,))
        moved = mezo.step(mezo.pair_loss_of(quadratic), {"w": jnp.asarray(THETA)}, batch, key, rate, config).params
        return quadratic(moved, 0.0) - quadratic({"w": jnp.asarray(THETA)}, 0.0)

    keys = jax.random.split(jax.random.key(2, impl="threefry2x32"), 40_000)
    for factor, sign in ((0.5, -1), (1.5, 1)):
        changes = np.asarray(jax.jit(jax.vmap(change, in_axes=(0, None)))(keys, factor * largest))
        assert sign * changes.mean() > 3 * changes.std() / np.sqrt(len(changes))


def test_it_warns_above_that_rate_alone(probe):
    largest = probe.largest_rate
    assert divergence.warnings(probe, paper_config(learning_rate=largest * 0.9), D) == []
    (warning,) = divergence.warnings(probe, paper_config(learning_rate=largest * 1.1), D)
    assert "the loss is likely to diverge" in warning
    assert f"{largest:.2g}" in warning


def test_a_round_has_diverged_if_its_loss_is_far_above_the_typical_one_or_none_at_all():
    means = {"train_loss": 99.0, "projected_gradient": 99.0, "server_step": 1.0}  # which a single client can move
    metrics = [
        {"median_loss": loss, "median_gradient": 1.0, "diverged": diverged, "rolled_back": False} | means
        for loss, diverged in [(2.0, False)] * 6 + [(50.0, True)] * 9
    ]
    typical = divergence.typical(5.0, list(filter(divergence.kept, metrics)))
    assert typical == (2.0, 1.0)
    assert divergence.typical(5.0, []) == (5.0, np.inf)
    assert not typical.diverged(np.full((3, 4), 2.9))
    assert typical.diverged(np.full((3, 4), 3.1))
    assert typical.diverged(np.array([[2.0, np.nan], [np.inf, -np.inf]]))
    assert not typical.diverged(np.zeros((0, 4)))


@pytest.mark.parametrize("clients", range(3, 9))
def test_fewer_than_half_of_the_clients_cannot_make_a_round_diverge_or_move_the_usual_values(clients):
    draw = np.random.RandomState(clients)
    typical, liars = divergence.Typical(2.0, 1.0), (clients - 1) // 2
    for lie in (3e38, np.inf, np.nan, -3e38):
        losses = draw.uniform(1.9, 2.1, (clients, 4))
        gradients = draw.choice([-1.0, 1.0], (clients, 4, 1))
        losses[draw.permutation(clients)[:liars]] = lie
        assert not typical.diverged(losses)
        assert 1.9 < divergence.median_loss(losses) < 2.1
        if np.isfinite(lie):
            report = RoundReport(losses, gradients, np.ones(clients))
            before = divergence.median_gradient(report, np.ones(clients, bool))
            report.projected_gradients[:liars] = lie
            assert divergence.median_gradient(report, np.ones(clients, bool)) == pytest.approx(before)
        losses[: clients // 2 + 1] = 9.0
        assert typical.diverged(losses)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_the_median_gradient_estimates_the_standard_deviation_of_normal_ones(steps):
    gradients = 3 * np.random.RandomState(steps).standard_normal((100_000, steps, 1))
    report = RoundReport(np.zeros((100_000, steps)), gradients, np.full(100_000, 0.01))
    every = np.ones(100_000, bool)
    assert divergence.median_gradient(report, every) == pytest.approx(3, rel=0.03)
    assert divergence.median_gradient(report, ~every) is None


def test_projected_gradients_count_whatever_the_learning_rates_are():
    """A client that was not heard does not count."""
    gradients = np.array([[[1.0, -3.0]], [[2.0, 2.0]], [[np.nan, 0.0]]], np.float32)
    report = RoundReport(np.zeros((3, 1)), gradients, np.array([0.1, 0.2, 0.1]))
    heard = np.array([True, True, False])
    assert divergence.gradient_rms(report, heard) == pytest.approx(np.sqrt((1 + 9 + 4 + 4) / 4))
    assert divergence.gradient_rms(report, np.zeros(3, bool)) is None
    assert divergence.count_clipped(report, heard, 3.0) == 1
    assert divergence.count_clipped(report._replace(losses=np.array([[0.0], [np.inf], [np.nan]])), heard, 3.0) == 2


def test_growth_over_the_local_steps_is_seen_before_the_loss_is():
    draw = np.random.RandomState(3)
    steady = draw.standard_normal((4, 9, 1))
    steep = steady * np.geomspace(1, 16, 9)[:, None]
    heard = np.array([True, True, True, False])
    spoilt = steep.copy()
    spoilt[3] = np.nan
    of = lambda c: divergence.growth(RoundReport(np.zeros((4, 9)), c, np.ones(4)), heard)  # noqa: E731
    assert 0.5 < of(steady) < divergence.GROWTH
    assert of(spoilt) == pytest.approx(np.sqrt(np.mean(steep[:3, 6:] ** 2) / np.mean(steep[:3, :3] ** 2)))
    assert of(spoilt) > divergence.GROWTH
    assert of(steady[:, :6]) is None  # six of each third: too few


def test_a_random_walk_of_h_steps_goes_as_far_as_said():
    """θ after H updates along fresh directions, against η·|g|·√(d·H)."""
    trained, steps = 5000, 8
    work = client.mezo_client(mezo.MezoConfig())
    coefficients = np.full((steps, 1), 0.01 * 3.0, np.float32)
    key = jax.random.key(0, impl="threefry2x32")
    moved = work.reconstruct({"w": jnp.zeros(trained)}, key, coefficients, 0.01)
    assert divergence.step_length(0.01, 3.0, trained, steps) == pytest.approx(
        float(jnp.linalg.norm(moved["w"])), rel=0.05
    )
