"""LoRA parameters: y = x W + (alpha/r) (x A) B, with W frozen (arXiv 2106.09685)."""

from collections.abc import Iterable
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


def lora_shapes(config: LlamaConfig, rank: int, targets: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The LoRA pytree with shapes for leaves: A [L, in, r] and B [L, r, out] for each target."""
    if rank < 1:
        raise UserError(f"the LoRA rank must be at least 1, not {rank}")
    layers, widths = config.num_hidden_layers, projections(config)
    return {
        name: {"A": (layers, widths[name][0], rank), "B": (layers, rank, widths[name][1])}
        for name in check_targets(targets)
    }


def init_lora(key: jax.Array, config: LlamaConfig, rank: int, targets: Iterable[str]) -> dict[str, Any]:
    """Fresh LoRA parameters, float32: A ~ U(-1/sqrt(in), 1/sqrt(in)), as PEFT starts it, and B zero.

    Each target's key is ``fold_in(key, i)`` with i its index in ``TARGETS``, so its A does not hang on the others.
    Raises ``UserError`` for a rank below 1 and for targets that ``check_targets`` refuses.
    """
    lora = {}
    for name, shape in lora_shapes(config, rank, targets).items():
        bound = shape["A"][1] ** -0.5
        leaf_key = jax.random.fold_in(key, TARGETS.index(name))
        lora[name] = {
            "A": jax.random.uniform(leaf_key, shape["A"], jnp.float32, -bound, bound),
            "B": jnp.zeros(shape["B"], jnp.float32),
        }
    return lora
