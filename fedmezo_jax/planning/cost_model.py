"""What a round of federated training asks of devices that are not here: memory, traffic, operations, time.

Memory and traffic are read off the compiled round (:mod:`collectives`); operations are counted from the model's shapes;
the time is a roofline: no less than the operations at the chip's peak, the weights and activations at its
memory's bandwidth, and the traffic at its links'.
"""

from __future__ import annotations

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
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama.checkpoints.layout import leaves, projections
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import lora_shapes
from fedmezo_jax.llama.loss import pair_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.parallel import sharding
from fedmezo_jax.planning import collectives
from fedmezo_jax.planning.hardware import GPUS, Topology


class Chip(NamedTuple):
    """A device's limits, as its maker publishes them.

    Attributes:
        operations: dense bfloat16 operations a second.
        memory: bytes a second between the chip and its memory.
        links: bytes a second between the chip and all its neighbours, both ways together.
        source: where the figures stand.
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
    "h100": Chip(989e12, GPUS["h100"].bandwidth, 900e9, "https://www.nvidia.com/en-us/data-center/h100/"),
}


class RoundSpec(NamedTuple):
    """A round to plan.

    Attributes:
        config: the model's shape.
        clients: that take part.
        local_steps: H.
        batch_size: rows a step.
        length: tokens a row, half of them labels.
        rank: of the LoRA.
        targets: projections with an adapter.
        precision: of the products with frozen weights.
        directions_shared: whether all clients draw the same directions.
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


class Compiled(NamedTuple):
    """What the compiler says of a round, on one device.

    Attributes:
        peak: bytes at the worst moment; None where it found no room.
        within: bytes that collectives between the devices of one copy of the model yield in a round; None where the
            compiler's text cannot be had: libtpu may know instructions that jaxlib does not.
        between: the same between groups of clients.
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
    """The (clients, model) shapes that divide both the devices and what the model splits."""
    split = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    widths = [m for m in range(1, devices + 1) if devices % m == 0 and all(size % m == 0 for size in split)]
    return [(devices // width, width) for width in widths]


def lower(planned: RoundSpec, mesh: Mesh, at_once: int) -> Any:
    """The round's work lowered for a mesh of devices, present or not; no array is made.

    Args:
        planned: the round.
        mesh: with the axes ``clients`` and ``model``.
        at_once: clients that run at once in each group.
    """
    config = planned.config
    everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P(federated.CLIENTS))
    place = sharding.base_sharding(mesh)
    assert place is not None
    stored = jnp.float32 if planned.precision == "float32" else jnp.bfloat16
    base = traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(s, stored, sharding=place(path, s)) for path, s in leaves(config).items()}
    )
    shapes = lora_shapes(config, planned.rank, planned.targets)
    whole = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere))
    lora = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
    work = client.mezo_client(mezo.MezoConfig())
    settings = (work, personalization.RateConfig(1e-5), None, at_once, planned.directions_shared)
    state = whole(jax.eval_shape(lambda lora: federated.federated(*settings).init(lora, planned.clients), lora))
    held = (sharding.pad_to_groups(mesh, planned.clients), planned.local_steps, planned.batch_size)
    labels = (*held, max(1, planned.length // 2))
    of = partial(jax.ShapeDtypeStruct, sharding=spread)
    rows: Any = (of((*held, planned.length), jnp.int32), *(of(labels, t) for t in (jnp.int32, jnp.int32, jnp.float32)))

    def each(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((planned.clients,), dtype, sharding=everywhere)

    key = whole(jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")))
    loss = pair_loss_of(Llama(config, 2.0, planned.precision), base)
    round = federated.federated(*settings, mesh).round
    cohort = federated.Cohort(each(jnp.int32), each(jnp.float32), TokenBatch(*rows))
    return round.work.lower(state, loss, cohort, key, None, None)


def compile_round(planned: RoundSpec, target: Topology, shape: tuple[int, int], at_once: int) -> Compiled:
    """Compiles the round for a topology's devices in a mesh of this (clients, model) shape."""
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
    """Bytes within copies of the model and between groups of clients, by a compiled round's text."""
    sent = collectives.collectives(text)
    crossing = [
        not one.groups or any(len({at // shape[1] for at in group}) > 1 for group in one.groups) for one in sent
    ]
    total = sum(one.bytes * one.times for one in sent)
    between = sum(one.bytes * one.times for one, crosses in zip(sent, crossing, strict=True) if crosses)
    return (total, 0) if shape[0] == 1 else (total - between, between)


class ForwardOperations(NamedTuple):
    """Floating-point operations of one example's forward pass: two for each product.

    Attributes:
        frozen: of the products with frozen weights; the head's at label positions alone.
        rest: of the adapters' products and of attention, without the half that causality spares.
    """

    frozen: int
    rest: int


def forward_operations(config: LlamaConfig, length: int, rank: int, targets: Sequence[str]) -> ForwardOperations:
    """Counts one forward pass over ``length`` tokens, half of them labels."""
    wide = projections(config)
    dense = sum(a * b for a, b in wide.values())
    adapters = sum(rank * sum(wide[name]) for name in targets)
    attention = (length + 1) * config.num_attention_heads * config.head_dim
    head = max(1, length // 2) * config.hidden_size * config.vocab_size
    tokens = config.num_hidden_layers * length
    return ForwardOperations(2 * (tokens * dense + head), 2 * tokens * (adapters + attention))


def operations(planned: RoundSpec) -> int:
    """Floating-point operations of all clients' 2·H forward passes."""
    each = sum(forward_operations(planned.config, planned.length, planned.rank, planned.targets))
    return 2 * planned.local_steps * planned.clients * planned.batch_size * each


def weight_bytes(planned: RoundSpec) -> int:
    """Bytes of one copy of the frozen weights."""
    count = sum(int(np.prod(shape)) for shape in leaves(planned.config).values())
    return count * (4 if planned.precision == "float32" else 2)


def roofline(planned: RoundSpec, chip: Chip, shape: tuple[int, int], at_once: int, compiled: Compiled) -> float:
    """Seconds a round at the least: the slower of arithmetic and memory, and the traffic, none of it overlapped.

    Every block of clients reads the weights twice a step, once for each loss. Activations' traffic is left out, and so
    is the devices' where it is not known.
    """
    groups, width = shape
    each = -(-planned.clients // groups)
    arithmetic = operations(planned) / planned.clients * each / width / chip.operations
    reads = 2 * planned.local_steps * -(-each // at_once) * weight_bytes(planned) / width
    return max(arithmetic, reads / chip.memory) + (compiled.received or 0) / chip.links
