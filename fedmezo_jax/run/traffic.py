"""The bytes of a round, read off its messages, which are packed again from what its entry holds."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from fedmezo_jax.core import federated
from fedmezo_jax.run import messages
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.ledger import Entry
from fedmezo_jax.run.results import pack_result, result_of
from fedmezo_jax.run.rounds import Progress, report_of
from fedmezo_jax.run.signatures import SIGNATURE_BYTES


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
    sizes: np.ndarray,
) -> Traffic:
    """The messages of a round whose clients send projected gradients; its result is broadcast to all N clients."""
    chain, signature = (bytes(32), SIGNATURE_BYTES) if config.signed else (b"", 0)
    begin = [len(messages.pack_start(entry.round, float(rate), chain)) for rate in entry.learning_rates]
    sent = list(entry.updates)
    if config.keeps_mean:  # which does not depend on what the updates held
        numbers = np.zeros(report.projected_gradients.shape[1:]), np.zeros(config.local_steps)
        updates = (messages.Update(entry.round, int(id), int(sizes[id]), *numbers) for id in entry.ids)
        sent = [messages.pack_update(update) if w else None for update, w in zip(updates, entry.weights, strict=True)]
    up = [len(message) + signature if message else 0 for message in sent]
    if config.secure_sum:
        from fedmezo_jax.run import secure_sum_messages  # which needs the package `cryptography`

        counted = np.flatnonzero(entry.weights)
        numbers = config.local_steps * config.sent_directions
        summed_up, summed_down = secure_sum_messages.sizes(entry.ids[counted], numbers)
        up = [summed_up if weight else 0 for weight in entry.weights]
        begin = [size + (summed_down if weight else 0) for size, weight in zip(begin, entry.weights, strict=True)]
    result = result_of(config, round, state, entry, report)
    down = [
        first + len(pack_result(result, config.clients, int(id)) or b"")
        for first, id in zip(begin, entry.ids, strict=True)
    ]
    return Traffic(up, down, len(pack_result(result, config.clients) or b"") * (config.clients - len(entry.ids)))


def traffic_of(
    config: RunConfig, round: federated.Round, progress: Progress, entry: Entry, sizes: np.ndarray
) -> Traffic:
    """The bytes of a round, whose messages are packed again from their content; ``sizes`` are the N clients' rows."""
    if config.sends_coefficients:
        report = report_of(entry, config.local_steps, config.sent_directions)
        return scalar_traffic(config, round, progress.state, entry, report, sizes)
    params = jax.device_get(progress.state.params)
    sent = [
        0 if message is None else len(messages.pack_lora_update(messages.unpack_update(message), params))
        for message in entry.updates
    ]
    return Traffic(sent, [len(messages.lora_message(params))] * len(sent))
