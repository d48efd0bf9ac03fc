"""What there is to say about a round: its record in ``metrics.jsonl``, and what the user should know."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmezo_jax.core import federated
from fedmezo_jax.run import client_failures, divergence
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.config_parts import LocalConfig
from fedmezo_jax.run.ledger import Entry
from fedmezo_jax.run.rounds import known_losses
from fedmezo_jax.run.traffic import Traffic


def metrics_of(
    config: RunConfig, entry: Entry, report: federated.RoundReport, traffic: Traffic, typical: divergence.Typical
) -> dict[str, Any]:
    """What a round's record in ``metrics.jsonl`` takes from its entry."""
    counted, losses = (entry.weights > 0) & (entry.mean is None), known_losses(config, entry, report)
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
        "epsilon": entry.epsilon if config.private else None,
        "uplink_bytes": sum(traffic.up),
        "downlink_bytes": sum(traffic.down) + traffic.others,
        "client_uplink_bytes": traffic.up,
        "client_downlink_bytes": traffic.down,
    }


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
