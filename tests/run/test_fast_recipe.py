"""Whole runs of the fast recipe: a rate that nobody sets, steps that the server takes in part, half of the layers."""

import itertools
import json
import math
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgpack
import numpy as np
import pytest
import small_run
from lying_clients import altered, intercepted

from experiments import _cli, evaluate, fedmezo, generate, merge
from experiments import replay as replay_command
from fedmezo_jax.core import mezo
from fedmezo_jax.core.federated import RoundReport
from fedmezo_jax.core.random import client_key, run_key
from fedmezo_jax.data.examples import HiddenBatch, TokenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.task import LlamaTask
from fedmezo_jax.run import automatic_rate, client_failures, ledger, ledger_checks, loop, messages, rounds, run_folder
from fedmezo_jax.run.config import RunConfig, paper_config
from fedmezo_jax.run.context import algorithm, build
from fedmezo_jax.run.loop import RunResult, train
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.replay import largest_difference, replay

ROOT = Path(__file__).parents[2]
ROUNDS = 6
FACTORS = {2.0: 1.4, 1.0: 1.1, 0.25: 0.7, 0.0: 0.5}
"""The rule as the documents state it: what the server may take, and what the rate is multiplied by then."""
SCRIPT = [  # validation losses of a round: without the update, after all of it, after twice or a quarter of it
    (1.0, 2.0, 3.0),
    (1.0, 2.0, 0.5),
    (1.0, 0.5, 0.4),
    (1.0, 0.5, 0.6),
    (1.0, math.nan, math.inf),
    (1.0, 1.5, 0.9),
]
TAKEN = [0.0, 0.25, 2.0, 1.0, 0.0, 0.25]
"""What the server must take by that script."""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is taken from the user's cache, and nothing is left in it. Runs of one setup share their programs."""
    built: dict[Any, Any] = {}

    def shared(setup):
        key = id(setup.task), setup.config
        if key not in built:
            built[key] = setup, build(setup)  # the setup too, so that no other gets its id
        return built[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMEZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(loop, "build", shared)
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


class Run(NamedTuple):
    """A finished run: its folder, θ after each of its rounds, and how many programs were compiled by then."""

    setup: Any
    folder: Path
    result: RunResult
    thetas: list[Any]
    compiled: list[int]

    @property
    def entries(self):
        return list(ledger.entries(self.folder / "run.ledger"))

    @property
    def states(self):
        """θ before each round and after the last."""
        return [jax.device_get(self.setup.lora), *self.thetas]


@contextmanager
def recorded():
    """θ after each round that is made in the block, by a run or by a replay."""
    seen, advance = [], rounds.advance

    def record(*given):
        progress = advance(*given)
        seen.append(jax.device_get(progress.state.params))
        return progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "advance", record)
        yield seen


def start(folder, setup, **options):
    """Runs or resumes as the command does."""
    run_folder.check_folder(folder, setup.config, resume=True)
    folder.mkdir(exist_ok=True)
    run_folder.write_json(folder / "config.json", asdict(setup.config))
    compiled, after = [], []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with recorded() as thetas:
            count = {"on_round": lambda record: after.append(len(compiled))} | options
            result = train(setup, folder, checkpoint_every=2, eval_every=2, **count)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return Run(setup, folder, result, thetas, after)


def script(patch, first=0):
    """From round ``first`` on the validation losses are those of the script."""
    losses = itertools.chain(*SCRIPT[first:])
    patch.setattr(LlamaTask, "validate", lambda task, params: next(losses))


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


def poison(patch):
    nan = np.float32(np.nan)
    intercepted(patch, [1], lambda id, m: altered(m, projected_gradients=lambda g: g * nan))


@pytest.fixture(params=["steady", "scripted", "bold", "lost"])
def run(request):
    return request.getfixturevalue(request.param)


# The rate, the steps and the ledger


def test_the_ledger_replays_bit_for_bit_after_every_round(run):
    with recorded() as thetas:
        again = replay(run.folder / "run.ledger")
    assert largest_difference(again.lora, run.result.lora) is None
    assert len(thetas) == len(run.thetas) == ROUNDS
    for ours, theirs in zip(run.thetas, thetas, strict=True):
        assert largest_difference(ours, theirs) is None


def test_every_rate_follows_from_the_first_one_and_the_recorded_steps(run):
    rate = np.float32(ledger.read_header(run.folder / "run.ledger")["first_rate"])
    for entry, record in zip(run.entries, run.result.metrics, strict=True):
        assert entry.step in FACTORS
        assert entry.step == record["server_step"]
        assert entry.learning_rates.dtype == np.float32
        np.testing.assert_array_equal(entry.learning_rates, rate)
        rate = rate * np.float32(FACTORS[entry.step])


def test_the_first_step_moves_each_entry_by_two_thousandths(steady):
    """√(mean of (Δθ)²) = η·√(E[g²]/n). The round's later steps are at a θ that has moved by as little, so that their g
    are a few percent off those that the rate was measured by.
    """
    (first, *_) = steady.entries
    gradients = np.array([messages.unpack_update(message).projected_gradients for message in first.updates])
    assert gradients.shape == (3, 2, 4)
    move = float(first.learning_rates[0]) * math.sqrt(np.mean(gradients**2) / 4)
    assert move == pytest.approx(2e-3, rel=0.1)


def test_the_loss_goes_down_and_the_rate_up(steady):
    assert steady.result.loss_after < steady.result.loss_before - 0.5
    assert steady.entries[-1].learning_rates[0] > 2 * steady.entries[0].learning_rates[0]


def test_nothing_is_compiled_after_the_first_round(steady):
    assert steady.compiled[0] > 0
    assert steady.compiled == [steady.compiled[0]] * ROUNDS


def test_the_validation_loss_never_rises(setup, steady, bold):
    for run in (steady, bold):
        losses = [setup.task.validate(theta) for theta in run.states]
        assert all(after <= before for before, after in itertools.pairwise(losses))
        assert losses[-1] < losses[0]
    assert min(entry.step for entry in bold.entries) < 1  # the rate was too high indeed
    assert max(entry.learning_rates[0] for entry in bold.entries) > 10 * steady.entries[-1].learning_rates[0]


def test_validation_examples_are_in_neither_training_nor_test_rows(config, setup):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaTask, "from_hidden_states", lambda task, *_: task)
        task = prepare(config).task
    train_rows, validation, test = (
        {row.tobytes() for row in np.asarray(rows.tokens)} for rows in (task.train, task.validation, task.test)
    )
    assert len(validation) == len(setup.task.validation.labels) == 32
    assert not validation & (train_rows | test)
    np.testing.assert_array_equal(np.sort(np.concatenate(task.parts)), np.arange(len(task.train.labels)))


_direction = jax.jit(lambda zero, key: mezo.shift(zero, mezo.Perturbation(key, 1.0, "rademacher")))


def whole_update(theta, entry, config):
    """θ after the whole of a round's update, in float64: each client's Δ = −Σ_h (η/n)·Σ_k g_hk·z_hk, their mean, and
    the server's learning rate.
    """
    moved = jax.tree.map(lambda leaf: leaf.astype(np.float64), theta)
    zero = jax.tree.map(np.zeros_like, theta)
    for id, rate, message in zip(entry.ids, entry.learning_rates, entry.updates, strict=True):
        gradients = messages.unpack_update(message).projected_gradients
        for h, k in np.ndindex(*gradients.shape):
            key = jax.random.fold_in(client_key(run_key(config.seed), entry.round, int(id)), h)
            size = config.server_learning_rate * float(rate) * float(gradients[h, k]) / gradients.shape[1]
            z = _direction(zero, jax.random.fold_in(key, k))
            moved = jax.tree.map(lambda leaf, z, size=size: leaf - size / len(entry.ids) * np.asarray(z), moved, z)
    return moved


def test_theta_moves_by_as_much_of_the_update_as_was_taken(config, scripted):
    """Against a computation in float64; the run rounds some dozens of sums to float32."""
    assert [entry.step for entry in scripted.entries] == TAKEN
    for entry, before, after in zip(scripted.entries, scripted.states[:-1], scripted.thetas, strict=True):
        whole = whole_update(before, entry, config)
        for old, all_of_it, new in zip(*map(jax.tree.leaves, (before, whole, after)), strict=True):
            assert np.abs(all_of_it - old).max() > 1e-3
            np.testing.assert_allclose(new, old + entry.step * (all_of_it - old), rtol=0, atol=2e-6)
        if not entry.step:
            assert largest_difference(before, after) is None


def test_the_next_rate_is_lower_after_a_round_that_was_not_taken_whole(scripted):
    rates = [float(entry.learning_rates[0]) for entry in scripted.entries]
    for step, (rate, following) in zip(TAKEN, itertools.pairwise(rates), strict=False):
        assert (following < rate) == (step < 1)


def test_a_round_in_which_all_clients_diverge_is_not_taken(lost):
    first, second, third, *_ = lost.entries
    assert (first.step > 0, second.step, second.attempt) == (True, 0.0, 0)
    assert not second.weights.any()
    assert largest_difference(*lost.thetas[:2]) is None
    np.testing.assert_array_equal(third.learning_rates, second.learning_rates / 2)
    assert third.step > 0
    assert lost.result.metrics[1]["train_loss"] is None


def test_a_first_rate_beyond_all_reason_ends_no_run(setup, steady, tmp_path, monkeypatch):
    monkeypatch.setattr(automatic_rate, "FIRST_MOVE", 1e36)
    run = start(tmp_path / "run", setup)
    assert {entry.step for entry in run.entries} == {0.0}
    assert largest_difference(run.result.lora, jax.device_get(setup.lora)) is None
    assert run.result.loss_after == run.result.loss_before
    assert largest_difference(replay(run.folder / "run.ledger").lora, run.result.lora) is None


@pytest.mark.parametrize("step", FACTORS)
def test_no_number_of_rounds_takes_the_rate_out_of_float32(step):
    """An infinite rate times a projected gradient of 0 is NaN, and no rate can be raised from 0."""
    rate = np.float32(1e-2)
    for _ in range(1000):
        rate = automatic_rate.next_rate(rate, step)
    assert rate.dtype == np.float32
    assert np.finfo(np.float32).tiny < rate < np.inf  # some devices take subnormal numbers for 0


@pytest.mark.parametrize("gradient", [0.0, 1e-44, 1e38, math.nan, math.inf])
def test_the_first_rate_is_a_number_whatever_is_measured(gradient):
    report = RoundReport(np.ones((3, 2)), np.full((3, 2, 4), gradient, np.float32), np.zeros(3, np.float32))
    rate = automatic_rate.first_rate(report, 100)
    assert np.finfo(np.float32).tiny < rate < np.finfo(np.float32).max
    assert float(np.float32(rate)) == pytest.approx(rate, rel=1e-6)


# Stopped and gone on with


class StopError(Exception):
    """The power cut."""


def content(folder):
    """All that a run leaves and that is no time."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untimed = [{key: value for key, value in record.items() if "seconds" not in key} for record in records]
    book = folder / "run.ledger"
    adapter = {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()}
    return untimed, adapter, book.read_bytes() if book.exists() else None


def cut_after(patch, count):
    """The power goes when the ledger has ``count`` rounds: the last one is in no metrics and in no checkpoint."""
    append = ledger.Ledger.append

    def cut(book, entry):
        chain = append(book, entry)
        if book.rounds == count:
            raise StopError
        return chain

    patch.setattr(ledger.Ledger, "append", cut)


def begun(folder):
    return len(list(ledger.entries(folder / "run.ledger")))


SETTINGS = {
    "steady": lambda patch, first: None,
    "scripted": script,
    "lost": lambda patch, first: poison(patch),
}


def stopped_and_resumed(setup, folder, setting, stop, monkeypatch):
    """Stopped after a record of the ledger, and gone on with."""
    with monkeypatch.context() as patch:
        setting(patch, 0)
        cut_after(patch, stop)
        with pytest.raises(StopError):
            start(folder, setup)
    assert begun(folder) == stop
    assert len(run_folder.read_metrics(folder)) == stop - 1
    searched, choose = [], automatic_rate.choose_step
    with monkeypatch.context() as patch:
        setting(patch, stop)
        patch.setattr(automatic_rate, "first_rate", lambda *_: pytest.fail("the rate was measured again"))
        patch.setattr(automatic_rate, "choose_step", lambda *given: searched.append(1) or choose(*given))
        run = start(folder, setup)
    # What is in the ledger is decided, and a round without usable numbers has no update to search along.
    assert len(searched) == sum(bool(entry.weights.any()) for entry in run.entries[stop:])
    return run


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_ends_as_an_undisturbed_one(name, stop, request, setup, tmp_path, monkeypatch):
    expected = request.getfixturevalue(name)
    run = stopped_and_resumed(setup, tmp_path / "run", SETTINGS[name], stop, monkeypatch)
    assert content(run.folder) == content(expected.folder)
    assert (run.result.loss_before, run.result.loss_after) == (expected.result.loss_before, expected.result.loss_after)


def test_the_ledger_alone_makes_the_run_again(run, tmp_path, monkeypatch):
    """Without checkpoints, the clients' work and validation losses."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(folder / name)
    for module, name in ((automatic_rate, "first_rate"), (automatic_rate, "choose_step"), (rounds, "run_round")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the ledger was not used"))
    again = start(folder, run.setup)
    assert len(again.thetas) == ROUNDS
    assert content(folder) == content(run.folder)


def test_momentum_and_the_clients_own_rates_are_rebuilt_too(setup, tmp_path, monkeypatch):
    """Both hang on what earlier rounds were, those among them that were taken in part or not at all."""
    ours = setup._replace(config=replace(setup.config, personalize="model-diff", server_optimizer="momentum"))
    with monkeypatch.context() as patch:
        script(patch)
        whole = start(tmp_path / "whole", ours)
    assert [entry.step for entry in whole.entries] == TAKEN
    assert any(len(set(entry.learning_rates)) > 1 for entry in whole.entries)
    resumed = stopped_and_resumed(ours, tmp_path / "cut", script, 3, monkeypatch)
    assert content(resumed.folder) == content(whole.folder)
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(resumed.folder / name)
    start(resumed.folder, ours)
    assert content(resumed.folder) == content(whole.folder)
    assert largest_difference(replay(whole.folder / "run.ledger").lora, whole.result.lora) is None


def test_a_run_that_sends_its_lora_is_the_same_run(setup, steady, tmp_path, monkeypatch):
    """The server reconstructs with the program that the clients use, so it is the same adapter bit for bit."""
    ours = setup._replace(config=replace(setup.config, uplink="lora"))
    whole = start(tmp_path / "whole", ours)
    assert largest_difference(whole.result.lora, steady.result.lora) is None
    assert largest_difference(replay(whole.folder / "run.ledger").lora, whole.result.lora) is None
    resumed = stopped_and_resumed(ours, tmp_path / "cut", SETTINGS["steady"], 3, monkeypatch)
    assert content(resumed.folder) == content(whole.folder)


def test_back_propagation_finds_its_rate_and_goes_on_after_a_stop(setup, tmp_path):
    ours = setup._replace(config=replace(setup.config, algorithm="fedavg"))
    whole = start(tmp_path / "whole", ours)
    assert whole.result.loss_after < whole.result.loss_before
    rate = np.float32(whole.result.metrics[0]["learning_rates"][0])
    for record in whole.result.metrics:
        np.testing.assert_array_equal(np.float32(record["learning_rates"]), rate)
        rate = rate * np.float32(FACTORS[record["server_step"]])

    def cut(record):
        if record["round"] == 3:
            raise StopError

    with pytest.raises(StopError):
        start(tmp_path / "cut", ours, on_round=cut)
    start(tmp_path / "cut", ours)
    assert content(tmp_path / "cut") == content(whole.folder)


# What clients are sent


def test_a_client_that_reads_the_outcomes_follows_the_server(setup, scripted):
    """From the bytes of the outcomes alone, and its own projected gradients; a round that is not taken has none."""
    config, me = setup.config, 1
    init, round = algorithm(config)
    state, key = init(setup.lora, 3), run_key(config.seed)
    for entry, record, theirs in zip(scripted.entries, scripted.result.metrics, scripted.thetas, strict=True):
        start_size = len(messages.pack_start(entry.round, 1.0))
        if not entry.step:
            assert record["client_downlink_bytes"] == [start_size] * 3
            state = state._replace(round=state.round + 1)
        else:
            updates = [messages.unpack_update(message) for message in entry.updates]
            sent = np.array([update.projected_gradients.ravel() for update in updates])
            outcome = messages.Outcome(entry.round, entry.ids, None, entry.learning_rates, sent, entry.step)
            message = messages.pack_outcome(outcome, 3, me)
            assert record["client_downlink_bytes"][me] == start_size + len(message)
            got = messages.unpack_outcome(message, me, updates[me].projected_gradients)
            report = RoundReport(
                np.zeros((3, 2), np.float32), got.projected_gradients.reshape(3, 2, 4), got.learning_rates
            )
            moved = round.apply(state, got.ids, np.ones(3, np.float32), report, key)
            state = rounds.take_step(state, moved, got.step)
        assert largest_difference(jax.device_get(state.params), theirs) is None


def test_a_client_that_reads_the_means_follows_the_server(setup, scripted):
    """The scripted run's numbers and steps, along shared directions."""
    config = replace(setup.config, directions_shared=True)
    init, round = algorithm(config)
    progress = rounds.begin(init(setup.lora, 3), config, 1e-3)
    state, key = progress.state, run_key(config.seed)
    for entry in scripted.entries:
        whole = rounds.move(config, round, progress, entry, None, key)
        progress = rounds.advance(config, progress, entry, whole)
        combined = round.combine(state, entry.ids, np.ones(3), rounds.report_of(entry, 2, 4))
        message = messages.pack_mean(entry.round, combined, entry.step)
        number, mean, step = messages.unpack_mean(message)
        assert (number, step) == (entry.round, entry.step)
        state = rounds.take_step(state, round.apply_combined(state, mean.reshape(2, 4), key) if step else None, step)
        assert largest_difference(*jax.device_get((state.params, progress.state.params))) is None
    assert largest_difference(*jax.device_get((state.params, setup.lora))) > 1e-3


@pytest.mark.parametrize("step", [None, 1, True, b"", "2", []])
def test_a_step_that_is_no_number_is_refused(step):
    outcome = messages.Outcome(9, np.array([0, 2]), None, np.ones(2, np.float32), np.ones((2, 3), np.float32), math.pi)
    for message, unpack in (
        (messages.pack_outcome(outcome, 8), messages.unpack_outcome),
        (messages.pack_mean(9, np.ones((2, 3), np.float32), math.pi), messages.unpack_mean),
    ):
        *fields, last = msgpack.unpackb(message)
        assert last == np.float32(math.pi)
        with pytest.raises(UserError, match="is malformed"):
            unpack(msgpack.packb([*fields, step]))
        with pytest.raises(UserError, match="format version"):
            unpack(msgpack.packb(fields))  # as it was sent when there were no steps


# Hidden states


def test_from_hidden_states_or_from_tokens_it_is_the_same_run_up_to_rounding(config, setup, steady, tmp_path):
    """A cached state is what the frozen layers give in a program of their own, which XLA may fuse and sum in another
    order: some 1e-7 of a float32 loss, and of its slopes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaTask, "from_hidden_states", lambda task, *_: task)
        whole = prepare(replace(config, layers="last:1"))
    run = start(tmp_path / "whole", whole._replace(config=config))
    assert isinstance(whole.task.train, TokenBatch)
    assert isinstance(setup.task.train, HiddenBatch)
    assert [entry.step for entry in run.entries] == [entry.step for entry in steady.entries]
    for ours, theirs in zip(run.entries, steady.entries, strict=True):
        for one, other in zip(ours.updates, theirs.updates, strict=True):
            one, other = messages.unpack_update(one), messages.unpack_update(other)
            size = np.sqrt(np.mean(other.projected_gradients**2))
            np.testing.assert_allclose(one.projected_gradients, other.projected_gradients, rtol=0, atol=1e-4 * size)
            np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
    assert run.result.loss_after == pytest.approx(steady.result.loss_after, rel=1e-5)
    assert (largest_difference(run.result.lora, steady.result.lora) or 0) < 1e-4


def test_the_device_holds_the_layers_from_the_first_trained_one_on_alone(setup):
    assert {leaf.shape[0] for leaf in jax.tree.leaves(setup.task.base["layers"])} == {1}
    assert set(setup.task.base) == {"layers", "norm", "lm_head"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(setup.lora)} == {1}


def command(module, monkeypatch, *argv):
    """Runs a command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    try:
        _cli.run(module.main, module.Config, module.__doc__)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def results(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_other_commands_take_an_adapter_of_some_layers(config, steady, tmp_path, monkeypatch, capsys):
    adapter = steady.folder / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    merged = tmp_path / "merged"
    assert command(merge, monkeypatch, "--model", config.model, "--adapter", adapter, "--out", merged) == 0
    data = ("--data", config.data, "--max-length", 64, "--test-examples", 10)
    subjects = {"adapter": ("--model", config.model, "--adapter", adapter), "merged": ("--model", merged)}
    said = {}
    assert command(evaluate, monkeypatch, *subjects["adapter"], *data, "--out", tmp_path / "loss") == 0
    assert results(tmp_path / "loss")[0]["value"] == pytest.approx(steady.result.loss_after, rel=1e-5)
    for name, subject in subjects.items():
        asked = ("--prompt", "first red green", "--prompt", "both sun moon", "--instruct", "--max-new-tokens", 8)
        assert command(generate, monkeypatch, *subject, *asked, "--out", tmp_path / name) == 0
        said[name] = results(tmp_path / name)
    assert said["adapter"] == said["merged"]
    book, out = steady.folder / "run.ledger", tmp_path / "replayed"
    assert command(replay_command, monkeypatch, book, "--out", out) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in (out / "adapter").iterdir()} == content(steady.folder)[1]


# Ledgers that no run leaves


def take(value):
    return lambda header, payloads: payloads[2].update(step=value)


def first_rate(value):
    return lambda header, payloads: header.update(first_rate=value)


def rates(factor, t=2):
    def change(header, payloads):
        learning_rates = np.frombuffer(payloads[t]["learning_rates"], "<f4") * np.float32(factor)
        payloads[t]["learning_rates"] = learning_rates.astype("<f4").tobytes()

    return change


def fixed(rate, step=1.0):
    """Made the first round of a run at a fixed rate; ``rate`` is in units of the first round's."""

    def change(header, payloads):
        header["config"]["learning_rate"] = rate * header["first_rate"]
        header["config_hash"] = ledger.config_hash(header["config"])
        payloads[0]["step"] = step
        del payloads[1:]

    return change


GOOD = {"as it was": lambda header, payloads: None, "of a fixed rate": fixed(1.0)}
BAD = {
    **{f"step {step}": (take(step), "took") for step in (0.5, -1.0, 3.0, math.nan, math.inf)},
    **{f"step {step!r}": (take(step), "is malformed") for step in (None, 1, True, "2", b"")},
    "another step than the next rate says": (take(0.0), "round 4 .* learning rate is not within"),
    "no step": (lambda header, payloads: payloads[2].pop("step"), "is malformed"),
    "a step at a fixed rate": (fixed(1.0, step=2.0), "took 2 of its update"),
    "a step undone at a fixed rate": (fixed(1.0, step=0.0), "took 0 of its update"),
    "a rate that does not follow": (rates(1.001), "round 3 .* learning rate is not within"),
    "one rate kept": (rates(1 / 1.4), "round 3 .* learning rate is not within"),
    "another first rate": (lambda h, _: h.update(first_rate=h["first_rate"] * 1.001), "round 1 .* learning rate"),
    **{
        f"first rate {rate!r}": (first_rate(rate), "first_rate cannot be")
        for rate in (-1e-3, 0.0, math.nan, math.inf, -math.inf, 1, True, None, "1e-3")
    },
    "no first rate": (lambda header, payloads: header.pop("first_rate"), "first_rate is missing"),
    "another rate than the fixed one": (fixed(1.5), "first_rate cannot be"),
}


def changed(change, folder, file):
    header = ledger.read_header(folder / "run.ledger")
    payloads = [msgpack.unpackb(record.payload) for record in ledger.records(folder / "run.ledger")][1:]
    change(header, payloads)
    book = ledger.create(file, header)
    for payload in payloads:
        book._write(msgpack.packb(payload))
    return file


@pytest.mark.parametrize("name", GOOD)
def test_a_ledger_made_in_the_same_way_is_accepted(name, steady, tmp_path):
    file = changed(GOOD[name], steady.folder, tmp_path / "run.ledger")
    config = ledger_checks.run_config(ledger.read_header(file), file)
    assert len(list(ledger_checks.entries(file, config))) == begun(file.parent)


def test_a_run_of_the_task_itself_replays_with_the_task(setup, steady, tmp_path):
    """Whose weights are only those that are used with hidden states; the ledger names all of them."""

    def of_the_task(header, payloads):
        header["config"]["model"] = "task:LlamaTask"
        header["config_hash"] = ledger.config_hash(header["config"])

    file = changed(of_the_task, steady.folder, tmp_path / "run.ledger")
    assert largest_difference(replay(file, task=setup.task).lora, steady.result.lora) is None
    other = replace(setup.task, base_hash="cd" * 32)
    with pytest.raises(UserError, match="weights are not those"):
        replay(file, task=other)


@pytest.mark.parametrize("name", BAD)
def test_a_ledger_whose_steps_or_rates_no_run_can_have_is_refused(name, steady, tmp_path):
    change, why = BAD[name]
    file = changed(change, steady.folder, tmp_path / "run.ledger")
    assert steady.entries[2].step not in (0.0, 0.5)
    with pytest.raises(UserError, match=why) as refused:
        replay(file)
    assert "\n" not in str(refused.value)


# The command line


def parsed(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["fedmezo", *map(str, argv)])
    return _cli._parse(fedmezo.Config, fedmezo.__doc__)


def test_a_recipe_says_where_the_options_start_from(monkeypatch):
    assert parsed(monkeypatch, "--recipe", "paper").run == paper_config()
    assert parsed(monkeypatch, "--recipe=fast").run == RunConfig() == parsed(monkeypatch).run
    given = parsed(monkeypatch, "--layers", "last:1", "--recipe", "paper", "--directions", 3).run
    assert given == paper_config(layers="last:1", directions=3)
    paper = paper_config()
    assert (paper.estimator, paper.directions, paper.distribution) == ("two-point", 1, "gaussian")
    assert (paper.layers, paper.learning_rate, paper.server_learning_rate) == ("all", 1e-3, 1.0)


def test_a_recipe_and_a_config_are_refused_together(steady, tmp_path, monkeypatch, capsys):
    for recipe in ("paper", "fast"):
        given = ("--recipe", recipe, "--config", steady.folder / "config.json", "--out", tmp_path / "out")
        assert command(fedmezo, monkeypatch, *given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == "error: --recipe and --config both say where to start from: give one of them"
    assert command(fedmezo, monkeypatch, "--recipe", "secret", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "recipe" in line
    assert not (tmp_path / "out").exists()
