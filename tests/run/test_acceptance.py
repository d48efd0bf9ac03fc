"""One lying client: whatever it sends is its own failure, and the round goes on with the others."""

import dataclasses

import jax
import numpy as np
import pytest
import small_run
from lying_clients import altered, intercepted

from fedmezo_jax.core import client, mezo
from fedmezo_jax.run import acceptance, client_failures, divergence, ledger, messages
from fedmezo_jax.run.acceptance import Expected, Message, receive
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.loop import train
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.replay import largest_difference, reconstruct

DRAW = np.random.RandomState(3)


def numbers(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


LORA = {"v_proj": {"A": numbers(2, 3, 2), "B": numbers(2, 2, 3)}}
UPDATE = messages.Update(5, 2, 40, numbers(3, 2), numbers(3))
EXPECTED = Expected(round=5, client=2, samples=40, steps=3, directions=2, learning_rate=0.5)
WHOLE = Message(messages.pack_update(UPDATE), messages.pack_lora_update(UPDATE, LORA))


def with_value(array, value):
    array = array.copy()
    array.flat[1] = value
    return array


def lora_with(value):
    changed = {"v_proj": LORA["v_proj"] | {"B": with_value(LORA["v_proj"]["B"], value)}}
    return WHOLE._replace(lora=messages.pack_lora_update(UPDATE, changed))


def update_with(**changed):
    update = UPDATE._replace(**changed)
    return Message(messages.pack_update(update), None)


LIES = {
    "nothing": (Message(b""), client_failures.MALFORMED),
    "no msgpack": (Message(b"\xc1" * 30), client_failures.MALFORMED),
    "cut short": (Message(WHOLE.update[:-1]), client_failures.MALFORMED),
    "something more": (Message(WHOLE.update + b"\0"), client_failures.MALFORMED),
    "a step more": (update_with(projected_gradients=numbers(4, 2), losses=numbers(4)), client_failures.MALFORMED),
    "a direction more": (update_with(projected_gradients=numbers(3, 3)), client_failures.MALFORMED),
    "far too many numbers": (update_with(projected_gradients=numbers(3, 10**5)), client_failures.MALFORMED),
    "another round": (update_with(round=4), client_failures.MISMATCHED),
    "another client": (update_with(client=1), client_failures.MISMATCHED),
    "more rows": (update_with(samples=10**6), client_failures.MISMATCHED),
    "a NaN": (
        update_with(projected_gradients=with_value(UPDATE.projected_gradients, np.nan)),
        client_failures.NOT_FINITE,
    ),
    "an infinity": (update_with(losses=with_value(UPDATE.losses, -np.inf)), client_failures.NOT_FINITE),
    "a huge gradient": (
        update_with(projected_gradients=with_value(UPDATE.projected_gradients, -3e38)),
        client_failures.TOO_LARGE,
    ),
    "a huge loss": (update_with(losses=with_value(UPDATE.losses, 3e38)), client_failures.TOO_LARGE),
    "a NaN in the LoRA": (lora_with(np.nan), client_failures.NOT_FINITE),
    "a huge LoRA": (lora_with(-3e38), client_failures.TOO_LARGE),
    "half a LoRA": (WHOLE._replace(lora=messages.pack_lora_update(UPDATE, {"v_proj": {}})), client_failures.MALFORMED),
    "a LoRA cut short": (WHOLE._replace(lora=WHOLE.lora[:-1]), client_failures.MALFORMED),
    "a LoRA of another client": (
        WHOLE._replace(lora=messages.pack_lora_update(UPDATE._replace(client=1), LORA)),
        client_failures.MISMATCHED,
    ),
    "a LoRA of fewer steps": (
        WHOLE._replace(lora=messages.pack_lora_update(UPDATE._replace(losses=numbers(2)), LORA)),
        client_failures.MALFORMED,
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_with_its_reason(name):
    message, why = LIES[name]
    assert receive(message, EXPECTED, LORA).why == why


def test_the_truth_is_accepted_bit_for_bit():
    update, params, why = receive(WHOLE, EXPECTED, LORA)
    assert why is None
    assert messages.pack_update(update) == WHOLE.update
    assert largest_difference(params, LORA) is None


def test_projected_gradients_beyond_the_limit_are_clipped_and_no_others():
    gradients = np.array([[-0.0, 0.5], [-0.5, 0.25], [9.0, -1e30]], np.float32)
    losses = np.array([np.nan, 3e38, 1], np.float32)
    message = update_with(projected_gradients=gradients, losses=losses)
    update, _, why = receive(message, EXPECTED._replace(limit=0.5), LORA)
    assert why is None
    np.testing.assert_array_equal(update.projected_gradients, [[-0.0, 0.5], [-0.5, 0.25], [0.5, -0.5]])
    assert np.signbit(update.projected_gradients[0, 0])
    assert update.losses.tobytes() == losses.tobytes()
    infinite = update_with(projected_gradients=np.full((3, 2), np.inf, np.float32))
    assert receive(infinite, EXPECTED._replace(limit=0.5), LORA).why == client_failures.NOT_FINITE


@pytest.mark.parametrize("rate", [1e-6, 1.0, 1e6])
def test_how_far_a_step_moves_is_bounded_and_not_its_gradient_alone(rate):
    """η·g/n with n = 2, just within the largest and just beyond it."""
    for factor, why in ((1.99, None), (2.01, client_failures.TOO_LARGE)):
        gradients = np.full((3, 2), factor * acceptance.LARGEST / rate, np.float32)
        message = update_with(projected_gradients=gradients)
        assert receive(message, EXPECTED._replace(learning_rate=rate), LORA).why == why


# In a run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("acceptance")
    small_run.write_model(place / "model")
    small_run.write_data(place / "data.jsonl")
    given = {"clients": 4, "rounds": 3, "local_steps": 2, "max_length": 64, "test_examples": 10, "length_buckets": 1}
    files = {"model": str(place / "model"), "data": str(place / "data.jsonl")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMEZO_CACHE", str(place / "cache"))
        yield paper_config(**files, **given, lora_rank=2, targets="v_proj")


def start(folder, config):
    setup, said = prepare(config), []
    folder.mkdir()
    return train(setup, folder, checkpoint_every=9, eval_every=9, notify=said.append), setup, said


def bad_lora(message, value):
    """The message with one number of its LoRA replaced."""
    number = np.float32(value).tobytes()
    return message._replace(lora=message.lora[:-4] + number)


RUNS = {
    "gradients": (
        {},
        client_failures.MALFORMED,
        lambda m: altered(m, projected_gradients=lambda c: np.zeros((2, 10**5), "f4")),
    ),
    "samples": ({"weighting": "samples"}, client_failures.MISMATCHED, lambda m: altered(m, samples=lambda n: 10 * n)),
    "LoRA": ({"uplink": "lora"}, client_failures.NOT_FINITE, lambda m: bad_lora(m, np.nan)),
    "back-propagated LoRA": ({"algorithm": "fedavg"}, client_failures.NOT_FINITE, lambda m: bad_lora(m, np.inf)),
    "half a LoRA": (
        {"algorithm": "fedavg"},
        client_failures.MALFORMED,
        lambda m: m._replace(lora=m.lora[: len(m.lora) // 2]),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_round_goes_on_without_the_liar_as_if_it_had_not_been_there(name, config, tmp_path, monkeypatch):
    changed, why, lie = RUNS[name]
    config = dataclasses.replace(config, **changed)
    intercepted(monkeypatch, [1], lambda id, message: lie(message) if id == 2 else message)
    result, setup, said = start(tmp_path / "run", config)
    assert result.metrics[1]["failed"] == [{"attempt": 1, "client": 2, "why": why}]
    assert said == [f"round 2: client 2 {why}: left out"]
    assert [record["failed"] for record in result.metrics[::2]] == [[], []]

    monkeypatch.undo()
    absent = {2: client_failures.DROPPED}
    monkeypatch.setattr(client_failures, "absent", lambda seed, t, *_: absent if t == 1 else {})
    expected, *_ = start(tmp_path / "without", config)
    assert largest_difference(result.params, expected.params) is None
    if config.algorithm == "fedmezo":
        reconstructed, _ = reconstruct(tmp_path / "run" / "run.ledger", config, setup.params, None)
        assert largest_difference(result.params, reconstructed) is None


def test_a_liar_is_bounded_where_steps_are_clipped_and_a_replay_agrees(config, tmp_path, monkeypatch):
    """It ignores the limit that it is given; honest clients far within theirs keep their bits."""
    config = dataclasses.replace(config, on_divergence="clip")
    honest, _, nothing = start(tmp_path / "honest", config)
    assert nothing == []
    boast = lambda m: altered(m, projected_gradients=lambda c: c * np.float32(1e6))  # noqa: E731
    intercepted(monkeypatch, [1], lambda id, message: boast(message) if id == 2 else message)
    result, setup, said = start(tmp_path / "run", config)
    assert said == ["round 2: 2 steps were clipped"]
    entry, plain = (list(ledger.entries(tmp_path / name / "run.ledger"))[1] for name in ("run", "honest"))
    limit = divergence.CLIP * honest.metrics[0]["median_gradient"]
    applied = [messages.unpack_update(message).projected_gradients for message in entry.updates]
    np.testing.assert_array_equal(np.abs(applied[2]), np.float32(limit))
    assert [m for i, m in enumerate(entry.updates) if i != 2] == [m for i, m in enumerate(plain.updates) if i != 2]
    reconstructed, _ = reconstruct(tmp_path / "run" / "run.ledger", config, setup.params, None)
    assert largest_difference(result.params, reconstructed) is None


@pytest.mark.parametrize("lie", [1e6, np.nan, 3e38])
def test_one_client_cannot_have_a_round_rolled_back(lie, config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, on_divergence="rollback")
    report = lambda m: altered(m, losses=lambda losses: np.full_like(losses, lie))  # noqa: E731
    intercepted(monkeypatch, range(3), lambda id, message: report(message) if id == 2 else message)
    result, _, _ = start(tmp_path / "run", config)
    assert not any(record["rolled_back"] or record["diverged"] for record in result.metrics)
    intercepted(monkeypatch, range(3), lambda id, message: report(message) if id else message)
    result, _, _ = start(tmp_path / "most", config)
    assert all(record["rolled_back"] for record in result.metrics)


def test_numbers_within_the_largest_leave_theta_and_its_squares_finite():
    """As an optimizer of the server squares them."""
    work = client.mezo_client(mezo.MezoConfig())
    coefficients = np.full((300, 1), acceptance.LARGEST, np.float32)
    key = jax.random.key(0, impl="threefry2x32")
    moved = np.asarray(work.reconstruct({"w": np.zeros(1000, np.float32)}, key, coefficients, 1.0)["w"])
    assert np.isfinite(moved**2).all()
    assert np.abs(moved).max() > acceptance.LARGEST
