"""The mesh that a run is spread over, and what of it lies where.

Two axes: ``clients``, each group of devices along it works on clients of its own, and ``model``, along which the
frozen weights of one copy are split. LoRA, learning rates and coefficients are small and lie everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedmezo_jax.core.federated import CLIENTS
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.config import LlamaConfig

MODEL = "model"
RULES: dict[str, str | None] = {
    "vocab": MODEL,
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "embed": None,
    "layers": None,
}
"""Logical axis of a frozen weight → mesh axis along which it is split; None keeps it whole."""

_WEIGHTS: dict[str, tuple[str, ...]] = {
    "embed_tokens/embedding": ("vocab", "embed"),
    "lm_head/kernel": ("embed", "vocab"),
    "norm/scale": ("embed",),
    "input_layernorm/scale": ("layers", "embed"),
    "post_attention_layernorm/scale": ("layers", "embed"),
    "q_proj/kernel": ("layers", "embed", "heads"),
    "k_proj/kernel": ("layers", "embed", "kv_heads"),
    "v_proj/kernel": ("layers", "embed", "kv_heads"),
    "o_proj/kernel": ("layers", "heads", "embed"),
    "gate_proj/kernel": ("layers", "embed", "mlp"),
    "up_proj/kernel": ("layers", "embed", "mlp"),
    "down_proj/kernel": ("layers", "mlp", "embed"),
    "q_proj/bias": ("layers", "heads"),
    "k_proj/bias": ("layers", "kv_heads"),
    "v_proj/bias": ("layers", "kv_heads"),
    "o_proj/bias": ("layers", "embed"),
    "gate_proj/bias": ("layers", "mlp"),
    "up_proj/bias": ("layers", "mlp"),
    "down_proj/bias": ("layers", "embed"),
}
"""Logical axes of the frozen weights, by the end of their path in the base."""


def parse_mesh(text: str | None, devices: Sequence[Any]) -> Mesh | None:
    """The mesh that ``clients=4,model=2`` says; all devices for clients where nothing is said; None on one device.

    Raises:
        UserError: the text is no mesh, or asks for another number of devices than there are.
    """
    if text is None:
        sizes = {CLIENTS: len(devices), MODEL: 1}
    else:
        found = re.fullmatch(r"\s*clients=(\d+)\s*,\s*model=(\d+)\s*", text)
        if found is None or not all(map(int, found.groups())):
            raise UserError(f"--mesh {text}: give it as clients=4,model=2")
        sizes = dict(zip((CLIENTS, MODEL), map(int, found.groups()), strict=True))
    asked = math.prod(sizes.values())
    if asked != len(devices):
        raise UserError(f"--mesh {text} is for {asked} devices, and there are {len(devices)}: their product must agree")
    if asked == 1:
        return None
    return Mesh(np.array(devices).reshape(sizes[CLIENTS], sizes[MODEL]), (CLIENTS, MODEL))


def check_mesh(mesh: Mesh | None, config: LlamaConfig) -> None:
    """Refuses a model axis that does not divide what is split along it.

    Raises:
        UserError: with all that does not divide.
    """
    parts = 1 if mesh is None else mesh.shape[MODEL]
    sizes = {
        "attention heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "MLP width": config.intermediate_size,
    }  # a vocabulary that does not divide is kept whole: many a tokenizer has been given an odd token
    odd = [f"{size} {name}" for name, size in sizes.items() if size % parts]
    if odd:
        raise UserError(f"--mesh model={parts} does not divide the model's {' and '.join(odd)}: give another number")


def base_sharding(mesh: Mesh | None) -> Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding] | None:
    """Where each leaf of the base lies, by its path and shape; None where there is no mesh."""
    if mesh is None:
        return None
    parts = mesh.shape[MODEL]

    def of(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        axes = [RULES[name] for name in _WEIGHTS["/".join(path[-2:])]]
        return NamedSharding(
            mesh, P(*(axis if size % parts == 0 else None for axis, size in zip(axes, shape, strict=True)))
        )

    return of


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """The tree on every device of the mesh; as it is where there is none.

    Every process brings all of it; they do not check that it is the same.
    """
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, P())

    def place(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

    return jax.tree.map(place, tree)


def shard_clients(mesh: Mesh | None, count: int, make: Callable[[np.ndarray], Any]) -> Any:
    """Rows for ``count`` clients, each made on the host that works on it and sent to its devices alone.

    Args:
        mesh: to spread them over; None for one device.
        count: how many.
        make: ``make(clients)`` is the pytree of numpy arrays of the clients at these places, leaves ``[len, …]``.

    Returns:
        The pytree with leading axis ``count``, filled up to a multiple of the groups of clients with copies of the
        first client's rows.
    """
    if mesh is None:
        return jax.device_put(make(np.arange(count)))
    filled = np.arange(pad_to_groups(mesh, count))
    filled[count:] = 0
    sharding = NamedSharding(mesh, P(CLIENTS))
    first = jax.tree.map(np.asarray, make(filled[:1]))
    leaves, structure = jax.tree.flatten(first)
    known: dict[tuple[int, ...], list[Any]] = {}

    def part(i: int, index: Any) -> Any:
        places = filled[index[0]]
        if tuple(places) not in known:
            known[tuple(places)] = jax.tree.leaves(make(places))
        return known[tuple(places)][i]

    arrays = [
        jax.make_array_from_callback((len(filled), *leaf.shape[1:]), sharding, lambda index, i=i: part(i, index))
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, arrays)


def pad_to_groups(mesh: Mesh | None, count: int) -> int:
    """``count``, or the next multiple of the mesh's groups of clients."""
    groups = 1 if mesh is None else mesh.shape[CLIENTS]
    return -(-count // groups) * groups
