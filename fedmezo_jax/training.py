"""A whole run: rounds with their ledger, metrics and checkpoints, from wherever an earlier session stopped."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedmezo_jax import federated, guard, ledger, mezo, rounds, run_folder, server
from fedmezo_jax.config import RunConfig
from fedmezo_jax.data.batches import round_batches
from fedmezo_jax.data.buckets import computed_tokens
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.adapter import save_adapter
from fedmezo_jax.setup import Setup, build, evaluator, run_key
from fedmezo_jax.sharding import over_clients

_PACKAGES = ("jax", "jaxlib", "numpy", "optax")


def forward_passes(config: RunConfig) -> int:
    """Forward passes of a round over all clients; a back-propagated step counts as two.

    With a frozen base the backward pass has as many products as the forward one: gradients of activations alone.
    """
    each = 2 * config.directions if config.algorithm == "fedmezo" else 2
    return config.participants * config.local_steps * each


class Result(NamedTuple):
    """A finished run.

    Attributes:
        lora: θ at the end.
        loss_before: test loss of the base model, in nats.
        loss_after: test loss at the end.
        metrics: one record a round, as in ``metrics.jsonl``.
    """

    lora: mezo.Params
    loss_before: float
    loss_after: float
    metrics: list[dict[str, Any]]


def train(
    setup: Setup,
    folder: Path,
    *,
    checkpoint_every: int,
    eval_every: int,
    on_round: Callable[[dict[str, Any]], None] = lambda record: None,
    notify: Callable[[str], None] = lambda notice: None,
) -> Result:
    """Runs all rounds that the folder has not seen yet and writes the adapter.

    A round is done when its record is in the ledger. A resumed run starts from the newest checkpoint, makes again from
    the ledger the rounds that came after it (without their clients' work), and goes on; all it leaves is bit for bit
    what an undisturbed run leaves, save ``seconds``. Back-propagated rounds have no ledger: those after the checkpoint
    are computed again.

    Args:
        setup: from :func:`prepare`.
        folder: the run's, with its ``config.json`` written; gets ledger, metrics, checkpoints and ``adapter``.
        checkpoint_every: rounds between checkpoints; the last round always gets one.
        eval_every: rounds between measurements of the test loss; the last round always gets one.
        on_round: called with each round's record, those of earlier sessions first.
        notify: called with each thing that the user should know.

    Raises:
        UserError: the ledger is damaged, or all clients failed too often.
    """
    config = setup.config
    (init, round), loss = build(setup)
    test_loss = evaluator(setup)
    key = run_key(config.seed)
    sizes = np.array([len(part) for part in setup.parts], np.float32)
    passes = forward_passes(config)
    book = _open_ledger(setup, folder, notify)
    cohort = _cohorts(setup)

    def work_of(progress: rounds.Progress, t: int) -> rounds.Work:
        def work(attempt: int, limit: float) -> tuple[np.ndarray, federated.RoundReport]:
            current, _, _ = cohort(t, attempt)
            bound = np.float32(limit) if config.on_surge == "clip" else None
            damping = progress.damping if config.on_surge == "rollback" else None
            report = round.work(progress.state, loss, current, key, bound, damping)
            if t + 1 < config.rounds:
                cohort(t + 1, 0)  # while the device works
            return np.asarray(current.ids), jax.device_get(report)

        return work

    loss_before = test_loss(setup.lora)
    with run_folder.checkpoints(folder) as manager:
        fresh = rounds.begin(init(setup.lora, config.clients), config)
        progress = run_folder.restore(manager, fresh) or fresh
        first = int(progress.state.round)
        metrics = run_folder.keep_metrics(folder, first)
        if len(metrics) < first or (book and book.rounds < first):
            name = "metrics.jsonl" if len(metrics) < first else run_folder.LEDGER
            raise UserError(f"{folder / name} ends before the checkpoint of round {first}: put an intact copy there")
        for record in metrics:
            on_round(record)
        recent = deque(filter(guard.kept, metrics), guard.MEMORY)
        del metrics  # a long run's records are on the disk and not in memory
        known = ledger.entries(book.file, first) if book else iter(())
        for t in range(first, config.rounds):
            start, last = time.perf_counter(), t + 1 == config.rounds
            gauge = guard.gauge(loss_before, recent)
            entry, raw = next(known, None), None
            if entry is None:
                entry, raw = rounds.run_round(config, t, sizes, gauge, work_of(progress, t))
                if book:
                    book.append(entry)
            progress, report, traffic = rounds.conclude(config, round, progress, entry, raw, key)
            record = rounds.metrics_of(config, entry, report, traffic, gauge)
            params = progress.state.params
            spent = [cohort(t, attempt)[1:] for attempt in range(entry.attempt + 1)]
            held, tokens = map(sum, zip(*spent, strict=True))
            record |= {
                "test_loss": test_loss(params) if last or (t + 1) % eval_every == 0 else None,
                "seconds": time.perf_counter() - start,
                "forward_passes": passes * len(spent),
                "tokens": passes * tokens // (config.participants * config.local_steps),
                "padding_share": 1 - held / tokens,
            }
            run_folder.append_metrics(folder, record)
            recent.extend([record] if guard.kept(record) else [])
            if last or (t + 1) % checkpoint_every == 0:
                run_folder.save(manager, progress)
            for notice in rounds.notices(config, record, guard.count(setup.lora)):
                notify(notice)
            on_round(record)

    lora = jax.device_get(progress.state.params)
    settings = {"rank": config.lora_rank, "alpha": config.lora_alpha, "targets": config.target_names}
    save_adapter(folder / "adapter", lora, **settings, base_name=config.model)
    metrics = run_folder.read_metrics(folder)
    return Result(lora, loss_before, metrics[-1]["test_loss"], metrics)


PROBE_DIRECTIONS, PROBE_BATCHES, PROBE_SCALE = 8, 8, 1e-2
"""Of the learning-rate guard. Its μ is large enough for a second difference of float32 losses."""


def probe_start(setup: Setup) -> guard.Probe:
    """Measures at θ's start how large a learning rate may be, on batches of the first round."""
    _, loss = build(setup)
    batches = _cohorts(setup)(0, 0)[0].batches
    held = setup.config.participants * setup.config.local_steps
    picked = np.linspace(0, held - 1, PROBE_BATCHES).astype(int)
    batches = jax.tree.map(
        lambda leaf: leaf[: setup.config.participants].reshape(held, *leaf.shape[2:])[picked], batches
    )
    key = jax.random.fold_in(run_key(setup.config.seed), federated.PROBE)
    return guard.probe(loss, setup.lora, batches, key, PROBE_SCALE, PROBE_DIRECTIONS)


def _cohorts(setup: Setup) -> Callable[[int, int], tuple[federated.Cohort, int, int]]:
    """``cohort(t, attempt)``: a round's clients and their batches, and the tokens these hold and cost."""
    config = setup.config
    sizes = np.array([len(part) for part in setup.parts], np.float32)
    settings = {"seed": config.seed, "local_steps": config.local_steps, "batch_size": config.batch_size}
    by_length = len(setup.widths) > 1

    @lru_cache(maxsize=2)
    def cohort(t: int, attempt: int) -> tuple[federated.Cohort, int, int]:
        ids = server.sample_participants(config.seed, t, config.clients, config.participants, attempt)
        batches = round_batches(setup.train, setup.parts, ids, t, **settings, by_length=by_length)
        spread = over_clients(setup.mesh, len(ids), lambda at: jax.tree.map(lambda leaf: leaf[at], batches))
        return federated.Cohort(ids, sizes[ids], spread), *computed_tokens(batches, setup.widths)

    return cohort


def _open_ledger(setup: Setup, folder: Path, notify: Callable[[str], None]) -> ledger.Ledger | None:
    """The run's ledger, new or verified; None for back-propagation, whose rounds no scalars rebuild."""
    config = setup.config
    if config.algorithm != "fedmezo":
        return None
    versions = {name: version(name) for name in _PACKAGES}
    header = ledger.make_header(asdict(config), ledger.tree_hash(setup.base), versions)
    file = folder / run_folder.LEDGER
    if not file.exists():
        return ledger.create(file, header)
    book, notices = ledger.reopen(file, header)
    for notice in notices:
        notify(notice)
    return book
