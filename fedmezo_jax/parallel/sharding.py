"""The mesh of a run's devices, and how its arrays are sharded.

The mesh has two axes. Each group of devices along ``clients`` trains its own clients. The frozen weights of one copy
are split along ``model``. LoRA, learning rates and coefficients are small and are replicated on all devices.
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
from fedmezo_jax.llama.quantised import Quantised, outputs_first

MODEL = "model"
RULES: dict[str, str | None] = {
    "vocab": MODEL,
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "embed": None,
    "head": None,
    "layers": None,
}
"""Logical axis of a frozen weight → mesh axis along which it is split; None keeps it whole."""

_WEIGHTS: dict[str, tuple[str, ...]] = {
    "embed_tokens/embedding": ("vocab", "embed"),
    "lm_head/kernel": ("embed", "vocab"),
    "norm/scale": ("embed",),
    "input_layernorm/scale": ("layers", "embed"),
    "post_attention_layernorm/scale": ("layers", "embed"),
    "q_norm/scale": ("layers", "head"),
    "k_norm/scale": ("layers", "head"),
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
    """Parses a text such as ``clients=4,model=2``; None uses all devices for clients.

    Returns:
        The mesh, or None for a single device.

    Raises:
        UserError: the text has another form, or needs another number of devices than there are.
    """
    if text is None:
        sizes = {CLIENTS: len(devices), MODEL: 1}
    else:
        match = re.fullmatch(r"\s*clients=(\d+)\s*,\s*model=(\d+)\s*", text)
        if match is None or not all(map(int, match.groups())):
            raise UserError(f"--mesh {text}: give it as clients=4,model=2")
        sizes = dict(zip((CLIENTS, MODEL), map(int, match.groups()), strict=True))
    needed = math.prod(sizes.values())
    if needed != len(devices):
        raise UserError(
            f"--mesh {text} is for {needed} devices, and there are {len(devices)}: their product must agree"
        )
    if needed == 1:
        return None
    return Mesh(np.array(devices).reshape(sizes[CLIENTS], sizes[MODEL]), (CLIENTS, MODEL))


def check_mesh(mesh: Mesh | None, config: LlamaConfig) -> None:
    """Checks that the model axis divides every dimension that is split along it.

    Raises:
        UserError: lists the dimensions that it does not divide.
    """
    parts = 1 if mesh is None else mesh.shape[MODEL]
    sizes = {
        "attention heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "MLP width": config.intermediate_size,
    }  # a vocabulary that does not divide is not split: many tokenizers have a few extra tokens
    undivided = [f"{size} {name}" for name, size in sizes.items() if size % parts]
    if undivided:
        raise UserError(
            f"--mesh model={parts} does not divide the model's {' and '.join(undivided)}: give another number"
        )


def base_sharding(mesh: Mesh | None) -> Callable[[tuple[str, ...], Any], Any] | None:
    """Returns a function from the path of a base leaf and the leaf to its sharding; None without a mesh.

    A quantised kernel has a sharding for each of its parts, and so a tree of them.
    """
    if mesh is None:
        return None
    parts = mesh.shape[MODEL]

    def sharding_of(path: tuple[str, ...], leaf: Any) -> Any:
        axes = [RULES[name] for name in _WEIGHTS["/".join(path[-2:])]]
        if isinstance(leaf, Quantised) and outputs_first(leaf.kind):
            axes[-2:] = reversed(axes[-2:])
        return jax.tree.map(
            lambda part: NamedSharding(
                mesh, P(*(axis if size % parts == 0 else None for axis, size in zip(axes, part.shape, strict=True)))
            ),
            leaf,
        )

    return sharding_of


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Returns the pytree replicated on every device of the mesh, or unchanged without a mesh.

    Every process passes the whole pytree; equality is not checked.
    """
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, P())

    def replicate_leaf(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

    return jax.tree.map(replicate_leaf, tree)


def shard_clients(mesh: Mesh | None, count: int, make: Callable[[np.ndarray], Any]) -> Any:
    """Makes the data of ``count`` clients; each host makes only those of its own clients.

    Args:
        mesh: the mesh; None for one device.
        count: number of clients.
        make: ``make(clients)`` returns the pytree of numpy arrays for these client positions, leaves ``[len, …]``.

    Returns:
        The pytree with leading axis ``count``, padded to a multiple of the groups of clients with copies of the first
        client's data.
    """
    if mesh is None:
        return jax.device_put(make(np.arange(count)))
    positions, sharding = _positions(mesh, count), NamedSharding(mesh, P(CLIENTS))
    some = jax.tree.map(np.asarray, make(own_positions(mesh, count)[:1]))
    leaves, structure = jax.tree.flatten(some)
    made_leaves: dict[tuple[int, ...], list[Any]] = {}

    def shard(i: int, index: Any) -> Any:
        shard_positions = positions[index[0]]
        if tuple(shard_positions) not in made_leaves:
            made_leaves[tuple(shard_positions)] = jax.tree.leaves(make(shard_positions))
        return made_leaves[tuple(shard_positions)][i]

    arrays = [
        jax.make_array_from_callback((len(positions), *leaf.shape[1:]), sharding, lambda index, i=i: shard(i, index))
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, arrays)


def own_positions(mesh: Mesh | None, count: int) -> np.ndarray:
    """Returns which of ``count`` clients' data :func:`shard_clients` makes in this process, sorted."""
    if mesh is None:
        return np.arange(count)
    positions = _positions(mesh, count)
    shards = NamedSharding(mesh, P(CLIENTS)).addressable_devices_indices_map(positions.shape)
    return np.unique(np.concatenate([positions[index] for index in shards.values()]))


def _positions(mesh: Mesh, count: int) -> np.ndarray:
    """The client at each place of a padded array of clients."""
    positions = np.arange(pad_to_groups(mesh, count))
    positions[count:] = 0
    return positions


def pad_to_groups(mesh: Mesh | None, count: int) -> int:
    """Returns ``count`` rounded up to a multiple of the mesh's groups of clients."""
    groups = 1 if mesh is None else mesh.shape[CLIENTS]
    return -(-count // groups) * groups
