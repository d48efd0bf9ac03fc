"""The studies of privacy: what their measures say where the answer is known."""

import numpy as np
import pytest

from experiments.studies import forgetting, privacy_utility
from experiments.studies.example_losses import auc, example_losses
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.prepare import prepare


@pytest.fixture(scope="module")
def smoke():
    return {"rounds": 2, "local_steps": 2, "length_buckets": 1, "partition": "iid", "test_examples": 8, "lora_rank": 2}


def test_auc_is_the_probability_that_a_member_scores_higher():
    members, others = np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0])
    pairs = [(member > other) + 0.5 * (member == other) for member in members for other in others]
    assert auc(members, others) == pytest.approx(np.mean(pairs))


def test_the_mean_of_an_example_s_losses_weighted_by_labels_is_the_test_loss(smoke):
    context = prepare(RunConfig(clients=2, precision="float32", **smoke))
    task = context.task
    losses = example_losses(task, context.params, task.test)
    labels = task.test.label_weights.sum(axis=1)
    assert np.average(losses, weights=labels) == pytest.approx(task.evaluate(context.params), rel=1e-5)


def test_a_ledger_in_clear_gives_its_examples_away_and_much_noise_hides_them(smoke):
    """A client of one example a step sends that example's own slopes."""
    config = RunConfig(clients=4, directions_shared=True, batch_size=1, directions=4, **smoke)
    clear = privacy_utility._measure(config)
    hidden = privacy_utility._measure(RunConfig(**{**config.__dict__, "dp_epsilon": 0.1}))
    assert clear["auc_ledger"] == 1
    assert 0.1 < hidden["auc_ledger"] < 0.9
    assert clear["loss_after"] < clear["loss_before"]


def test_a_client_with_no_weight_leaves_nothing_to_forget(smoke):
    """In a single round the replay without a client is the run without it; in more it is not, but nearer."""
    config = RunConfig(clients=3, learning_rate=5e-3, batch_size=1, **smoke)
    for rounds, apart in ((1, 0.0), (2, None)):
        made, _ = forgetting.adapters(prepare(RunConfig(**{**config.__dict__, "rounds": rounds})))
        left_out, whole = (
            forgetting._distance(made[name], made[forgetting.NEVER]) for name in (forgetting.LEFT_OUT, forgetting.WHOLE)
        )
        assert left_out == apart if apart is not None else 0 < left_out < whole


def test_the_share_that_is_lost_is_of_the_same_seed_s_run_without_noise():
    def point(epsilon, seed):
        return {"run": {**RunConfig(clients=4, directions_shared=True).__dict__, "dp_epsilon": epsilon, "seed": seed}}

    def found(after):
        return {"loss_before": 2.0, "loss_after": after, "auc_adapter": 0.5, "auc_ledger": 0.5}

    points = [point(None, 0), point(None, 1), point(8.0, 0), point(8.0, 1)]
    table = privacy_utility.conclude(points, [found(1.0), found(1.5), found(1.1), found(1.5)])
    assert [row["drop_lost"] for row in table] == pytest.approx([0.0, 0.05])
