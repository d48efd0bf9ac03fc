"""Runs of the fast recipe that its tests share: a rate that nobody sets, steps in part, half of the layers."""

import pytest
import small_run
from fast_runs import ROUNDS, poison, script, start

from fedmezo_jax.run import automatic_rate, client_failures
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.prepare import prepare


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is taken from the user's cache, and nothing is left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMEZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The defaults of the fast recipe, on a model of two layers."""
    place = tmp_path_factory.mktemp("small")
    return RunConfig(
        model=str(small_run.write_model(place / "model")),
        data=str(small_run.write_data(place / "data.jsonl")),
        clients=3,
        rounds=ROUNDS,
        local_steps=2,
        directions=4,
        layers="last:50%",
        max_length=64,
        test_examples=10,
        lora_rank=2,
    )


@pytest.fixture(scope="module")
def setup(config):
    return prepare(config)


@pytest.fixture(scope="module")
def steady(setup, tmp_path_factory):
    """Nothing is disturbed."""
    return start(tmp_path_factory.mktemp("runs") / "steady", setup)


@pytest.fixture(scope="module")
def scripted(setup, steady, tmp_path_factory):
    """The server takes all, twice, a quarter or none of its updates."""
    with pytest.MonkeyPatch.context() as patch:
        script(patch)
        return start(tmp_path_factory.mktemp("runs") / "scripted", setup)


@pytest.fixture(scope="module")
def bold(setup, steady, tmp_path_factory):
    """Starts at a rate that is far too high."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automatic_rate, "FIRST_MOVE", 0.3)
        return start(tmp_path_factory.mktemp("runs") / "bold", setup)


@pytest.fixture(scope="module")
def lost(setup, steady, tmp_path_factory):
    """Every client comes back with NaN in the second round."""
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        said = []
        run = start(tmp_path_factory.mktemp("runs") / "lost", setup, notify=said.append)
    assert said == [f"round 2: client {id} {client_failures.NOT_FINITE}: left out" for id in range(3)]
    return run


@pytest.fixture(params=["steady", "scripted", "bold", "lost"])
def run(request):
    return request.getfixturevalue(request.param)
