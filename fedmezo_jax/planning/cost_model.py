"""Estimates memory, traffic, operations and time of a federated round on devices that need not be present.

Memory and traffic are read from the compiled round (:mod:`collectives`). Operations are counted from the model's
shapes. The time is a roofline: a lower bound from the chip's peak operations, its memory bandwidth and its link
bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedmezo_jax.core import client, federated, mezo, personalization
from fedmezo_jax.data.examples import HiddenBatch, TokenBatch
from fedmezo_jax.llama.checkpoints.layout import held_leaves, projections
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import lora_shapes
from fedmezo_jax.llama.loss import pair_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.quantised import BaseType, held_as
from fedmezo_jax.parallel import sharding
from fedmezo_jax.planning import collectives
from fedmezo_jax.planning.hardware import GPUS, Topology


class Chip(NamedTuple):
    """A device's limits, as its maker publishes them.

    Attributes:
        operations: dense bfloat16 operations per second.
        memory: bytes per second between the chip and its memory.
        links: bytes per second between the chip and all its neighbours, both directions together.
        source: source of the figures.
    """

    operations: float
    memory: float
    links: float
    source: str


CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9, "https://cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 2765e9, 600e9, "https://cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 1640e9, 448e9, "https://cloud.google.com/tpu/docs/v6e"),
    "a100-40gb": Chip(312e12, GPUS["a100-40gb"].bandwidth, 600e9, "https://www.nvidia.com/en-us/data-center/a100/"),
    "a100-80gb": Chip(312e12, GPUS["a100-80gb"].bandwidth, 600e9, "https://www.nvidia.com/en-us/data-center/a100/"),
    "rtx-4090": Chip(
        165e12, GPUS["rtx-4090"].bandwidth, 64e9, "https://www.nvidia.com/en-us/geforce/ada-lovelace-architecture/"
    ),
    "h100": Chip(989e12, GPUS["h100"].bandwidth, 900e9, "https://www.nvidia.com/en-us/data-center/h100/"),
    "h200": Chip(989e12, 4800e9, 900e9, "https://www.nvidia.com/en-us/data-center/h200/"),
}
DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""The chip of :data:`CHIPS` by the name that JAX gives it."""


class RoundSpec(NamedTuple):
    """A round to plan.

    Attributes:
        config: the model's shape.
        clients: number of participants.
        local_steps: H.
        batch_size: examples per step.
        length: tokens per example, half of them labels.
        rank: rank of the LoRA adapter.
        targets: projections with an adapter.
        precision: precision of the products with frozen weights.
        directions_shared: whether all clients draw the same directions.
        trained: layers with an adapter; None for all. Steps start from the hidden states below the first of them.
        base: how the frozen weights are held.
    """

    config: LlamaConfig
    clients: int
    local_steps: int
    batch_size: int
    length: int
    rank: int
    targets: tuple[str, ...]
    precision: Precision
    directions_shared: bool
    trained: tuple[int, ...] | None = None
    base: BaseType | None = None

    @property
    def first(self) -> int:
        """The first layer that the devices hold."""
        return self.trained[0] if self.trained else 0


class Compiled(NamedTuple):
    """The compiler's figures for a round, on one device.

    Attributes:
        peak: largest number of bytes in use; None if the device's memory is too small.
        within: bytes received in a round from collectives between the devices of one copy of the model; None if the
            compiler's text is not available (libtpu may use instructions that jaxlib does not know).
        between: bytes received from collectives between groups of clients; None likewise.
        code: bytes of the program itself.
    """

    peak: int | None
    within: int | None
    between: int | None
    code: int

    @property
    def received(self) -> int | None:
        """Bytes of both kinds together."""
        return None if self.within is None or self.between is None else self.within + self.between


def meshes(devices: int, config: LlamaConfig) -> list[tuple[int, int]]:
    """Returns the (clients, model) shapes that divide the devices and every split dimension of the model."""
    split = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    widths = [m for m in range(1, devices + 1) if devices % m == 0 and all(size % m == 0 for size in split)]
    return [(devices // width, width) for width in widths]


def lower(planned: RoundSpec, mesh: Mesh, at_once: int) -> Any:
    """Returns the clients' work of a round, lowered for a mesh of devices; no array is made.

    Args:
        planned: the round.
        mesh: a mesh with the axes ``clients`` and ``model``, of devices that need not be present.
        at_once: clients that run at once in each group.
    """
    config = planned.config
    replicated, by_client = NamedSharding(mesh, P()), NamedSharding(mesh, P(federated.CLIENTS))
    sharding_of = sharding.base_sharding(mesh)
    assert sharding_of is not None
    held = held_leaves(config, *held_as(planned), planned.first)

    def placed(part: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)

    base = traverse_util.unflatten_dict(
        {path: jax.tree.map(placed, leaf, sharding_of(path, leaf)) for path, leaf in held.items()}
    )
    shapes = lora_shapes(config, planned.rank, planned.targets, planned.trained)
    replicate = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated))
    lora = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
    work = client.mezo_client(mezo.MezoConfig())
    settings = (work, personalization.RateConfig(1e-5), None, at_once, planned.directions_shared)
    state = replicate(jax.eval_shape(lambda lora: federated.federated(*settings).init(lora, planned.clients), lora))
    batch_shape = (sharding.pad_to_groups(mesh, planned.clients), planned.local_steps, planned.batch_size)
    label_shape = (*batch_shape, max(1, planned.length // 2))
    client_array = partial(jax.ShapeDtypeStruct, sharding=by_client)
    tokens: Any = client_array((*batch_shape, planned.length), jnp.int32)
    hidden: Any = client_array((*tokens.shape, config.hidden_size), jnp.float32)
    labels: Any = [client_array(label_shape, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
    batches = HiddenBatch(hidden, *labels) if planned.first else TokenBatch(tokens, *labels)

    def client_vector(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((planned.clients,), dtype, sharding=replicated)

    key = replicate(jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")))
    loss = pair_loss_of(Llama(config, 2.0, planned.precision, trained=planned.trained), base)
    round = federated.federated(*settings, mesh).round
    cohort = federated.Cohort(client_vector(jnp.int32), client_vector(jnp.float32), batches)
    return jax.jit(round.work).lower(state, loss, cohort, key, None, None)


def compile_round(planned: RoundSpec, target: Topology, shape: tuple[int, int], at_once: int) -> Compiled:
    """Compiles the round for a topology's devices in a mesh of this (clients, model) shape; returns its figures."""
    mesh = Mesh(np.array(target.devices).reshape(shape), (federated.CLIENTS, sharding.MODEL))
    try:
        compiled = lower(planned, mesh, at_once).compile(compiler_options=target.options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(None, 0, 0, 0)
    memory = compiled.memory_analysis()
    try:
        within, between = _traffic(compiled.as_text(), shape)
    except jax.errors.JaxRuntimeError:
        within, between = None, None
    return Compiled(memory.peak_memory_in_bytes, within, between, memory.generated_code_size_in_bytes)


def _traffic(text: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Bytes within copies of the model and between groups of clients, from the text of a compiled round."""
    communications = collectives.collectives(text)
    crosses_groups = [
        not collective.groups or any(len({device // shape[1] for device in group}) > 1 for group in collective.groups)
        for collective in communications
    ]
    total = sum(collective.bytes * collective.times for collective in communications)
    between = sum(
        collective.bytes * collective.times
        for collective, crosses in zip(communications, crosses_groups, strict=True)
        if crosses
    )
    return (total, 0) if shape[0] == 1 else (total - between, between)


class ForwardOperations(NamedTuple):
    """Floating-point operations of one example's forward pass; a multiplication with addition counts as two.

    Attributes:
        frozen: products with frozen weights; those with the head only at label positions.
        rest: products with the adapters, and attention without the half that the causal mask removes.
    """

    frozen: int
    rest: int


def forward_operations(
    config: LlamaConfig, length: int, rank: int, targets: Sequence[str], trained: tuple[int, ...] | None = None
) -> ForwardOperations:
    """Counts the operations of one forward pass over ``length`` tokens, half of them labels.

    Of the layers only those from the first of ``trained`` on are run; None means all, with an adapter each.
    """
    widths = projections(config)
    dense = sum(a * b for a, b in widths.values())
    adapters = sum(rank * sum(widths[name]) for name in targets)
    attention = (length + 1) * config.num_attention_heads * config.head_dim
    head = max(1, length // 2) * config.hidden_size * config.vocab_size
    trained = tuple(range(config.num_hidden_layers)) if trained is None else trained
    tokens = (config.num_hidden_layers - trained[0]) * length
    rest = tokens * attention + len(trained) * length * adapters
    return ForwardOperations(2 * (tokens * dense + head), 2 * rest)


def operations(planned: RoundSpec) -> int:
    """Returns the floating-point operations of all clients' 2·H forward passes."""
    per_example = sum(
        forward_operations(planned.config, planned.length, planned.rank, planned.targets, planned.trained)
    )
    return 2 * planned.local_steps * planned.clients * planned.batch_size * per_example


def weight_bytes(planned: RoundSpec) -> int:
    """Returns the bytes of one copy of the frozen weights that the devices hold."""
    parts = jax.tree.leaves(held_leaves(planned.config, *held_as(planned), planned.first))
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)


def roofline(planned: RoundSpec, chip: Chip, shape: tuple[int, int], at_once: int, compiled: Compiled) -> float:
    """Returns a lower bound on the seconds per round: the slower of arithmetic and memory, plus the links' traffic.

    Every block of clients reads the weights twice per step, once for each loss. Memory traffic of activations is left
    out, and so is traffic between devices if it is not known.
    """
    groups, width = shape
    clients_per_group = -(-planned.clients // groups)
    arithmetic = operations(planned) / planned.clients * clients_per_group / width / chip.operations
    reads = 2 * planned.local_steps * -(-clients_per_group // at_once) * weight_bytes(planned) / width
    return max(arithmetic, reads / chip.memory) + (compiled.received or 0) / chip.links
