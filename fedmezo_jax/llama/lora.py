"""LoRA parameters: y = x W + (alpha/r) (x A) B, with W frozen (arXiv 2106.09685)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import projections
from fedmezo_jax.llama.config import LlamaConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def check_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """The targets in canonical order; ``UserError`` where one is unknown or given twice, or there is none."""
    targets = tuple(targets)
    known = ", ".join(TARGETS)
    if unknown := [name for name in targets if name not in TARGETS]:
        raise UserError(f"unknown LoRA target {', '.join(map(repr, unknown))}: choose among {known}")
    if len(set(targets)) < len(targets):
        raise UserError(f"a LoRA target is given twice in {','.join(targets)}: name each once")
    if not targets:
        raise UserError(f"no LoRA target is given: choose among {known}")
    return tuple(name for name in TARGETS if name in targets)


def lora_shapes(
    config: LlamaConfig, rank: int, targets: Iterable[str], trained: tuple[int, ...] | None = None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The LoRA pytree with shapes for leaves: A [L, in, r] and B [L, r, out] for each target, L the trained layers."""
    if rank < 1:
        raise UserError(f"the LoRA rank must be at least 1, not {rank}")
    count, widths = config.num_hidden_layers if trained is None else len(trained), projections(config)
    return {
        name: {"A": (count, widths[name][0], rank), "B": (count, rank, widths[name][1])}
        for name in check_targets(targets)
    }


def parse_layers(layers: str, count: int) -> tuple[int, ...]:
    """The indices that ``--layers`` means in a model of ``count`` layers, ascending.

    ``all``; ``last:K`` and ``first:K``, with a number or a share such as ``40%``; ``a-b``, both included and counted
    from 0; ``every:N``, the last layer and each Nth one below it; or several of these, joined by commas.

    Raises:
        UserError: it is none of these, or names a layer that the model lacks.
    """
    chosen: set[int] = set()
    for part in layers.split(","):
        kind, _, number = part.strip().partition(":")
        if kind in ("last", "first") and (share := re.fullmatch(r"(\d{1,3})%", number)) and 0 < int(share[1]) <= 100:
            number = str(max(1, round(int(share[1]) / 100 * count)))
        span = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if part.strip() == "all":
            chosen.update(range(count))
        elif kind in ("last", "first", "every") and re.fullmatch(r"\d{1,6}", number) and 1 <= int(number) <= count:
            size = int(number)
            picked = {"last": range(count - size, count), "first": range(size), "every": range(count - 1, -1, -size)}
            chosen.update(picked[kind])
        elif span and int(span[1]) <= int(span[2] or span[1]) < count:
            chosen.update(range(int(span[1]), int(span[2] or span[1]) + 1))
        else:
            raise UserError(
                f"--layers {layers}: give all, last:K, first:K, every:N or a-b; the model's layers are 0 to {count - 1}"
            )
    return tuple(sorted(chosen))


def trained_layers(layers: str, config: LlamaConfig) -> tuple[int, ...] | None:
    """:func:`parse_layers` for a model, with None where these are all of its layers."""
    chosen = parse_layers(layers, config.num_hidden_layers)
    return None if len(chosen) == config.num_hidden_layers else chosen


def spread(lora: Mapping[str, Any], trained: tuple[int, ...], count: int) -> dict[str, Any]:
    """The same adapter with an entry for each of ``count`` layers, zero where a layer has none."""
    rows = jnp.array(trained)
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype).at[rows].set(leaf), lora)


def init_lora(
    key: jax.Array, config: LlamaConfig, rank: int, targets: Iterable[str], trained: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Fresh LoRA parameters, float32: A ~ U(-1/sqrt(in), 1/sqrt(in)), as PEFT starts it, and B zero.

    Each target's key is ``fold_in(key, i)`` with i its index in ``TARGETS``, so its A does not hang on the others.
    Raises ``UserError`` for a rank below 1 and for targets that ``check_targets`` refuses.
    """
    lora = {}
    for name, shape in lora_shapes(config, rank, targets, trained).items():
        bound = shape["A"][1] ** -0.5
        leaf_key = jax.random.fold_in(key, TARGETS.index(name))
        lora[name] = {
            "A": jax.random.uniform(leaf_key, shape["A"], jnp.float32, -bound, bound),
            "B": jnp.zeros(shape["B"], jnp.float32),
        }
    return lora
