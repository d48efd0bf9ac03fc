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

from fedmezo_jax import faults, federated, guard, server, wire
from fedmezo_jax.config import RunConfig
from fedmezo_jax.errors import UserError
from fedmezo_jax.ledger import Entry
from fedmezo_jax.mezo import Params


class Progress(NamedTuple):
    """All that a run carries from one round to the next, and a checkpoint holds.

    Attributes:
        state: as :mod:`federated` has it.
        before: θ and the server optimizer's state where the last round that was kept began; None where no round can be
            rolled back.
        damping: float32 scalar on all learning rates, halved whenever a round is rolled back.
    """

    state: federated.FederatedState
    before: tuple[Params, optax.OptState] | None
    damping: jax.Array


Work: TypeAlias = Callable[[int, float], tuple[np.ndarray, federated.RoundReport]]
"""``work(attempt, limit) -> (ids, report)``: the clients' half, brought to the host; ``limit`` bounds |g|."""


def begin(state: federated.FederatedState, config: RunConfig) -> Progress:
    """Progress before the first round."""
    before = (state.params, state.optimizer) if config.on_surge == "rollback" else None
    return Progress(state, before, jnp.float32(1))


def advance(
    round: federated.Round,
    progress: Progress,
    entry: Entry,
    report: federated.RoundReport,
    key: jax.Array,
    uploads: Iterable[Params | None] | None = None,
) -> Progress:
    """The server's half of a round, or its undoing."""
    state = progress.state
    if entry.rolled_back:
        assert progress.before is not None  # as RunConfig.on_surge says
        params, optimizer = progress.before
        state = state._replace(params=params, optimizer=optimizer, round=state.round + 1)
        return progress._replace(state=state, damping=progress.damping / 2)
    before = progress.before and (state.params, state.optimizer)
    return progress._replace(state=round.apply(state, entry.ids, entry.weights, report, key, uploads), before=before)


def report_of(entry: Entry, steps: int, directions: int) -> federated.RoundReport:
    """What the round's clients told, from their messages; NaN for those whose message never came."""
    losses = np.full((len(entry.ids), steps), np.nan, np.float32)
    coefficients = np.full((len(entry.ids), steps, directions), np.nan, np.float32)
    for i, message in enumerate(entry.updates):
        if message is not None:
            update = wire.unpack_update(message)
            losses[i], coefficients[i] = update.losses, update.coefficients.reshape(steps, directions)
    return federated.RoundReport(losses, coefficients, entry.learning_rates)


def run_round(
    config: RunConfig,
    t: int,
    sizes: np.ndarray,
    gauge: guard.Gauge,
    work: Work,
) -> tuple[Entry, federated.RoundReport]:
    """Lets the clients work until some of them come back with numbers of use.

    Args:
        config: the run's.
        t: number of the round.
        sizes: ``[N]`` rows of each client.
        gauge: what earlier rounds measured.
        work: the clients' half of the round.

    Returns:
        The round's entry and the report, which alone has the parameters of back-propagated work.

    Raises:
        UserError: every client failed, as often as the configuration allows.
    """
    failed: list[tuple[int, int, str]] = []
    for attempt in range(config.attempts):
        away = faults.absent(config.seed, t, attempt, config.clients, config.dropout, config.deadline)
        limit = gauge.limit if config.on_surge == "clip" else np.inf
        ids, report = work(attempt, limit)
        losses = np.asarray(report.losses)
        told = report if config.on_surge != "clip" else report._replace(losses=np.zeros_like(losses))
        usable = federated.finite(told)
        whys = [away.get(int(id)) or (None if ok else faults.NOT_FINITE) for id, ok in zip(ids, usable, strict=True)]
        failed += [(attempt, int(id), why) for id, why in zip(ids, whys, strict=True) if why]
        weights = sizes[ids] if config.weighting == "samples" else np.ones(len(ids), np.float32)
        weights = np.where([why is None for why in whys], weights, 0).astype(np.float32)
        surged = gauge.surged(losses[weights > 0])
        diverged = not weights.any() and faults.NOT_FINITE in whys
        rolled_back = config.on_surge == "rollback" and (surged or diverged)
        if weights.any() or rolled_back:
            updates = [
                None if why == faults.DROPPED else wire.pack_update(wire.Update(t, id, int(sizes[id]), *numbers))
                for why, id, *numbers in zip(whys, ids, report.coefficients, losses, strict=True)
            ]
            clipped = guard.count_clipped(report, config.directions, limit) if config.on_surge == "clip" else 0
            rates = np.asarray(report.learning_rates)
            return Entry(t, attempt, ids, weights, rates, updates, failed, clipped, rolled_back), report
    reasons = ", ".join(sorted({why for *_, why in failed}))
    remedy = "lower --learning-rate" if faults.NOT_FINITE in reasons else "lower --dropout or raise --deadline"
    raise UserError(
        f"round {t + 1}: in {config.attempts} attempts no client came back with numbers of use ({reasons}): {remedy}, "
        "or allow more --attempts"
    )


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


def scalar_traffic(config: RunConfig, entry: Entry, report: federated.RoundReport) -> Traffic:
    """The messages of a round whose clients send coefficients, and whose result is broadcast to all N clients."""
    begin = [len(wire.pack_start(entry.round, float(rate))) for rate in entry.learning_rates]
    up = [len(message or b"") for message in entry.updates]
    if entry.rolled_back:
        return Traffic(up, begin)
    counted = entry.weights > 0
    if config.seeds == "shared":
        share = entry.weights / np.sum(entry.weights, dtype=np.float64)
        mean = server.mean_coefficients(share.astype(np.float32), np.asarray(report.coefficients))
        size = len(wire.pack_mean(entry.round, mean))
        return Traffic(up, [first + size for first in begin], size * (config.clients - len(entry.ids)))
    coefficients = np.asarray(report.coefficients)[counted].reshape(int(counted.sum()), -1)
    weights = entry.weights[counted] if config.weighting == "samples" else None
    rates = entry.learning_rates[counted] if config.weight_decay else None
    outcome = wire.Outcome(entry.round, entry.ids[counted], weights, rates, coefficients)
    down = [
        first + len(wire.pack_outcome(outcome, config.clients, int(id)))
        for first, id in zip(begin, entry.ids, strict=True)
    ]
    return Traffic(up, down, len(wire.pack_outcome(outcome, config.clients)) * (config.clients - len(entry.ids)))


def conclude(
    config: RunConfig,
    round: federated.Round,
    progress: Progress,
    entry: Entry,
    raw: federated.RoundReport | None,
    key: jax.Array,
) -> tuple[Progress, federated.RoundReport, Traffic]:
    """The server's half of a round, from what the messages say.

    Args:
        config: the run's.
        round: the algorithm's.
        progress: before the round.
        entry: what the round was.
        raw: the clients' report, where it is at hand; needed for back-propagated work alone.
        key: the run's.
    """
    report = report_of(entry, config.local_steps, config.directions if config.algorithm == "fedmezo" else 0)
    if config.sends_coefficients:
        traffic = scalar_traffic(config, entry, report)
        return jax.block_until_ready(advance(round, progress, entry, report, key)), report, traffic
    sent: list[int] = []
    if raw:
        report = report._replace(params=raw.params)
    uploads = _through_the_wire(round, progress, entry, report, key, sent)
    down = len(wire.lora_message(jax.device_get(progress.state.params)))
    progress = jax.block_until_ready(advance(round, progress, entry, report, key, uploads))
    for _ in uploads:
        pass  # what a round that is rolled back had sent
    return progress, report, Traffic(sent, [down] * len(sent))


def _through_the_wire(
    round: federated.Round,
    progress: Progress,
    entry: Entry,
    report: federated.RoundReport,
    key: jax.Array,
    sent: list[int],
) -> Iterator[Params | None]:
    """Each client's θ_i, written into its message and read from it again; the messages' sizes go to ``sent``."""
    for i, message in enumerate(entry.updates):
        if message is None:
            sent.append(0)
            yield None
            continue
        theirs = jax.device_get(round.upload(progress.state, int(entry.ids[i]), report, i, key))
        message = wire.pack_lora_update(wire.unpack_update(message), theirs)
        sent.append(len(message))
        yield wire.unpack_lora_update(message, theirs)


def notices(config: RunConfig, record: dict[str, Any], trained: int) -> list[str]:
    """What of a round's record the user should be told."""
    said = [
        f"round {record['round']}: client {event['client']} {event['why']}: left out"
        for event in record["failed"]
        if event["why"] == faults.NOT_FINITE
    ]
    if record["surge"] or record["rolled_back"]:
        then = "rolled back, learning rates halved" if record["rolled_back"] else "lower --learning-rate, or --on-surge"
        said.append(f"round {record['round']}: the loss has exploded ({record['train_loss']}): {then}")
    elif (record["gradient_growth"] or 0) > guard.GROWTH:
        rate = max(record["learning_rates"])
        walk = guard.step_length(rate, record["projected_gradient"], trained, config.local_steps)
        said.append(
            f"round {record['round']}: projected gradients grew {record['gradient_growth']:.1f}-fold over the local "
            f"steps, which move θ by η·|g|·√(d·H) = {walk:.2g}: a surge is near, lower --learning-rate"
        )
    if record["clipped"]:
        said.append(f"round {record['round']}: {record['clipped']} steps were clipped")
    return said


def metrics_of(
    config: RunConfig, entry: Entry, report: federated.RoundReport, traffic: Traffic, gauge: guard.Gauge
) -> dict[str, Any]:
    """What a round's record in ``metrics.jsonl`` takes from its entry."""
    heard = entry.weights > 0
    losses = np.asarray(report.losses)[heard]
    known = losses[np.isfinite(losses)]
    return {
        "round": entry.round + 1,
        "train_loss": float(np.mean(known)) if known.size else None,
        "participants": entry.ids.tolist(),
        "learning_rates": entry.learning_rates.tolist(),
        "projected_gradient": guard.gradient_rms(report, heard, config.directions),
        "gradient_growth": guard.growth(report, heard),
        "failed": [{"attempt": attempt + 1, "client": id, "why": why} for attempt, id, why in entry.failed],
        "surge": gauge.surged(losses) or not heard.any(),
        "clipped": entry.clipped,
        "rolled_back": entry.rolled_back,
        "uplink_bytes": sum(traffic.up),
        "downlink_bytes": sum(traffic.down) + traffic.others,
        "client_uplink_bytes": traffic.up,
        "client_downlink_bytes": traffic.down,
    }
