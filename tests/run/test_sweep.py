"""Runs side by side are the runs that the main job makes one by one."""

from dataclasses import replace

import numpy as np
import pytest
from small_run import write_data, write_model

from fedmezo_jax.errors import UserError
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.loop import train
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.sweep import shape_of, sweep


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return paper_config(
        model=str(write_model(folder / "model")),
        data=str(write_data(folder / "data.jsonl", 120)),
        clients=3,
        rounds=4,
        local_steps=2,
        test_examples=8,
        max_length=64,
        prompt_style="plain",
        length_buckets=1,
        learning_rate=2e-3,
        perturbation_scale=1e-2,  # so that a loss's rounding, which is divided by 2μ, counts for little
        lora_rank=2,
        targets="v_proj",
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"personalize": "model-diff", "weighting": "samples"},
        {"personalize": "round-wise", "participation": 0.67, "server_optimizer": "momentum", "directions_shared": True},
        {"algorithm": "fedavg", "local_optimizer": "adam"},
        {"estimator": "forward-gradient", "directions": 3, "layers": "last:1"},
        {"estimator": "backward-gradient", "directions": 3, "layers": "last:1"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_each_run_is_the_main_job_s(tmp_path, base, fields):
    shared = replace(base, **fields)
    runs = [
        replace(shared, seed=3),
        replace(shared, seed=4, learning_rate=3e-3, personalize_scale=0.9),
        replace(shared, seed=3, perturbation_scale=3e-2),
    ]
    setups = [prepare(one) for one in runs]
    seen = []
    curves = sweep(setups, eval_every=2, on_round=seen.append)
    assert seen == [1, 2, 3, 4]
    for i, (setup, curve) in enumerate(zip(setups, curves, strict=True)):
        (tmp_path / str(i)).mkdir()
        alone = train(setup, tmp_path / str(i), checkpoint_every=10, eval_every=2)
        assert curve.rounds == [0, 2, 4]
        measured = [record["test_loss"] for record in alone.metrics if record["test_loss"] is not None]
        # In float32 the rounding of a loss, divided by 2μ, is what two programs may differ by.
        np.testing.assert_allclose(curve.test_loss, [alone.loss_before, *measured], rtol=1e-4)
        np.testing.assert_allclose(curve.train_loss, [record["train_loss"] for record in alone.metrics], rtol=1e-4)
    assert len({curve.test_loss[-1] for curve in curves}) == 3 - (
        shared.algorithm == "fedavg" or shared.estimator != "two-point"
    )  # which have no μ


def test_only_runs_of_one_shape_go_together(base):
    assert shape_of(base) == shape_of(replace(base, seed=9, learning_rate=5.0, perturbation_scale=0.1))
    assert shape_of(base) != shape_of(replace(base, clients=4))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dropout", 0.2),
        ("deadline", 1.5),
        ("on_divergence", "rollback"),
        ("length_buckets", 4),
        ("learning_rate", "auto"),
    ],
)
def test_an_option_that_a_sweep_cannot_follow_is_refused(base, option, value):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {value}"):
        sweep([prepare(replace(base, **{option: value}))], eval_every=1)
