"""The attack by shadow models: what it finds where the answer is known."""

import numpy as np
import pytest

from experiments.studies import shadow_models
from experiments.studies.example_losses import auc


def made(runs, examples, effect, seed=0):
    """Runs whose value of an example is its own level, noise of size 1, and the effect where it is a member."""
    draw = np.random.default_rng(seed)
    members = np.array([draw.permutation(examples) < examples // 2 for _ in range(runs)])
    levels = 10 * draw.standard_normal(examples)
    return members, levels + draw.standard_normal((runs, examples)) + effect * members


def mean_auc(attack, members):
    return np.mean([auc(attack(target)[inside], attack(target)[~inside]) for target, inside in enumerate(members)])


@pytest.mark.parametrize(("effect", "expected"), [(0.0, 0.5), (2.0, 0.92)])
def test_shadow_models_find_what_levels_hide_from_a_threshold(effect, expected):
    """Two unit normals that lie 2 apart have an AUC of Φ(√2) = 0.92; the levels of the examples lie ten times apart."""
    members, lowered = made(40, 400, effect)
    assert mean_auc(lambda target: shadow_models.scores(target, members, lowered), members) == pytest.approx(
        expected, abs=0.02
    )
    assert mean_auc(lambda target: lowered[target], members) < 0.56


def test_the_attacked_run_s_own_half_is_not_looked_at():
    members, lowered = made(8, 50, 1.0)
    before = shadow_models.scores(3, members, lowered)
    members[3] = ~members[3]
    assert np.array_equal(shadow_models.scores(3, members, lowered), before)


def test_a_run_is_trained_on_its_half_alone(monkeypatch, tmp_path):
    parts, fine_tune = [], shadow_models.fine_tune

    def noted(config, out, task, **rest):
        parts.append(task.parts)
        return fine_tune(config, out, task=task, **rest)

    monkeypatch.setattr(shadow_models, "fine_tune", noted)
    found = shadow_models._measure(shadow_models.PRESETS["smoke"].run, 5)
    inside = np.flatnonzero(found["members"])
    assert sorted(np.concatenate(parts[0])) == inside.tolist()
    assert len(inside) == len(found["members"]) // 2
    assert len(found["lowered"]) == len(found["members"])
    assert found["loss_after"] < found["loss_before"]
