"""A replay that leaves a client out."""

import jax
import numpy as np
import pytest
import small_run

from fedmezo_jax.errors import UserError
from fedmezo_jax.run import client_failures, ledger, run_checkpoints
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.replay import largest_difference, reconstruct, replay


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "leave-out") as folder:
        yield folder


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "own"])
def run(request, place):
    config = small_run.configuration(place, rounds=3, directions_shared=request.param)
    result = fine_tune(config, place / f"run-{request.param}", notify=lambda line: None)
    return config, place / f"run-{request.param}" / "run.ledger", result


def test_it_is_the_run_in_which_the_client_fails_up_to_where_that_client_would_have_moved_the_others(
    run, tmp_path, monkeypatch
):
    config, file, result = run
    monkeypatch.setattr(client_failures, "absent", lambda *rest: {1: client_failures.DROPPED})
    seen, save = [], run_checkpoints.save
    monkeypatch.setattr(
        run_checkpoints,
        "save",
        lambda m, f, progress, chain: (seen.append(jax.device_get(progress.state.params)), save(m, f, progress, chain)),
    )
    fine_tune(config, tmp_path / "failing", checkpoint_every=1, notify=lambda line: None)
    start = result.context.params
    first, second = (reconstruct(file, config, start, t, without=1)[0] for t in (1, 2))
    assert largest_difference(seen[0], first) is None
    whole = reconstruct(file, config, start, 2)[0]
    apart, moved = largest_difference(seen[1], second), largest_difference(whole, second)
    assert 0 < apart < moved


def test_a_round_that_only_this_client_answered_leaves_theta_where_it_was(place, tmp_path, monkeypatch):
    config = small_run.configuration(place, rounds=2, clients=2)
    monkeypatch.setattr(
        client_failures, "absent", lambda seed, t, *rest: {1: client_failures.DROPPED} if t == 0 else {}
    )
    result = fine_tune(config, tmp_path / "run", notify=lambda line: None)
    file, start = tmp_path / "run" / "run.ledger", jax.device_get(result.context.params)
    assert largest_difference(reconstruct(file, config, start, 1, without=0)[0], start) is None
    assert largest_difference(reconstruct(file, config, start, 2, without=0)[0], start) > 0


def test_who_cannot_be_left_out_is_said(run, place, tmp_path):
    _, file, _ = run
    with pytest.raises(UserError, match="--without 3: the run has clients 0 to 2"):
        replay(file, without=3)
    secret = small_run.configuration(place, rounds=1, directions_shared=True, secure_sum=True)
    fine_tune(secret, tmp_path / "run", notify=lambda line: None)
    assert np.all([entry.mean is not None for entry in ledger.entries(tmp_path / "run" / "run.ledger")])
    with pytest.raises(UserError, match="the clients' mean alone"):
        replay(tmp_path / "run" / "run.ledger", without=1)
