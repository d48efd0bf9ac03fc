"""One round of a run, from the clients' work to the entry in the ledger and on to the next θ.

What a round was is decided once and written down in its :class:`ledger.Entry`. Everything after that follows from the
entry alone: so a resumed run, which reads it, and a replay end where the run did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmezo_jax.core import federated
from fedmezo_jax.core.mezo import Params
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import client_failures, divergence, messages
from fedmezo_jax.run.acceptance import Expected, Message, Received, receive
from fedmezo_jax.run.automatic_rate import next_rate
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.config_parts import LocalConfig
from fedmezo_jax.run.ledger import Entry


class Progress(NamedTuple):
    """All that a run carries from one round to the next, and a checkpoint holds.

    Attributes:
        state: as :mod:`federated` has it.
        before: θ and the server optimizer's state where the last round that was kept began; None where no round can be
            rolled back.
        rate: float32 scalar, what the learning rates are multiplied by: 1 until rounds are rolled back, or with
            ``--learning-rate auto`` the rate itself.
    """

    state: federated.FederatedState
    before: tuple[Params, optax.OptState] | None
    rate: jax.Array


class Answers(NamedTuple):
    """What comes back to the server when it has asked clients for their work.

    Attributes:
        ids: ``[P]`` int32, who was asked.
        learning_rates: ``[P]`` float32, η_i that they were given.
        messages: for each of them what came in, as bytes.
    """

    ids: np.ndarray
    learning_rates: np.ndarray
    messages: Iterable[Message]


Work: TypeAlias = Callable[[int, float], Answers]
"""``work(attempt, limit) -> Answers``: the clients' half of a round; ``limit`` bounds |g|."""


def begin(state: federated.FederatedState, config: RunConfig, first_rate: float) -> Progress:
    """Progress before the first round, whose base learning rate ``--learning-rate auto`` takes from ``first_rate``."""
    before = (state.params, state.optimizer) if config.on_divergence == "rollback" else None
    return Progress(state, before, jnp.float32(first_rate if config.learning_rate == "auto" else 1))


def advance(config: RunConfig, progress: Progress, entry: Entry, moved: federated.FederatedState | None) -> Progress:
    """Progress after a round.

    Args:
        config: the run's.
        progress: before the round.
        entry: what the round was.
        moved: the state after the whole of its update; None where it is not taken.
    """
    state = progress.state
    if config.learning_rate == "auto":
        progress = progress._replace(rate=next_rate(progress.rate, entry.step))
    if entry.rolled_back:
        assert progress.before is not None  # as RunConfig.on_divergence says
        params, optimizer = progress.before
        state = state._replace(params=params, optimizer=optimizer, round=state.round + 1)
        return progress._replace(state=state, rate=progress.rate / 2)
    before = progress.before and (state.params, state.optimizer)
    return progress._replace(state=take_step(state, moved, entry.step), before=before)


def take_step(
    state: federated.FederatedState, moved: federated.FederatedState | None, step: float
) -> federated.FederatedState:
    """The state after so much of an update: θ + step·(θ' − θ). Of a round that is not taken only its number remains."""
    if not step or moved is None:
        return state._replace(round=state.round + 1)
    return moved if step == 1 else moved._replace(params=_between(state.params, moved.params, np.float32(step)))


@jax.jit
def _between(params: Params, moved: Params, step: jax.Array) -> Params:
    return jax.tree.map(lambda old, new: old + step * (new - old), params, moved)


def report_of(entry: Entry, steps: int, directions: int) -> federated.RoundReport:
    """What the round's clients reported, from their updates; NaN for those of whom there is none."""
    losses = np.full((len(entry.ids), steps), np.nan, np.float32)
    gradients = np.full((len(entry.ids), steps, directions), np.nan, np.float32)
    for i, message in enumerate(entry.updates):
        if message is not None:
            update = messages.unpack_update(message)
            losses[i], gradients[i] = update.losses, update.projected_gradients
    return federated.RoundReport(losses, gradients, entry.learning_rates)


def simulated_answers(
    config: RunConfig,
    round: federated.Round,
    state: federated.FederatedState,
    sizes: np.ndarray,
    ids: np.ndarray,
    report: federated.RoundReport,
    key: jax.Array,
) -> Answers:
    """The messages of clients that were simulated here, from their report on the host, packed one by one."""

    def packed(t: int) -> Iterator[Message]:
        for i, id in enumerate(ids):
            numbers = np.asarray(report.projected_gradients[i]), np.asarray(report.losses[i])
            update, lora = messages.Update(t, int(id), int(sizes[id]), *numbers), None
            if not config.sends_coefficients:
                lora = messages.pack_lora_update(update, jax.device_get(round.upload(state, int(id), report, i, key)))
            yield Message(messages.pack_update(update), lora)

    return Answers(ids, np.asarray(report.learning_rates), packed(int(state.round)))


def run_round(
    config: RunConfig,
    t: int,
    sizes: np.ndarray,
    typical: divergence.Typical,
    work: Work,
    like: Params,
) -> tuple[Entry, list[Params | None]]:
    """Asks the clients for their work until some of them return usable numbers.

    Args:
        config: the run's.
        t: number of the round.
        sizes: ``[N]`` rows of each client.
        typical: what earlier rounds measured.
        work: the clients' half of the round.
        like: a tree with the structure and shapes of θ.

    Returns:
        The round's entry, and for each participant the θ_i that it sent, if it sent one.

    Raises:
        UserError: every client failed, as often as the configuration allows.
    """
    failed: list[tuple[int, int, str]] = []
    for attempt in range(config.attempts):
        away = client_failures.absent(config.seed, t, attempt, config.clients, config.dropout, config.deadline)
        clip = config.on_divergence == "clip"
        limit = typical.limit if clip else np.inf
        ids, rates, arrived = work(attempt, limit)
        received = []
        for message, id, rate in zip(arrived, map(int, ids), rates, strict=True):
            shape = config.local_steps, config.sent_directions
            expected = Expected(t, id, int(sizes[id]), *shape, float(rate), limit if clip else None)
            dropped = away.get(id) == client_failures.DROPPED
            answer = Received(None, None, None) if dropped else receive(message, expected, like)
            received.append(answer._replace(why=away.get(id) or answer.why))
        failed += [(attempt, int(id), answer.why) for id, answer in zip(ids, received, strict=True) if answer.why]
        weights = sizes[ids] if config.weighting == "samples" else np.ones(len(ids), np.float32)
        weights = np.where([answer.why is None for answer in received], weights, 0).astype(np.float32)
        updates = [answer.update and messages.pack_update(answer.update) for answer in received]
        entry = Entry(t, attempt, ids, weights, rates, updates, failed)
        report = report_of(entry, config.local_steps, config.sent_directions)
        if clip:
            here = np.array([update is not None for update in updates])
            entry = entry._replace(clipped=divergence.count_clipped(report, here, limit))
        if config.on_divergence == "rollback" and typical.diverged(known_losses(entry, report)):
            entry = entry._replace(rolled_back=True)
        unusable = any(answer.why in client_failures.UNUSABLE for answer in received)
        if config.learning_rate == "auto" and unusable and not weights.any():
            entry = entry._replace(step=0.0)
        if weights.any() or entry.rolled_back or not entry.step:
            return entry, [answer.params for answer in received]
    raise UserError(
        f"round {t + 1}: in {config.attempts} attempts no client returned usable numbers "
        f"({', '.join(sorted({why for *_, why in failed}))}): {_remedy(failed)}, or allow more --attempts"
    )


def _remedy(failed: list[tuple[int, int, str]]) -> str:
    whys = {why for *_, why in failed}
    if whys & set(client_failures.UNUSABLE):
        return "lower --learning-rate"
    if whys & {client_failures.DROPPED, client_failures.LATE}:
        return "lower --dropout or raise --deadline"
    return "check that all clients run this version with this configuration"


def known_losses(entry: Entry, report: federated.RoundReport) -> np.ndarray:
    """``[K, H]`` losses of the clients that answered in time, infinite where their numbers are of no use."""
    failed = {id: why for attempt, id, why in entry.failed if attempt == entry.attempt}
    whys = [failed.get(int(id)) for id in entry.ids]
    on_time = [why is None or why in client_failures.UNUSABLE for why in whys]
    usable = np.array([why is None for why in whys])[:, None]
    return np.where(usable, np.asarray(report.losses), np.inf)[on_time]


class Traffic(NamedTuple):
    """Bytes of a round, read off its messages.

    Attributes:
        up: from each of the P participants.
        down: to each of the P participants.
        others: to all other clients together.
    """

    up: list[int]
    down: list[int]
    others: int = 0


def scalar_traffic(
    config: RunConfig,
    round: federated.Round,
    state: federated.FederatedState,
    entry: Entry,
    report: federated.RoundReport,
) -> Traffic:
    """The messages of a round whose clients send projected gradients; its result is broadcast to all N clients."""
    begin = [len(messages.pack_start(entry.round, float(rate))) for rate in entry.learning_rates]
    up = [len(message or b"") for message in entry.updates]
    if entry.rolled_back or not entry.step:
        return Traffic(up, begin)
    counted = entry.weights > 0
    if config.directions_shared:
        size = len(messages.pack_mean(entry.round, round.combine(state, entry.ids, entry.weights, report), entry.step))
        return Traffic(up, [first + size for first in begin], size * (config.clients - len(entry.ids)))
    gradients = np.asarray(report.projected_gradients)[counted].reshape(int(counted.sum()), -1)
    weights = entry.weights[counted] if config.weighting == "samples" else None
    rates = entry.learning_rates[counted]
    outcome = messages.Outcome(entry.round, entry.ids[counted], weights, rates, gradients, entry.step)
    down = [
        first + len(messages.pack_outcome(outcome, config.clients, int(id)))
        for first, id in zip(begin, entry.ids, strict=True)
    ]
    return Traffic(up, down, len(messages.pack_outcome(outcome, config.clients)) * (config.clients - len(entry.ids)))


def move(
    config: RunConfig,
    round: federated.Round,
    progress: Progress,
    entry: Entry,
    uploads: list[Params | None] | None,
    key: jax.Array,
) -> federated.FederatedState | None:
    """The state after the whole of a round's update, or None where the round has none.

    Args:
        config: the run's.
        round: the algorithm's.
        progress: before the round.
        entry: what the round was.
        uploads: the clients' θ_i as they were sent, where clients send them; None in a round that is made again from
            the ledger, where they are reconstructed from the projected gradients.
        key: the run's.
    """
    if entry.rolled_back or not entry.step:
        return None
    report = report_of(entry, config.local_steps, config.sent_directions)
    client_params: Iterable[Params | None] | None = uploads
    if config.sends_coefficients:
        client_params = None
    elif not uploads:
        client_params = (
            jax.device_get(round.upload(progress.state, int(id), report, i, key)) if entry.weights[i] else None
            for i, id in enumerate(entry.ids)
        )
    return jax.block_until_ready(round.apply(progress.state, entry.ids, entry.weights, report, key, client_params))


def traffic_of(config: RunConfig, round: federated.Round, progress: Progress, entry: Entry) -> Traffic:
    """The bytes of a round, whose messages are packed again from their content."""
    if config.sends_coefficients:
        report = report_of(entry, config.local_steps, config.sent_directions)
        return scalar_traffic(config, round, progress.state, entry, report)
    params = jax.device_get(progress.state.params)
    sent = [
        0 if message is None else len(messages.pack_lora_update(messages.unpack_update(message), params))
        for message in entry.updates
    ]
    return Traffic(sent, [len(messages.lora_message(params))] * len(sent))


def notices(config: LocalConfig, record: dict[str, Any], trained: int) -> list[str]:
    """What the user should know of a round, from its record; ``trained`` is the number of trained parameters."""
    lines = [
        f"client {event['client']} {event['why']}: left out"
        for event in record["failed"]
        if event["why"] not in (client_failures.DROPPED, client_failures.LATE)
    ]
    if config.learning_rate != "auto":  # which deals with divergence itself
        lines += _divergence_notices(config, record, trained)
    if record["clipped"]:
        lines.append(f"{record['clipped']} steps were clipped")
    return [f"round {record['round']}: {line}" for line in lines]


def _divergence_notices(config: LocalConfig, record: dict[str, Any], trained: int) -> list[str]:
    if record["rolled_back"]:
        return [f"the loss has exploded ({record['train_loss']}): rolled back, learning rates halved"]
    if record["diverged"]:
        return [f"the loss has exploded ({record['train_loss']}): lower --learning-rate, or --on-divergence"]
    if (record["gradient_growth"] or 0) <= divergence.GROWTH:
        return []
    rate = max(record["learning_rates"])
    distance = divergence.step_length(rate, record["projected_gradient"], trained, config.local_steps)
    return [
        f"projected gradients grew {record['gradient_growth']:.1f}-fold over the local steps, which move θ by "
        f"η·|g|·√(d·H) = {distance:.2g}: the loss is about to diverge, lower --learning-rate"
    ]


def metrics_of(
    config: RunConfig, entry: Entry, report: federated.RoundReport, traffic: Traffic, typical: divergence.Typical
) -> dict[str, Any]:
    """What a round's record in ``metrics.jsonl`` takes from its entry."""
    counted, losses = entry.weights > 0, known_losses(entry, report)
    known = losses[np.isfinite(losses)]
    median = divergence.median_loss(losses) if len(losses) else np.inf
    return {
        "round": entry.round + 1,
        "train_loss": float(np.mean(known)) if known.size else None,
        "participants": entry.ids.tolist(),
        "learning_rates": entry.learning_rates.tolist(),
        "median_loss": median if np.isfinite(median) else None,
        "projected_gradient": divergence.gradient_rms(report, counted),
        "median_gradient": divergence.median_gradient(report, counted),
        "gradient_growth": divergence.growth(report, counted),
        "failed": [{"attempt": attempt + 1, "client": id, "why": why} for attempt, id, why in entry.failed],
        "diverged": typical.diverged(losses),
        "clipped": entry.clipped,
        "rolled_back": entry.rolled_back,
        "server_step": entry.step,
        "uplink_bytes": sum(traffic.up),
        "downlink_bytes": sum(traffic.down) + traffic.others,
        "client_uplink_bytes": traffic.up,
        "client_downlink_bytes": traffic.down,
    }
