"""The programs whose memory is compared: a forward pass, a FedMeZO step, a forward-gradient step, back-propagation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from fedmezo_jax.core import client, mezo
from fedmezo_jax.core.estimators import ForwardGradient
from fedmezo_jax.data.examples import HiddenBatch, TokenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import held_leaves
from fedmezo_jax.llama.lora import lora_shapes, trained_layers
from fedmezo_jax.llama.loss import loss_of, pair_loss_of, point_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.quantised import BaseType, check_eight_bit, held_as
from fedmezo_jax.llama.shapes import named_shape


@dataclass(frozen=True)
class StepConfig:
    """A local step."""

    model: str = "llama-3b"
    """llama-3b, qwen3-0.6b, smollm3-3b, mistral-7b or another of the shapes in docs/models.md, or the path of a
    config.json"""
    length: int = 1024
    """tokens per example, half of them labels"""
    rank: int = 128
    """LoRA rank"""
    targets: str = "q_proj,v_proj"
    """projections with an adapter"""
    layers: str = "all"
    """layers with an adapter, as in experiments.fedmezo; with frozen layers below them, all but the forward pass starts
    from their hidden states, and has the weights above alone"""
    directions: int = 4
    """tangents of a forward-gradient step"""
    clients_per_device: int = 1
    """clients that run at once on a device, with one example each"""
    precision: Precision = "paired"
    """of the step's products with frozen weights; with paired, the step in plain bfloat16 is shown beside it"""

    base: BaseType | None = None
    """how the frozen weights are held: float32, bfloat16, int8, fp8 or int4; by default as the precision"""

    eight_bit_products: bool = False
    """whether projections in int8 or fp8 are multiplied by activations in eight bits; the two-point step is shown then
    as the benchmark of the precision measures it, though runs refuse it"""

    def __post_init__(self):
        """Checks the options."""
        check_eight_bit(self.eight_bit_products, self.base)
        for name in ("length", "rank", "clients_per_device", "directions"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def programs(config: StepConfig, device: Any) -> list[tuple[str, Precision, Callable[..., Any], tuple[Any, ...]]]:
    """Returns name, precision, function and abstract arguments of each program. Argument 1, the LoRA, may be donated.

    Precision ``paired`` needs two losses. Programs with one loss use bfloat16 instead.
    """
    llama = named_shape(config.model)
    sharding = SingleDeviceSharding(device)

    def abstract(dtype, shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def tree(dtype, shapes):
        return jax.tree.map(partial(abstract, dtype), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))

    clients, labels = config.clients_per_device, max(1, config.length // 2)

    def weights(first: int) -> Any:
        held = held_leaves(llama, *held_as(config), first)
        return jax.tree.map(lambda leaf: abstract(leaf.dtype, leaf.shape), traverse_util.unflatten_dict(held))

    trained = trained_layers(config.layers, llama)
    shapes = lora_shapes(llama, config.rank, config.targets.split(","), trained)
    lora = tree(
        jnp.float32, jax.tree.map(lambda s: (clients, *s), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    )
    shape = (clients, 1, 1, labels)
    tokens = abstract(jnp.int32, (clients, 1, 1, config.length))
    rows = TokenBatch(tokens, abstract(jnp.int32, shape), abstract(jnp.int32, shape), abstract(jnp.float32, shape))  # pyright: ignore
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="threefry2x32"), clients))
    keys = abstract(keys.dtype, keys.shape)

    unpaired: Precision = "bfloat16" if config.precision == "paired" else config.precision
    single = Llama(llama, 2.0, unpaired, eight_bit=config.eight_bit_products, trained=trained)
    checkpointed = single.clone(checkpointed=True)

    first, inputs = single.trained_layers[0], rows
    base, part = weights(0), weights(first)
    if first:
        hidden = abstract(jnp.float32, (*tokens.shape, llama.hidden_size))
        inputs = HiddenBatch(hidden, *rows[1:])  # pyright: ignore

    def forward(base, lora, rows):
        return jax.vmap(loss_of(single, base))(lora, jax.tree.map(lambda leaf: leaf[:, 0], rows))

    def step(model, base, lora, rows, keys):
        work, loss = client.mezo_client(mezo.MezoConfig()), pair_loss_of(model, base)
        return jax.vmap(lambda lora, rows, key: work(loss, lora, rows, key, jnp.float32(1e-5)))(lora, rows, keys)

    def tangents(base, lora, rows, keys):
        estimator = ForwardGradient(mezo.MezoConfig(directions=config.directions))
        work, loss = client.estimator_client(estimator), point_loss_of(single, base)
        return jax.vmap(lambda lora, rows, key: work(loss, lora, rows, key, jnp.float32(1e-5)))(lora, rows, keys)

    def backprop(model, base, lora, rows):
        def client_step(lora, batch):
            loss, gradient = jax.value_and_grad(loss_of(model, base))(lora, jax.tree.map(lambda leaf: leaf[0], batch))
            return jax.tree.map(lambda p, g: p - 1e-5 * g, lora, gradient), loss

        return jax.vmap(client_step)(lora, rows)

    precisions: dict[Precision, None] = dict.fromkeys((config.precision, unpaired))  # without duplicates
    steps: list[tuple[str, Precision, Callable[..., Any], tuple[Any, ...]]] = [
        ("fedmezo", precision, partial(step, single.clone(precision=precision)), (part, lora, inputs, keys))
        for precision in precisions
    ]
    return [
        ("forward", unpaired, forward, (base, lora, rows)),
        *steps,
        ("forward_gradient", unpaired, tangents, (part, lora, inputs, keys)),
        ("backprop", unpaired, partial(backprop, single), (part, lora, inputs)),
        ("backprop_checkpointed", unpaired, partial(backprop, checkpointed), (part, lora, inputs)),
    ]


def lower(what: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Lowers one of the :func:`programs`. All but the forward pass return the LoRA updated, so they are donated it."""
    return jax.jit(function, donate_argnums=() if what == "forward" else (1,)).lower(*arguments)
