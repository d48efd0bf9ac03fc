"""Tokens a second of a round of one local step, beside bare forward passes and matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments._random_arrays import random_like
from experiments.benchmarks.accelerator_rows.card import NO_TRAFFIC, above, chip
from experiments.benchmarks.accelerator_rows.forecast import time_off
from experiments.benchmarks.step import Case, Setting, alternate, compile_round, random_case
from fedmezo_jax.data.examples import HiddenBatch
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.prefix import trained_part
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.planning import cost_model, hardware

TARGETS = ("q_proj", "v_proj")


def measure(
    wanted: Sequence[str],
    card: Mapping[str, Any],
    model: str,
    clients: int,
    length: int,
    rank: int,
    precision: Precision,
    layers: str,
) -> Iterator[dict[str, Any]]:
    """Yields one row: best seconds of a round and of one forward pass of all clients, run alternately.

    ``over_two_forwards`` compares with forward passes through all layers, also where the round starts from the hidden
    states below the first trained one.

    Args:
        wanted: the row's name.
        card: the row of the card.
        model: a shape known by name, or a folder.
        clients: clients, all at once, with one example each.
        length: tokens of an example, half of them labels.
        rank: LoRA rank.
        precision: of the products with frozen weights; the bare forward pass of ``paired`` is in bfloat16.
        layers: layers with an adapter.
    """
    shape = named_shape(model)
    case = random_case(shape, Setting(clients, 1, length, rank), list(TARGETS), precision, 0, layers)
    compiled = compile_round(from_hidden(case))
    single = case.model.clone(precision="bfloat16") if precision == "paired" else case.model
    loss, rows = loss_of(single, case.base), jax.tree.map(lambda leaf: leaf[:, 0], case.cohort.batches)
    loras = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), case.lora)
    forward = jax.jit(lambda loss, loras, rows: jax.vmap(loss)(loras, rows))

    planned = cost_model.RoundSpec(
        above(shape, layers), clients, 1, 1, length, rank, TARGETS, precision, directions_shared=False
    )
    roofline = cost_model.roofline(planned, chip(card, precision), (1, 1), clients, NO_TRAFFIC)
    repeats = max(1, min(5, int(1 / roofline)))
    times = alternate({"round": compiled.run, "forward": lambda: forward(loss, loras, rows)}, repeats)
    seconds, forward_seconds = min(times["round"]), min(times["forward"])
    rate = cost_model.operations(planned) / seconds
    table = card["table_bfloat16_flops"]
    yield {
        "row": wanted[0],
        "model": Path(model).name,
        "clients": clients,
        "length": length,
        "rank": rank,
        "precision": precision,
        "layers": layers,
        "seconds": seconds,
        "roofline_seconds": roofline,
        "time_forecast_off": time_off(seconds, roofline),
        "tokens_per_second": 2 * clients * length / seconds,
        "forward_seconds": forward_seconds,
        "over_two_forwards": seconds / (2 * forward_seconds),
        "share_of_products": rate / card["float32_flops" if precision == "float32" else "bfloat16_flops"],
        "share_of_table": rate / table if table and precision != "float32" else None,
        "compile_seconds": compiled.seconds,
        "forecast_bytes": hardware.plan_of(compiled.program, hardware.present()).peak,
    }


def from_hidden(case: Case) -> Case:
    """The case as a run has it: from the hidden states below the first trained layer, where there are frozen ones."""
    if not case.model.trained_layers[0]:
        return case
    tokens, *rest = case.cohort.batches
    hidden = random_like(jax.ShapeDtypeStruct((*tokens.shape, case.model.config.hidden_size), jnp.float32))
    cohort = case.cohort._replace(batches=HiddenBatch(hidden, *rest))
    return case._replace(base=trained_part(case.model, case.base), cohort=cohort)
