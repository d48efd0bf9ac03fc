"""What the card does by itself: matrix products and copies; and what its maker says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments._random_arrays import DEVIATION, random_like
from experiments.benchmarks.step import alternate
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import parse_layers
from fedmezo_jax.llama.precision import Precision, Products, frozen_product
from fedmezo_jax.planning import cost_model, hardware

_PRODUCTS, _REPEATS = 8, 5
NO_TRAFFIC = cost_model.Compiled(None, 0, 0, 0)
"""A round on one device sends nothing to others."""


def measure(wanted: Sequence[str], card: Any, width: int, copied: int) -> Iterator[dict[str, Any]]:
    """Yields the row of the card.

    Args:
        wanted: the row's name.
        card: not used.
        width: of the square matrices.
        copied: numbers in the float32 array that is copied.
    """
    del card
    kind = jax.devices()[0].device_kind
    table = cost_model.CHIPS.get(cost_model.DEVICE_KINDS.get(kind, ""))
    square = random_like(jax.ShapeDtypeStruct((width, width), jnp.float32)) / (DEVIATION * width**0.5)
    line = jnp.ones(copied, jnp.float32)
    times = alternate(
        {
            "bfloat16": lambda: _products(square, "bfloat16"),
            "float32": lambda: _products(square, "float32"),
            "copy": lambda: _copy(line),
        },
        _REPEATS,
    )
    best = {name: min(seconds) for name, seconds in times.items()}
    operations = _PRODUCTS * 2 * width**3
    yield {
        "row": wanted[0],
        "device_memory_bytes": hardware.present().memory,
        "bfloat16_flops": operations / best["bfloat16"],
        "float32_flops": operations / best["float32"],
        "copied_bytes_per_second": 2 * line.nbytes / best["copy"],
        "table_bfloat16_flops": table and table.operations,
        "table_bytes_per_second": table and table.memory,
        "table": table and table.source,
    }


def chip(card: Mapping[str, Any], precision: Precision) -> cost_model.Chip:
    """The limits behind a roofline: the maker's where they are known, and otherwise those measured.

    Makers give no figure for products in full float32, so that one is always measured.
    """
    measured = card["float32_flops" if precision == "float32" else "bfloat16_flops"]
    operations = measured if precision == "float32" else card["table_bfloat16_flops"] or measured
    memory = card["table_bytes_per_second"] or card["copied_bytes_per_second"]
    return cost_model.Chip(operations, memory, 1.0, card["table"] or "measured")


def above(shape: LlamaConfig, layers: str) -> LlamaConfig:
    """The shape of what a step runs that starts from the hidden states below the first trained layer."""
    return replace(shape, num_hidden_layers=shape.num_hidden_layers - parse_layers(layers, shape.num_hidden_layers)[0])


@partial(jax.jit, static_argnums=1)
def _products(square: jax.Array, precision: Precision) -> jax.Array:
    return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: frozen_product(x, square, Products(precision)), square)


@jax.jit
def _copy(line: jax.Array) -> jax.Array:
    return line + 1
