"""The jitted, vectorised round against the paper's loops, and the invariants that a run rests on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper_loop
import pytest
from jax.tree_util import Partial

from fedmezo_jax import client, federated, mezo, server

CLIENTS, STEPS, WIDTH = 6, 3, 7
RATE, MU = 0.05, 1e-2
GENERATOR = np.random.default_rng(3)
TARGETS = (
    GENERATOR.normal(size=(9, CLIENTS, STEPS, 4, WIDTH)).astype(np.float32) + np.arange(CLIENTS)[:, None, None, None]
)
START = {
    "w": GENERATOR.normal(size=WIDTH).astype(np.float32),
    "m": GENERATOR.normal(size=(4, WIDTH)).astype(np.float32),
}


def loss(params, batch):
    """Smooth, coupled across leaves and not quadratic; works on numpy and jax alike."""
    return ((params["m"] * params["w"] - batch) ** 2).mean() + 0.1 * (params["w"] ** 3).sum()


def run_key():
    return jax.random.key(5, impl="threefry2x32")


def cohort(t, ids, weights=None):
    ids = np.asarray(ids, np.int32)
    weights = np.ones(CLIENTS, np.float32) if weights is None else weights
    return federated.Cohort(jnp.asarray(ids), jnp.asarray(weights[ids]), jnp.asarray(TARGETS[t][ids]))


def run(cohorts, *, strategy="frozen", weights=None, block_size=None, directions=1, optimizer=None, scale=0.5):
    fed = federated.federated(
        client.mezo_work(mezo.MezoConfig(MU, directions)),
        server.RateConfig(RATE, strategy, scale),
        optimizer,
        block_size,
    )
    state = fed.init(jax.tree.map(jnp.asarray, START), CLIENTS)
    step = jax.jit(fed.round)
    pair_loss = Partial(mezo.pair_loss_of(loss))
    for t, ids in enumerate(cohorts):
        state, report = step(state, pair_loss, cohort(t, ids, weights), run_key())
        yield state, report


@pytest.mark.parametrize("strategy", ["frozen", "round-wise", "five-round", "model-diff"])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("directions", [1, 3])
def test_rounds_equal_the_papers_loops(strategy, partial, directions):
    cohorts = [np.arange(CLIENTS)] * 8
    if partial:
        cohorts = [server.sample_participants(1, t, CLIENTS, 4) for t in range(8)]
    weights = np.array([1, 2, 3, 4, 5, 6], np.float32)
    start = {name: leaf.astype(np.float64) for name, leaf in START.items()}
    expected = paper_loop.fedmezo(
        loss, start, TARGETS, cohorts, weights, run_key(), RATE, strategy, 0.5, MU, directions
    )
    for (state, report), (params, rates) in zip(
        run(cohorts, strategy=strategy, weights=weights, directions=directions), expected, strict=True
    ):
        for name in START:
            np.testing.assert_allclose(state.params[name], params[name], atol=5e-4)
        np.testing.assert_allclose(report.learning_rates, rates, rtol=2e-2)
    assert np.abs(params["m"] - START["m"]).max() > 0.2  # the loops went somewhere


@pytest.mark.parametrize("block_size", [1, 2, 4, 5])
def test_block_size_changes_no_bit(block_size):
    everyone = [np.arange(CLIENTS)] * 3
    *_, (whole, whole_report) = run(everyone, strategy="model-diff")
    *_, (blocked, blocked_report) = run(everyone, strategy="model-diff", block_size=block_size)
    chex.assert_trees_all_equal(whole, blocked)
    chex.assert_trees_all_equal(whole_report, blocked_report)


def test_a_round_compiles_once():
    fed = federated.federated(client.mezo_work(mezo.MezoConfig(MU)), server.RateConfig(RATE, "five-round"))
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(fed.round, 1), donate_argnums=0)
    state = fed.init(jax.tree.map(jnp.asarray, START), CLIENTS)
    pair_loss = Partial(mezo.pair_loss_of(loss))
    for t in range(4):
        state, _ = step(state, pair_loss, cohort(t, server.sample_participants(0, t, CLIENTS, 3)), run_key())
    assert state.round == 4


def test_a_lone_client_is_its_own_average():
    *_, (state, _) = run([[2]])
    key = federated.client_key(run_key(), 0, 2)
    work = client.mezo_work(mezo.MezoConfig(MU))
    alone = work(mezo.pair_loss_of(loss), START, jnp.asarray(TARGETS[0][2]), key, jnp.float32(RATE))
    chex.assert_trees_all_close(state.params, alone.params, atol=1e-6)


def test_server_optimizer_sees_the_pseudo_gradient():
    (plain, _), (scaled, _) = next(run([np.arange(CLIENTS)])), next(run([np.arange(CLIENTS)], optimizer=optax.sgd(0.5)))
    for name in START:
        moved = np.asarray(plain.params[name]) - START[name]
        np.testing.assert_allclose(scaled.params[name], START[name] + 0.5 * moved, atol=1e-6)


def test_fedavg_equals_hand_written_gradient_descent():
    fed = federated.federated(client.backprop_work(optax.sgd), server.RateConfig(RATE))
    state = fed.init(jax.tree.map(jnp.asarray, START), CLIENTS)
    state, report = jax.jit(fed.round)(state, Partial(loss), cohort(0, np.arange(CLIENTS)), run_key())
    ends = []
    for i in range(CLIENTS):
        w, m = START["w"].astype(np.float64), START["m"].astype(np.float64)
        for target in TARGETS[0][i].astype(np.float64):
            residual = 2 * (m * w - target) / target.size
            w, m = w - RATE * ((residual * m).sum(axis=0) + 0.3 * w**2), m - RATE * residual * w
        ends.append((w, m))
    np.testing.assert_allclose(state.params["w"], np.mean([w for w, _ in ends], axis=0), atol=1e-5)
    np.testing.assert_allclose(state.params["m"], np.mean([m for _, m in ends], axis=0), atol=1e-5)
    assert report.coefficients.shape == (CLIENTS, STEPS, 0)


def test_clients_see_different_directions_and_rounds_do_too():
    reports = [report.coefficients for _, report in run([np.arange(CLIENTS)] * 2)]
    values = np.concatenate([np.asarray(c).ravel() for c in reports])
    assert len(np.unique(values)) == values.size
