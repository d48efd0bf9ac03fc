"""A client gives the same numbers, bit for bit, alone and among others."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from fedmezo_jax.core import federated
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.batches import round_batches
from fedmezo_jax.run.config import RunConfig, paper_config
from fedmezo_jax.run.context import algorithm, build
from fedmezo_jax.run.prepare import prepare

CLIENTS, STEPS = 8, 3


def check_fewer_clients_give_the_same(report, everyone):
    among = report(everyone)
    for ids in ([3], [1, 6, 7]):
        alone = report(np.array(ids, np.int32))
        np.testing.assert_array_equal(alone.projected_gradients, np.asarray(among.projected_gradients)[ids])
        np.testing.assert_array_equal(alone.losses, np.asarray(among.losses)[ids])


@pytest.mark.parametrize(
    ("recipe", "precision", "batch_size", "pack"),
    [
        (paper_config, "float32", 2, False),
        (paper_config, "float32", 1, False),
        (paper_config, "paired", 2, False),
        (paper_config, "paired", 1, False),
        (RunConfig, "float32", 2, False),
        (RunConfig, "float32", 1, False),
        (RunConfig, "bfloat16", 1, False),
        (RunConfig, "float32", 2, True),
    ],
)
def test_a_client_alone_gives_the_numbers_that_it_gives_among_eight(recipe, precision, batch_size, pack):
    config = recipe(
        clients=CLIENTS,
        local_steps=STEPS,
        batch_size=batch_size,
        precision=precision,
        partition="iid",
        test_examples=8,
        length_buckets=1,
        pack=pack,
    )
    setup = prepare(config)
    everyone = np.arange(CLIENTS, dtype=np.int32)
    sizes = {"seed": config.seed, "local_steps": STEPS, "batch_size": batch_size}
    batches = round_batches(setup.task.train, setup.task.parts, everyone, 0, **sizes)

    def report(ids):
        some = replace(config, participation=len(ids) / CLIENTS)
        (init, round), loss = build(setup._replace(config=some, task=replace(setup.task, group_size=len(ids))))
        cohort = federated.Cohort(ids, np.ones(len(ids), np.float32), jax.tree.map(lambda leaf: leaf[ids], batches))
        rate = jnp.float32(2e-3) if config.learning_rate == "auto" else None
        return round.work(init(setup.params, CLIENTS), loss, cohort, run_key(config.seed), None, rate)

    check_fewer_clients_give_the_same(report, everyone)


def test_block_of_one_changes_no_bit():
    config = paper_config(
        clients=4, local_steps=2, batch_size=1, precision="float32", partition="iid", test_examples=8, length_buckets=1
    )
    setup = prepare(config)
    (init, round), loss = build(setup)
    ids = np.arange(4, dtype=np.int32)
    batches = round_batches(setup.task.train, setup.task.parts, ids, 0, seed=0, local_steps=2, batch_size=1)
    cohort = federated.Cohort(ids, np.ones(4, np.float32), batches)
    state, key = init(setup.params, 4), run_key(0)
    whole = round.work(state, loss, cohort, key)
    single = build(setup._replace(task=replace(setup.task, group_size=1)))[1]
    blocked = algorithm(config, 1, None, least_width=2).round.work(state, single, cohort, key)
    np.testing.assert_array_equal(whole.projected_gradients, blocked.projected_gradients)


@pytest.mark.parametrize("recipe", [paper_config, RunConfig])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_at_the_width_of_the_round_a_client_alone_gives_the_same_numbers_on_any_model(tmp_path, recipe, precision):
    """XLA sums the few rows of a small model in an order that depends on how many clients run at once. A client that
    works alone runs beside copies of itself, as many as there were clients, and so in the same program.
    """
    small_run.write_model(tmp_path / "model")
    small_run.write_data(tmp_path / "data.jsonl")
    config = recipe(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "data.jsonl"),
        clients=CLIENTS,
        local_steps=STEPS,
        max_length=64,
        precision=precision,
        partition="iid",
        test_examples=8,
        length_buckets=1,
    )
    setup = prepare(config)
    everyone = np.arange(CLIENTS, dtype=np.int32)
    sizes = {"seed": config.seed, "local_steps": STEPS, "batch_size": config.batch_size}
    batches = round_batches(setup.task.train, setup.task.parts, everyone, 0, **sizes)
    init, round = algorithm(config, CLIENTS, None, least_width=CLIENTS)
    loss, state = build(setup)[1], init(setup.params, CLIENTS)

    def report(ids):
        cohort = federated.Cohort(ids, np.ones(len(ids), np.float32), jax.tree.map(lambda leaf: leaf[ids], batches))
        return round.work(state, loss, cohort, run_key(config.seed), None, jnp.float32(1e-3))

    check_fewer_clients_give_the_same(report, everyone)
