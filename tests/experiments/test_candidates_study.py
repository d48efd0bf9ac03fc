"""The study of candidates: its loop is the package's, and its changes are what their papers say."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import candidates
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.sweep import sweep

RUN = replace(candidates.PRESETS["smoke"].run, precision="float32", max_length=64)


def matrices(seed):
    draw = np.random.default_rng(seed)
    shapes = {"q_proj": {"A": (2, 16, 4), "B": (2, 4, 16)}, "v_proj": {"A": (2, 16, 4), "B": (2, 4, 8)}}
    draws = {name: {leaf: draw.standard_normal(shape) for leaf, shape in of.items()} for name, of in shapes.items()}
    return jax.tree.map(jnp.float32, draws)


def memory_of(update, rounds=3):
    return candidates.Memory(update, jax.tree.map(jnp.square, update), jnp.float32(4), jnp.int32(rounds))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_the_recipe_ends_where_the_packages_run_ends():
    context = prepare(replace(RUN, algorithm="fedavg", learning_rate=1.0))
    curve = sweep([prepare(replace(RUN, learning_rate=0.05))], RUN.rounds)[0]
    assert abs(curve.test_loss[-1] - curve.test_loss[0]) > 1e-3  # far more than may lie between the two
    assert candidates.final_loss(candidates.RECIPE, context, 0.05) == pytest.approx(curve.test_loss[-1], abs=1e-5)


def test_a_guided_direction_is_a_mean_of_the_draw_and_of_the_known_update():
    z, update, key = matrices(0), matrices(1), jax.random.key(0)
    known = flat(update) * np.sqrt(flat(update).size) / np.linalg.norm(flat(update))
    found = candidates.guided(1.35, False, memory_of(update), z, key)
    np.testing.assert_allclose(flat(found), np.sin(1.35) * flat(z) + np.cos(1.35) * known, rtol=1e-5, atol=1e-5)
    nothing_known = jax.tree.map(jnp.zeros_like, update)
    np.testing.assert_array_equal(flat(candidates.guided(1.35, False, memory_of(nothing_known), z, key)), flat(z))


def test_block_guided_directions_scale_each_layer_of_a_matrix_alike():
    update = matrices(1)
    found = candidates.guided(0.0, True, memory_of(update), matrices(0), jax.random.key(0))
    ratios = [np.asarray(a / b).reshape(2, -1) for a, b in zip(*map(jax.tree.leaves, (found, update)), strict=True)]
    for rows in ratios:
        np.testing.assert_allclose(rows, rows[:, :1].repeat(rows.shape[1], axis=1), rtol=1e-4)
    assert len({round(float(row[0]), 4) for rows in ratios for row in rows}) == 8


def test_curvature_lengthens_directions_where_updates_were_small():
    update = matrices(1)
    ones = jax.tree.map(jnp.ones_like, update)
    found = flat(candidates.by_curvature(memory_of(update), ones, jax.random.key(0)))
    assert np.sqrt(np.mean(found**2)) == pytest.approx(1.0, abs=1e-5)
    assert np.all(np.diff(found[np.argsort(np.abs(flat(update)))]) <= 1e-6)


def test_slopes_are_divided_by_their_deviation_or_by_what_is_usual():
    slopes = jnp.float32([1.0, -3.0, 5.0])
    np.testing.assert_allclose(candidates.over_deviation(memory_of({}), slopes), slopes / 4.0, rtol=1e-5)
    np.testing.assert_allclose(candidates.over_usual(memory_of({}), slopes), slopes / 2.0, rtol=1e-6)
    np.testing.assert_array_equal(candidates.over_usual(memory_of({}, rounds=0), slopes), slopes)


def test_an_orthogonal_step_keeps_the_norm_and_evens_out_singular_values():
    update = matrices(1)
    found = candidates.orthogonal(memory_of(update), update)
    for before, after in zip(*map(jax.tree.leaves, (update, found)), strict=True):
        for old, new in zip(np.asarray(before), np.asarray(after), strict=True):
            values = np.linalg.svd(new, compute_uv=False)
            assert np.linalg.norm(new) == pytest.approx(np.linalg.norm(old), rel=1e-5)
            assert values.max() / values.min() < 1.8
            left, _, right = np.linalg.svd(old, full_matrices=False)
            assert np.sum(new * (left @ right)) > 0.95 * np.linalg.norm(new) * np.sqrt(len(values))


def test_momentum_of_equal_updates_is_the_update():
    update = matrices(1)
    remembered = jax.tree.map(lambda leaf: leaf * (1 - 0.8**3), update)
    np.testing.assert_allclose(flat(candidates.with_momentum(memory_of(remembered), update)), flat(update), rtol=1e-5)


def test_directions_of_b_alone_leave_a():
    found = candidates.without_a(memory_of({}), matrices(0), jax.random.key(0))
    assert all(not np.any(leaves["A"]) and np.any(leaves["B"]) for leaves in found.values())


def test_all_candidates_have_the_same_compute():
    base = candidates.PRESETS["small"].run
    rounds = {label: candidates._run(base, each).rounds for label, each in candidates.CANDIDATES.items()}
    assert (rounds.pop("batch 1"), rounds.pop("5 directions")) == (30, 28)  # 15 · 11/6 = 27.5
    assert set(rounds.values()) == {15}


def test_an_unknown_candidate_is_refused():
    with pytest.raises(UserError, match="'Adam'; choose from the recipe; block-guided"):
        candidates.main(candidates.Config(only="FZOO; Adam"))
