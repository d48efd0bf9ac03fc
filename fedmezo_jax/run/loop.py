"""A whole run: rounds with their ledger, metrics and checkpoints, from wherever an earlier session stopped."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedmezo_jax.core import federated, mezo, random
from fedmezo_jax.core.estimators import ESTIMATORS
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.batches import take
from fedmezo_jax.parallel import multihost, sharding
from fedmezo_jax.run import (
    automatic_rate,
    divergence,
    ledger,
    round_metrics,
    rounds,
    run_checkpoints,
    run_folder,
    signatures,
)
from fedmezo_jax.run.clients import Clients, SimulatedClients
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, build, round_examples
from fedmezo_jax.run.journal import open_journal
from fedmezo_jax.run.privacy_plan import open_budget
from fedmezo_jax.run.traffic import traffic_of


def forward_passes(config: RunConfig) -> int:
    """Forward passes of a round over all clients; a back-propagated step counts as two.

    With a frozen base the backward pass has as many products as the forward one: gradients of activations alone. A
    tangent of forward-mode differentiation has as many too.
    """
    passes = 2 if config.algorithm == "fedavg" else ESTIMATORS[config.estimator].passes(config.directions)
    return config.participants * config.local_steps * passes


class RunResult(NamedTuple):
    """A finished run.

    Attributes:
        context: what it worked with, θ at its start among it.
        params: θ at the end.
        loss_before: test loss of the base model, in nats.
        loss_after: test loss at the end; NaN where it is not finite.
        metrics: one record a round, as in ``metrics.jsonl``.
    """

    context: RunContext
    params: mezo.Params
    loss_before: float
    loss_after: float
    metrics: list[dict[str, Any]]


def train(
    setup: RunContext,
    folder: Path,
    *,
    checkpoint_every: int,
    eval_every: int,
    loss_before: float | None = None,
    on_round: Callable[[dict[str, Any]], None] = lambda record: None,
    notify: Callable[[str], None] = lambda notice: None,
    clients: Clients | None = None,
    keys: signatures.ServerKeys | None = None,
) -> RunResult:
    """Runs all rounds that the folder has not seen yet and saves the trained θ.

    A round is done when its record is in the ledger. A resumed run starts from the newest checkpoint that is intact,
    makes again from the ledger the rounds that came after it (without their clients' work), and goes on; all it leaves
    is bit for bit what an undisturbed run leaves, save ``seconds``. Back-propagated rounds have no ledger: those after
    the checkpoint are computed again.

    Args:
        setup: from :func:`prepare` or :func:`context_of`.
        folder: the run's, with its ``config.json`` written; gets ledger, metrics, checkpoints and what the task saves.
        checkpoint_every: rounds between checkpoints; the last round always gets one.
        eval_every: rounds between measurements of the test loss; the last round always gets one.
        loss_before: the task's test loss before training, where it has been measured already.
        on_round: called with each round's record, those of earlier sessions first.
        notify: called with each thing that the user should know.
        clients: who does the local work; by default they are simulated. Of others the task needs no examples, but their
            number and lengths.
        keys: the server's in a signed run, by default those of the simulation.

    Raises:
        UserError: the base's loss is not finite, the ledger is damaged, or all clients failed too often.
    """
    config, task, mesh = setup.config, setup.task, setup.mesh
    (init, round), _ = build(setup)
    key = run_key(config.seed)
    sizes = setup.example_counts
    passes = forward_passes(config)
    automatic = config.learning_rate == "auto"
    clients = clients or SimulatedClients(setup)
    if config.signed and not keys:
        keys = signatures.server_keys(signatures.simulated_keys(config))
    clock = Stopwatch()

    def work_of(progress: rounds.Progress, t: int, signing: signatures.Signing | None) -> rounds.Work:
        work = clients.work(progress, t, signing)

        def timed(attempt: int, limit: float) -> rounds.Answers:
            with clock:
                return work(attempt, limit)

        return timed

    def search(progress: rounds.Progress, moved: federated.FederatedState) -> float:
        def validation_loss(step: float) -> float:
            return task.validate(rounds.take_step(progress.state, moved, step).params)

        return automatic_rate.choose_step(validation_loss, validation_loss(0.0))

    loss_before = task.loss_before(setup.params) if loss_before is None else loss_before
    with run_checkpoints.manager(folder) as manager:
        state = init(setup.params, config.clients)
        first_rate = _recorded_rate(folder) if automatic else float(config.learning_rate)
        if first_rate is None:  # the first round's work, at rate 0
            first_rate = _first_rate(setup, lambda: clients.first_report(state))
        fresh = sharding.replicate(mesh, rounds.begin(state, config, first_rate))
        journal = open_journal(setup, folder, manager, fresh, first_rate, keys, notify)
        progress, signing = journal.progress, journal.signing
        first = int(progress.state.round)
        budget = open_budget(config, sizes)
        for record in journal.metrics:
            budget = budget and budget.after(record["round"] - 1, np.array(record["participants"]))
            on_round(record)
        recent = deque(filter(divergence.kept, journal.metrics), divergence.MEMORY)
        journal.metrics.clear()  # a long run's records are on the disk and not in memory
        start = time.perf_counter()
        for t in range(first, config.rounds):
            last = t + 1 == config.rounds
            typical = divergence.typical(loss_before, recent)
            (entry, chain), uploads = next(journal.known, (None, None)), None
            is_new = entry is None
            if entry is None:
                work = work_of(progress, t, signing)
                entry, uploads = rounds.run_round(
                    config, t, sizes, typical, work, setup.params, budget, signing, setup.seeded_noise
                )
            budget = budget and budget.after(t, entry.ids)
            with clock:
                moved = rounds.move(config, round, progress, entry, uploads, key)
                if is_new and automatic and moved is not None:
                    entry = entry._replace(step=search(progress, moved))
            if is_new:
                chain = journal.append(entry)
            signing = signing and signing.after(chain or "")
            clients.finish_round(progress, entry)
            report = rounds.report_of(entry, config.local_steps, config.sent_directions)
            traffic = traffic_of(config, round, progress, entry, sizes)
            with clock:
                progress = jax.block_until_ready(rounds.advance(config, progress, entry, moved))
                measured = float(task.evaluate(progress.state.params)) if last or (t + 1) % eval_every == 0 else None
            record = round_metrics.metrics_of(config, entry, report, traffic, typical)
            spent = [
                task.count_tokens(round_examples(config, task, t, attempt)[1]) for attempt in range(entry.attempt + 1)
            ]
            real_tokens, tokens = map(sum, zip(*spent, strict=True))
            now = time.perf_counter()
            record |= {
                "test_loss": measured if measured is None or math.isfinite(measured) else None,  # JSON has no NaN
                "seconds": now - start,
                "host_seconds": now - start - clock.lap(),
                "forward_passes": passes * len(spent),
                "tokens": passes * tokens // (config.participants * config.local_steps),
                "padding_share": 1 - real_tokens / tokens,
            }
            start = now  # what is written below counts as the next round's
            journal.record(record)
            recent.extend([record] if divergence.kept(record) else [])
            if last or (t + 1) % checkpoint_every == 0:
                run_checkpoints.save(manager, folder, progress, chain)
            for notice in round_metrics.notices(config, record, divergence.count(setup.params)):
                notify(notice)
            on_round(record)

    params = jax.device_get(progress.state.params)
    if multihost.is_coordinator():
        task.save(folder, params)
    metrics = multihost.all_or_none(lambda: run_folder.read_metrics(folder))
    loss_after = metrics[-1]["test_loss"]
    return RunResult(setup, params, loss_before, math.nan if loss_after is None else loss_after, metrics)


def _first_rate(setup: RunContext, work_at_rate_0: Callable[[], federated.RoundReport]) -> float:
    """The first round's learning rate; in a private run from the bound on gradients and not from clients' numbers."""
    config, trained = setup.config, divergence.count(setup.params)
    if config.private:
        return automatic_rate.rate_for(config.dp_clip**2 / config.directions)
    report = work_at_rate_0() if config.algorithm == "fedmezo" else None
    return automatic_rate.first_rate(report, trained, robust=config.aggregation != "mean")


def _recorded_rate(folder: Path) -> float | None:
    """The first round's learning rate, from the ledger of an earlier session."""
    file = folder / run_folder.LEDGER
    return multihost.all_or_none(lambda: ledger.read_header(file)["first_rate"] if file.exists() else None)


class Stopwatch:
    """Adds up the time spent inside its ``with`` blocks."""

    def __init__(self):
        """At zero."""
        self._total = self._begun = 0.0

    def __enter__(self):
        """Goes on."""
        self._begun = time.perf_counter()

    def __exit__(self, *_: object):
        """Stops."""
        self._total += time.perf_counter() - self._begun

    def lap(self) -> float:
        """The seconds so far; from here on it counts anew."""
        total, self._total = self._total, 0.0
        return total


PROBE_DIRECTIONS, PROBE_BATCHES, PROBE_SCALE = 8, 8, 1e-2
"""Of the learning-rate check. Its μ is large enough for a second difference of float32 losses."""


def probe_start(setup: RunContext) -> divergence.Probe:
    """Measures at θ's start how large a learning rate may be, on batches of the first round."""
    picks = round_examples(setup.config, setup.task, 0)[1]
    picks = picks.reshape(-1, picks.shape[-1])
    some = np.linspace(0, len(picks) - 1, PROBE_BATCHES).astype(int)
    batches = sharding.replicate(setup.mesh, take(setup.task.train, picks[some]))
    key = jax.random.fold_in(run_key(setup.config.seed), random.PROBE)
    return divergence.probe(setup.task.pair_loss, setup.params, batches, key, PROBE_SCALE, PROBE_DIRECTIONS)
