"""Private runs: what their ledger holds and does not hold, the budget, replay, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import small_run

from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import accountant
from fedmezo_jax.run import ledger, ledger_checks, messages, rounds
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.ledger_header import config_hash
from fedmezo_jax.run.privacy_plan import plan_of
from fedmezo_jax.run.replay import largest_difference, replay


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "private") as folder:
        yield folder


def configuration(place, **changed):
    given = {"clients": 5, "participation": 0.6, "dp_epsilon": 8.0, "dropout": 0.2, "learning_rate": "auto"}
    return small_run.configuration(place, **given | {"signed": True} | changed)


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "own"])
def run(request, place):
    config = configuration(place, directions_shared=request.param)
    folder, lines = place / f"run-{request.param}", []
    result = fine_tune(config, folder, notify=lines.append)
    return config, folder, result, lines


def test_the_ledger_has_no_single_client_s_numbers_in_clear(run, place):
    """Shared directions: the noisy mean alone. Own: each client's vector with its noise. Never a loss."""
    config, folder, _, lines = run
    plan = plan_of(config)
    for entry in ledger.entries(folder / "run.ledger"):
        if config.directions_shared:
            assert entry.updates == [None] * len(entry.ids)
            assert entry.mean.shape == (3,)
        else:
            assert entry.mean is None
            updates = [messages.unpack_update(update) for update in entry.updates if update]
            assert updates
            assert not any(update.losses.any() for update in updates)
            # Noise of this size, and not a clipped vector: its norm is beyond C.
            assert all(np.linalg.norm(update.projected_gradients) > 0.1 * plan.noise * plan.norm for update in updates)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["train_loss"] for record in records] == [None] * 4
    assert any("differential privacy of each client" in line and "protects nobody" in line for line in lines)
    assert "(8, 1e-05)" in ledger.read_header(folder / "run.ledger")["privacy"]


def test_what_is_spent_grows_with_the_participations_and_ends_at_epsilon(run):
    config, folder, _, _ = run
    entries = list(ledger.entries(folder / "run.ledger"))
    most = [accountant.most_participations([entry.ids for entry in entries[: t + 1]], 5) for t in range(4)]
    plan = plan_of(config)
    assert [entry.epsilon for entry in entries] == [accountant.spent(plan.noise, 1e-5, count) for count in most]
    assert 0 < entries[0].epsilon < entries[-1].epsilon <= 8
    assert entries[-1].epsilon > 7.9


def test_a_private_run_is_replayed_bit_for_bit(run):
    _, folder, result, _ = run
    assert largest_difference(replay(folder / "run.ledger").params, result.params) is None


def test_a_client_s_numbers_move_the_record_by_no_more_than_its_norm(place, monkeypatch):
    """Whatever one client sends, the mean that is kept moves by at most C/P, since the noise is the same."""
    config = configuration(place, directions_shared=True, rounds=1, dropout=0.0, participation=1.0)
    plan, means = plan_of(config), []
    answers = rounds.simulated_answers
    for lie in (1.0, -1e6, np.nan):

        def changed(config, round, state, sizes, ids, report, *rest, lie=lie):
            gradients = np.array(report.projected_gradients)
            gradients[2] *= lie
            return answers(config, round, state, sizes, ids, report._replace(projected_gradients=gradients), *rest)

        monkeypatch.setattr(rounds, "simulated_answers", changed)
        fine_tune(config, place / f"lie{lie}", notify=lambda line: None)
        (entry,) = ledger.entries(place / f"lie{lie}" / "run.ledger")
        means.append(entry.mean.astype(np.float64))
    for other in means[1:]:
        assert 0 < np.linalg.norm(other - means[0]) <= 2 * plan.norm / 5


def rewritten(source, target, change, config=None):
    """The ledger with its entries changed, and valid checksums."""
    header = ledger.read_header(source)
    if config:
        header |= {"config": header["config"] | config}
        header |= {"config_hash": config_hash(header["config"])}
    book = ledger.create(target, header)
    for entry in ledger.entries(source):
        book.append(change(entry))
    return target


def test_an_entry_that_says_less_is_spent_or_shows_a_client_is_refused(run, tmp_path):
    config, folder, _, _ = run
    source = folder / "run.ledger"
    update = messages.pack_update(messages.Update(0, 0, 1, np.ones((3, 1), np.float32), np.zeros(3, np.float32)))
    changes = {
        "is spent": lambda entry: entry._replace(epsilon=entry.epsilon / 2),
        "mean": lambda entry: entry._replace(mean=None if config.directions_shared else np.zeros(3, np.float32)),
    }
    if config.directions_shared:
        changes |= {
            "not the mean alone": lambda entry: entry._replace(updates=[update] * 3),
            "is not one of": lambda entry: entry._replace(mean=np.full(3, np.nan, np.float32)),
        }
    for i, (named, change) in enumerate(changes.items()):
        with pytest.raises(UserError, match=named):
            list(ledger_checks.entries(rewritten(source, tmp_path / f"{i}", change), config))
    assert len(list(ledger_checks.entries(rewritten(source, tmp_path / "same", lambda entry: entry), config))) == 4
    fewer = replace(config, rounds=2)
    with pytest.raises(UserError, match=r"takes part in more than|is spent|of round 3 of 2"):
        list(ledger_checks.entries(source, fewer))


def test_the_run_ends_before_the_budget_is_exceeded(place, monkeypatch):
    """A round that is tried again with other clients can make one take part more often than was planned."""
    config = configuration(place, directions_shared=True, participation=0.2, rounds=5, attempts=50, dropout=0.0)
    monkeypatch.setattr(
        rounds.client_failures,
        "absent",
        # Everyone fails but client 0.
        lambda seed, t, attempt, clients, dropout, deadline: dict.fromkeys(range(1, clients), "dropped out"),
    )
    planned = plan_of(config).participations
    assert planned < 5
    with pytest.raises(UserError, match="which --dp-epsilon does not cover"):
        fine_tune(config, place / "ended", notify=lambda line: None)
    entries = list(ledger.entries(place / "ended" / "run.ledger"))
    assert len(entries) == planned
    assert entries[-1].epsilon <= 8


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"algorithm": "fedavg"}, "--algorithm"),
        ({"uplink": "lora"}, "--uplink"),
        ({"personalize": "round-wise"}, "--personalize"),
        ({"on_divergence": "clip"}, "--on-divergence"),
        ({"aggregation": "median"}, "--aggregation"),
        ({"weighting": "samples"}, "--weighting"),
        ({"dp_delta": 0.0}, "--dp-delta"),
        ({"dp_epsilon": 0.0}, "--dp-epsilon"),
        ({"dp_clip": 0.0}, "--dp-clip"),
    ],
)
def test_what_would_not_be_private_is_refused_by_name(options, named):
    with pytest.raises(UserError, match=named):
        RunConfig(**{"dp_epsilon": 1.0} | options)
