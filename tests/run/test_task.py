"""The contract of a task, over LLaMA's and a small one; and a whole run of a task that is not a LLaMA."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from small_run import write_data, write_model

import fedmezo_jax as fmz
from fedmezo_jax.core import mezo
from fedmezo_jax.llama.checkpoints.adapter import load_adapter
from fedmezo_jax.run import ledger
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.replay import largest_difference

STEPS, BATCH = 2, 4


class Network(fmz.Task):
    """A perceptron on top of frozen random features."""

    def __init__(self, seed=0, scale=1.0):
        draw = np.random.default_rng(seed)
        self.frozen = {"features": draw.standard_normal((3, 8)).astype(np.float32)}
        x = draw.standard_normal((70, 3)).astype(np.float32)
        y = scale * np.sin(x.sum(axis=1)).astype(np.float32)
        self.train, self.test = {"x": x[:60], "y": y[:60]}, {"x": x[60:], "y": y[60:]}
        self.parts = [np.arange(10), np.arange(10, 35), np.arange(35, 60)]

    def init_params(self, key):
        first, second = jax.random.split(key)
        hidden = {"kernel": jax.random.normal(first, (8, 4)) / 3, "bias": jnp.zeros(4)}
        return {"hidden": hidden, "out": jax.random.normal(second, (4,)), "shift": jnp.float32(0)}

    @property
    def loss(self):
        return Partial(squared_error, self.frozen)

    def evaluate(self, params):
        return float(self.loss(params, self.test))

    def save(self, folder, params):
        (folder / "network").mkdir()
        np.savez(folder / "network" / "params.npz", *jax.tree.leaves(params))


def squared_error(frozen, params, batch):
    hidden = jnp.tanh(jnp.tanh(batch["x"] @ frozen["features"]) @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["out"] + params["shift"] - batch["y"]) ** 2)


@pytest.fixture(scope="module")
def llama_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return fmz.RunConfig(
        model=str(write_model(folder / "model")),
        data=str(write_data(folder / "data.jsonl", 120)),
        clients=3,
        test_examples=8,
        max_length=64,
        lora_rank=2,
        precision="float32",
    )


@pytest.fixture(scope="module", params=["network", "llama", "llama in buckets", "llama, packed"])
def task(request, llama_config):
    if request.param == "network":
        return Network()
    task = prepare(replace(llama_config, pack="packed" in request.param)).task
    if request.param == "llama in buckets":
        wide = task.train[0].shape[1]
        first = task.widths[-1]._replace(tokens=wide - 8)
        task = replace(task, widths=(first, *task.widths[-1:]))
        assert task.by_length
    return task


@pytest.fixture(scope="module")
def params(task):
    """θ away from its start, where half of a LoRA is zero."""
    start = task.init_params(jax.random.key(3))
    return mezo.shift(start, mezo.Perturbation(jax.random.key(4), 0.05))


def batch_of(task, first=0):
    return jax.tree.map(lambda leaf: leaf[first : first + BATCH], task.train)


def test_the_start_is_a_function_of_the_key(task):
    one, same, other = (task.init_params(jax.random.key(seed)) for seed in (1, 1, 2))
    assert largest_difference(one, same) is None
    assert 0 < largest_difference(one, other) < np.inf
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {jnp.dtype("float32")}


def test_the_losses_around_theta_are_those_of_the_plain_loss(task, params):
    perturbation = mezo.Perturbation(jax.random.key(5), 0.02)
    plus, minus = mezo.pair_loss_of(task.loss)(params, batch_of(task), perturbation)
    assert abs(plus - minus) > 1e-4
    np.testing.assert_allclose(task.pair_loss(params, batch_of(task), perturbation), (plus, minus), rtol=1e-5)
    np.testing.assert_allclose(task.point_loss(params, batch_of(task), perturbation), plus, rtol=1e-5)


def test_the_tangent_of_the_point_loss_is_the_slope_along_z(task, params):
    key, batch = jax.random.key(6), batch_of(task)

    def at(scale):
        return task.point_loss(params, batch, mezo.Perturbation(key, scale, tangent=True))

    value, slope = jax.jvp(at, (jnp.float32(0),), (jnp.float32(1),))
    zeros = jax.tree.map(jnp.zeros_like, params)
    z, gradient = mezo.shift(zeros, mezo.Perturbation(key, 1.0)), jax.grad(task.loss)(params, batch)
    expected = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (z, gradient)), strict=True))
    np.testing.assert_allclose(value, task.loss(params, batch), rtol=1e-6)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_evaluate_is_the_mean_loss_over_the_test_examples(task, params):
    np.testing.assert_allclose(task.evaluate(params), task.loss(params, task.test), rtol=1e-5)
    assert task.loss_before(params) == task.evaluate(params)


def test_parts_divide_the_training_examples(task):
    count = len(jax.tree.leaves(task.train)[0])
    assert sorted(np.concatenate(task.parts).tolist()) == list(range(count))
    held, computed = task.count_tokens(np.arange(count)[: count // 4 * 4].reshape(1, -1, 4))
    assert 0 < held <= computed


def test_save_writes_the_parameters(task, params, tmp_path):
    task.save(tmp_path, jax.device_get(params))
    if isinstance(task, Network):
        found = list(np.load(tmp_path / "network" / "params.npz").values())
    else:
        found = jax.tree.leaves(load_adapter(tmp_path / "adapter", task.model.config).lora)
    assert largest_difference(found, jax.tree.leaves(jax.device_get(params))) is None


# A run


def config(**fields):
    return fmz.RunConfig(
        **{"clients": 3, "rounds": 6, "local_steps": STEPS, "batch_size": BATCH, "learning_rate": 0.03, **fields}
    )


def run(folder, task=None, **fields):
    options = {"checkpoint_every": 2, "eval_every": 3, "check_rate": False}
    options |= {name: fields.pop(name) for name in ("resume", "on_round", "check_rate", "notify") if name in fields}
    return fmz.fine_tune(config(**fields), folder, task=task or Network(), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "run"
    return folder, run(folder)


def test_a_run_trains_and_leaves_what_every_run_leaves(finished):
    folder, result = finished
    assert result.loss_after < 0.9 * result.loss_before
    assert result.loss_after == Network().evaluate(result.params)
    assert [record["round"] for record in result.metrics] == [1, 2, 3, 4, 5, 6]
    assert [record["test_loss"] is None for record in result.metrics] == [True, True, False] * 2
    assert {record["tokens"] for record in result.metrics} == {(1 + 10) * 3 * STEPS * BATCH}  # a loss and ten tangents
    assert {file.name for file in folder.iterdir()} >= {"config.json", "run.ledger", "checkpoints", "network"}
    assert len(list(ledger.entries(folder / "run.ledger"))) == 6
    assert json.loads((folder / "config.json").read_text())["model"] == "task:Network"


def test_slopes_from_a_back_propagation_make_the_same_run_for_fewer_passes(finished, tmp_path):
    _, expected = finished  # along the same directions by tangents
    result = run(tmp_path / "run", estimator="backward-gradient")
    assert {record["tokens"] for record in result.metrics} == {2 * 3 * STEPS * BATCH}
    for leaf, other in zip(*map(jax.tree.leaves, (result.params, expected.params)), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-4)
    moved = jax.tree.map(jnp.subtract, expected.params, expected.context.params)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 0.05


def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path):
    folder, expected = finished

    def stop(record):
        if record["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", on_round=stop)
    result = run(tmp_path / "run", resume=True)
    assert largest_difference(result.params, expected.params) is None
    again, once = (list(ledger.entries(place / "run.ledger")) for place in (tmp_path / "run", folder))
    assert list(map(ledger.pack_entry, again)) == list(map(ledger.pack_entry, once))


def test_replay_rebuilds_it_bit_for_bit(finished):
    folder, result = finished
    replayed = fmz.replay(folder / "run.ledger", task=Network())
    assert replayed.rounds == 6
    assert largest_difference(replayed.params, result.params) is None
    start = fmz.replay(folder / "run.ledger", until=0, task=Network())
    assert largest_difference(start.params, jax.device_get(result.context.params)) is None


class Stranger(Network):
    pass


def test_replay_refuses_another_task_and_a_missing_one(finished):
    with pytest.raises(fmz.UserError, match="Network: its weights are not those that the run was on"):
        fmz.replay(finished[0] / "run.ledger", task=Network(seed=1))
    with pytest.raises(fmz.UserError, match=r"the run is of task:Network: give it to fedmezo_jax\.replay as"):
        fmz.replay(finished[0] / "run.ledger")
    with pytest.raises(fmz.UserError, match="the run is of task:Network and not of task:Stranger"):
        fmz.replay(finished[0] / "run.ledger", task=Stranger())


@pytest.mark.parametrize(
    "fields",
    [
        {"directions_shared": True, "personalize": "model-diff", "participation": 0.67},
        {"uplink": "lora", "on_divergence": "rollback"},
        {"algorithm": "fedavg"},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_every_kind_of_run_takes_a_task(fields, tmp_path):
    result = run(tmp_path / "run", **fields)
    assert result.loss_after < result.loss_before


def test_the_rate_check_measures_the_task(tmp_path):
    lines = []
    run(tmp_path / "run", rounds=1, learning_rate=30.0, check_rate=True, notify=lines.append)
    assert any(line.startswith("warning: --learning-rate 30 is above") for line in lines)


def test_a_task_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(fmz.UserError, match="clients=4: the task has parts for 3"):
        run(tmp_path / "run", clients=4)
    with pytest.raises(fmz.UserError, match="Network: the test loss before training is inf"):
        run(tmp_path / "run", Network(scale=np.float32(1e30)))
    lacking = Network()
    lacking.parts = [np.arange(60), np.arange(0), np.arange(3)]
    with pytest.raises(fmz.UserError, match="client 1 has no examples"):
        run(tmp_path / "run", lacking)
    assert not (tmp_path / "run").exists()


def test_of_the_run_only_the_llama_s_own_places_know_the_llama():
    from test_imports import FILES, imports_of

    found = {
        file.stem
        for file in FILES
        if file.parent.name == "run" and any(name.startswith("fedmezo_jax.llama") for name in imports_of(file))
    }
    assert found == {"prepare", "config_parts", "replay"}  # replay: a type alone
