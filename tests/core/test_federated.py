"""The jitted, vectorised round against the paper's loops, and the invariants that a run rests on."""

from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper_loop
import pytest
from jax.tree_util import Partial

from fedmezo_jax.core import aggregation, client, federated, mezo, personalization, random, transforms
from fedmezo_jax.core.blocks import map_blocks
from fedmezo_jax.run import messages

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


PAIR_LOSS = Partial(mezo.pair_loss_of(loss))


@cache  # a round is compiled once for all tests that have the same one
def make(strategy="frozen", block_size=None, directions=1, optimizer=None, scale=0.5, shared=False, decay=0.0):
    work = client.mezo_client(mezo.MezoConfig(MU, directions, weight_decay=decay))
    return federated.federated(work, personalization.RateConfig(RATE, strategy, scale), optimizer, block_size, shared)


def run(cohorts, *, weights=None, **options):
    fed = make(**options)
    state = fed.init(jax.tree.map(jnp.asarray, START), CLIENTS)
    for t, ids in enumerate(cohorts):
        state, report = fed.round(state, PAIR_LOSS, cohort(t, ids, weights), run_key())
        yield state, report


@pytest.mark.parametrize("strategy", ["frozen", "round-wise", "five-round", "model-diff"])
@pytest.mark.parametrize(("partial", "directions", "shared"), [(False, 1, False), (True, 3, False), (True, 1, True)])
def test_rounds_equal_the_papers_loops(strategy, partial, directions, shared):
    cohorts = [np.arange(CLIENTS)] * 8
    if partial:
        cohorts = [aggregation.sample_participants(1, t, CLIENTS, 4) for t in range(8)]
    weights = np.array([1, 2, 3, 4, 5, 6], np.float32)
    start = {name: leaf.astype(np.float64) for name, leaf in START.items()}
    expected = paper_loop.fedmezo(
        loss, start, TARGETS, cohorts, weights, run_key(), RATE, strategy, 0.5, MU, directions, shared
    )
    for (state, report), (params, rates) in zip(
        run(cohorts, strategy=strategy, weights=weights, directions=directions, shared=shared), expected, strict=True
    ):
        for name in START:
            np.testing.assert_allclose(state.params[name], params[name], atol=5e-4)
        np.testing.assert_allclose(report.learning_rates, rates, rtol=2e-2)
    assert np.abs(params["m"] - START["m"]).max() > 0.2  # the loops went somewhere


@pytest.fixture(scope="module")
def in_one_block():
    """The state and report after three rounds of all clients."""
    *_, last = run([np.arange(CLIENTS)] * 3, strategy="model-diff")
    return last


@pytest.mark.parametrize("block_size", [1, 2, 4, 5])
def test_block_size_changes_no_bit(block_size, in_one_block):
    everyone = [np.arange(CLIENTS)] * 3
    whole, whole_report = in_one_block
    *_, (blocked, blocked_report) = run(everyone, strategy="model-diff", block_size=block_size)
    chex.assert_trees_all_equal(whole, blocked)
    chex.assert_trees_all_equal(whole_report, blocked_report)


def test_a_round_compiles_once():
    fed = federated.federated(client.mezo_client(mezo.MezoConfig(MU)), personalization.RateConfig(RATE, "five-round"))
    chex.clear_trace_counter()
    work = jax.jit(chex.assert_max_traces(lambda *given: fed.round.work(*given), 1))
    round = replace(fed.round, work=work)
    state = fed.init(jax.tree.map(jnp.asarray, START), CLIENTS)
    for t in range(4):
        state, _ = round(state, PAIR_LOSS, cohort(t, aggregation.sample_participants(0, t, CLIENTS, 3)), run_key())
    assert state.round == 4


def test_a_lone_client_is_its_own_average():
    *_, (state, _) = run([[2]])
    key = random.client_key(run_key(), 0, 2)
    work = client.mezo_client(mezo.MezoConfig(MU))
    alone = work(mezo.pair_loss_of(loss), START, jnp.asarray(TARGETS[0][2]), key, jnp.float32(RATE))
    chex.assert_trees_all_close(state.params, alone.params, atol=1e-6)


def test_server_optimizer_sees_the_pseudo_gradient():
    (plain, _), (scaled, _) = next(run([np.arange(CLIENTS)])), next(run([np.arange(CLIENTS)], optimizer=optax.sgd(0.5)))
    for name in START:
        moved = np.asarray(plain.params[name]) - START[name]
        np.testing.assert_allclose(scaled.params[name], START[name] + 0.5 * moved, atol=1e-6)


def test_fedavg_equals_hand_written_gradient_descent():
    fed = federated.federated(client.sgd_client(optax.sgd), personalization.RateConfig(RATE))
    state = fed.init(jax.tree.map(jnp.asarray, START), CLIENTS)
    state, report = fed.round(state, Partial(loss), cohort(0, np.arange(CLIENTS)), run_key())
    ends = []
    for i in range(CLIENTS):
        w, m = START["w"].astype(np.float64), START["m"].astype(np.float64)
        for target in TARGETS[0][i].astype(np.float64):
            residual = 2 * (m * w - target) / target.size
            w, m = w - RATE * ((residual * m).sum(axis=0) + 0.3 * w**2), m - RATE * residual * w
        ends.append((w, m))
    np.testing.assert_allclose(state.params["w"], np.mean([w for w, _ in ends], axis=0), atol=1e-5)
    np.testing.assert_allclose(state.params["m"], np.mean([m for _, m in ends], axis=0), atol=1e-5)
    assert report.projected_gradients.shape == (CLIENTS, STEPS, 0)


def test_clients_see_different_directions_and_rounds_do_too():
    reports = [report.projected_gradients for _, report in run([np.arange(CLIENTS)] * 2)]
    values = np.concatenate([np.asarray(c).ravel() for c in reports])
    assert len(np.unique(values)) == values.size


OPTIONS = [{}, {"directions": 2, "decay": 0.1}, {"strategy": "model-diff"}, {"optimizer": optax.adam(0.01)}]


@pytest.mark.parametrize(("options", "steps"), [*zip(OPTIONS, [STEPS] * len(OPTIONS), strict=True), ({}, 1)])
def test_a_server_that_is_sent_parameters_gets_the_bits_of_one_that_is_sent_scalars(options, steps):
    """The parameters pass through bytes on their way."""
    fed = make(**options)
    states = [fed.init(jax.tree.map(jnp.asarray, START), CLIENTS) for _ in range(2)]
    for t in range(3):
        ids = aggregation.sample_participants(0, t, CLIENTS, 4)
        batches = jnp.asarray(TARGETS[t][ids][:, :steps])
        given = federated.Cohort(jnp.asarray(ids), jnp.ones(4), batches)
        report = jax.device_get(fed.round.work(states[0], PAIR_LOSS, given, run_key()))
        weights = np.array([1, 0, 2, 3], np.float32)  # one of them is left out
        uploads = [fed.round.upload(states[1], id, report, i, run_key()) for i, id in enumerate(ids)]
        uploads = [messages.unpack_lora_update(messages.pack_lora_update(WORD, theirs), START)[1] for theirs in uploads]
        states[0] = fed.round.apply(states[0], ids, weights, report, run_key())
        states[1] = fed.round.apply(states[1], ids, weights, report, run_key(), uploads)
        chex.assert_trees_all_equal(*states)
    assert np.abs(states[0].params["m"] - START["m"]).max() > 1e-3


WORD = messages.Update(0, 0, 1, np.zeros((1, 1), np.float32), np.zeros(1, np.float32))


@pytest.mark.parametrize("shared", [False, True])
def test_a_client_that_hears_only_the_broadcast_has_the_servers_parameters(shared):
    """It makes every round again from the messages, its own coefficients put in; the server's momentum, too."""
    fed = make(strategy="random", directions=2, optimizer=optax.sgd(0.7, 0.9), shared=shared)
    theirs = ours = fed.init(jax.tree.map(jnp.asarray, START), CLIENTS)
    for t in range(3):
        ids = aggregation.sample_participants(0, t, CLIENTS, 4)
        report = jax.device_get(fed.round.work(ours, PAIR_LOSS, cohort(t, ids), run_key()))
        weights = np.array([1, 1, 0, 1], np.float32)
        ours = fed.round.apply(ours, ids, weights, report, run_key())
        heard, me = ids[weights > 0], int(ids[0])
        sent, rates = report.projected_gradients[weights > 0].reshape(3, -1), report.learning_rates[weights > 0]
        if shared:
            _, mean, _ = messages.unpack_mean(messages.pack_mean(t, fed.round.combine(ours, ids, weights, report), 1.0))
            theirs = fed.round.apply_combined(theirs, mean.reshape(STEPS, 2), run_key())
        else:
            message = messages.pack_outcome(messages.Outcome(t, heard, None, rates, sent, 1.0), CLIENTS, me)
            got = messages.unpack_outcome(message, me, report.projected_gradients[0])
            told = federated.RoundReport(
                np.zeros((3, STEPS), np.float32), got.projected_gradients.reshape(3, STEPS, 2), got.learning_rates
            )
            theirs = fed.round.apply(theirs, got.ids, np.ones(3, np.float32), told, run_key())
        chex.assert_trees_all_equal(theirs.params, ours.params)
    assert np.abs(ours.params["m"] - START["m"]).max() > 1e-3


def test_shared_directions_move_everyone_along_the_same_lines():
    """Its round moves θ inside the span of its H directions; with own directions it does not."""
    for shared, rank in ((True, STEPS), (False, CLIENTS * STEPS)):
        *_, (state, report) = run([np.arange(CLIENTS)], shared=shared)
        move = np.concatenate([np.ravel(state.params[name] - START[name]) for name in START])
        keys = [random.shared_key(run_key(), 0)]
        if not shared:
            keys = [random.client_key(run_key(), 0, i) for i in range(CLIENTS)]
        zs = [
            paper_loop.direction(jax.random.fold_in(jax.random.fold_in(key, h), 0), START)
            for key in keys
            for h in range(STEPS)
        ]
        basis = np.stack([np.concatenate([z[name].ravel() for name in START]) for z in zs], axis=1)
        coefficients = np.linalg.lstsq(basis, move, rcond=None)[0]
        gradients = RATE * np.asarray(report.projected_gradients)
        mean = np.mean(gradients, axis=0) if shared else gradients / CLIENTS
        assert basis.shape[1] == rank
        np.testing.assert_allclose(coefficients, -mean.ravel(), atol=2e-6)


FRAGILE = Partial(mezo.pair_loss_of(lambda p, b: jnp.where(b[0, 0] > 1e6, jnp.nan, loss(p, b))))
"""A loss that is NaN for batches of huge numbers."""


@pytest.mark.parametrize(("strategy", "shared"), [("frozen", True), ("model-diff", False), ("round-wise", False)])
def test_a_client_with_nan_is_left_out_as_if_it_were_not_there(strategy, shared):
    fed, weights = make(strategy=strategy, shared=shared), np.array([1, 2, 3, 4, 5, 6], np.float32)
    ill, well = (fed.init(jax.tree.map(jnp.asarray, START), CLIENTS) for _ in range(2))
    for t in range(3):
        whole = cohort(t, np.arange(CLIENTS), weights)
        broken = whole._replace(batches=whole.batches.at[2, 1].set(1e7))  # in the second of its steps
        ill, report = fed.round(ill, FRAGILE, broken, run_key())
        assert np.isnan(report.projected_gradients[2]).any()
        well, _ = fed.round(well, FRAGILE, cohort(t, [0, 1, 3, 4, 5], weights), run_key())
        chex.assert_trees_all_equal(ill, well)
    assert np.isfinite(ill.params["m"]).all()


def test_a_round_without_one_good_client_is_an_error():
    fed = make()
    state = fed.init(jax.tree.map(jnp.asarray, START), CLIENTS)
    with pytest.raises(FloatingPointError, match="no client"):
        fed.round(state, Partial(mezo.pair_loss_of(lambda p, b: jnp.sum(p["w"]) / 0)), cohort(0, [1, 2]), run_key())


def test_parameters_that_are_not_finite_are_seen_too():
    """A back-propagated client's last step can throw θ away after its last loss was seen."""
    report = federated.RoundReport(
        np.ones((2, 3)), np.ones((2, 3, 0)), np.ones(2), {"w": np.array([[1.0, 2.0], [1.0, np.inf]])}
    )
    np.testing.assert_array_equal(federated.finite(report), [True, False])


def test_clipping_bounds_projected_gradients_and_stills_nan():
    fed = make()
    state = fed.init(jax.tree.map(jnp.asarray, START), CLIENTS)
    given = cohort(0, np.arange(CLIENTS))
    free = fed.round.work(state, FRAGILE, given, run_key())
    limit = np.median(np.abs(free.projected_gradients))
    bound = fed.round.work(state, FRAGILE, given, run_key(), transforms.clip(limit))
    assert np.abs(free.projected_gradients).max() > limit
    assert np.abs(bound.projected_gradients).max() == limit
    first = np.clip(free.projected_gradients[:, 0], -limit, limit)  # later steps start from elsewhere
    np.testing.assert_allclose(bound.projected_gradients[:, 0], first, rtol=1e-5)
    broken = given._replace(batches=given.batches.at[2, 1].set(1e7))
    still = fed.round.work(state, FRAGILE, broken, run_key(), transforms.clip(np.float32(np.inf)))
    assert still.projected_gradients[2, 1] == 0
    assert np.isfinite(still.projected_gradients).all()
    assert np.isnan(still.losses[2, 1])


def test_a_single_block_is_traced_once():
    traced = []

    def run(block):
        traced.append(block.shape)
        return 2 * block

    doubled = jax.jit(lambda blocks, t: map_blocks(run, blocks, t))(jnp.arange(3.0)[None], jnp.int32(0))
    assert traced == [(3,)]
    np.testing.assert_array_equal(doubled, [[0, 2, 4]])
