"""Seconds to rebuild a round from its scalars, as the server and a replay do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.accelerator_rows.card import chip
from experiments.benchmarks.accelerator_rows.forecast import time_off
from experiments.benchmarks.accelerator_rows.speed import TARGETS
from experiments.benchmarks.step import alternate
from fedmezo_jax.core import client, federated, mezo, personalization
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.shapes import named_shape

_REPEATS = 3


def measure(
    wanted: Sequence[str], card: Mapping[str, Any], model: str, clients: int, local_steps: int, rank: int
) -> Iterator[dict[str, Any]]:
    """Yields one row, with directions that differ between clients.

    The roofline reads and writes the adapter once for each client and step.

    Args:
        wanted: the row's name.
        card: the row of the card.
        model: a shape known by name, or a folder.
        clients: clients P.
        local_steps: local steps H.
        rank: LoRA rank.
    """
    key = jax.random.key(0, impl="threefry2x32")
    lora = init_lora(key, named_shape(model), rank, TARGETS)
    init, round = federated.federated(client.mezo_client(mezo.MezoConfig()), personalization.RateConfig(1e-5))
    state, steps = init(lora, clients), np.ones((clients, local_steps), np.float32)
    report = federated.RoundReport(steps, steps[..., None], 1e-5 * steps[:, 0])
    work = {"rebuild": lambda: round.apply(state, np.arange(clients), steps[:, 0], report, key)}
    seconds = min(alternate(work, _REPEATS)["rebuild"])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lora))
    roofline = 2 * size * clients * local_steps / chip(card, "float32").memory
    yield {
        "row": wanted[0],
        "model": Path(model).name,
        "clients": clients,
        "local_steps": local_steps,
        "rank": rank,
        "adapter_bytes": size,
        "seconds": seconds,
        "roofline_seconds": roofline,
        "time_forecast_off": time_off(seconds, roofline),
    }
