"""Peak memory of a FedMeZO step, of a forward pass and of back-propagation, as planned by the compiler.

    python -m experiments.memory --model llama-3b --topology v5e:2x2
    python -m experiments.memory --model smollm2-135m --device cpu --length 128 --rank 8 --precision float32
    python -m experiments.memory --model llama-3b --topology a100-40gb --sweep length

Programs are compiled ahead of time for the topology; no such device is needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # programs are compiled and not run

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from experiments import _cli
from experiments._growth_plot import plot_growth
from fedmezo_jax.core import client, mezo
from fedmezo_jax.core.estimators import ForwardGradient
from fedmezo_jax.data.examples import HiddenBatch, TokenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import base_shapes
from fedmezo_jax.llama.lora import lora_shapes, trained_layers
from fedmezo_jax.llama.loss import loss_of, pair_loss_of, point_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.planning import hardware

SWEEPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "model": ("model", ("smollm2-135m", "llama-3b", "llama-7b", "llama3-8b", "llama-13b", "llama-70b")),
    "length": ("length", (256, 512, 1024, 2048, 4096, 8192)),
    "clients": ("clients_per_device", (1, 2, 4, 8, 16)),
}
"""The option that each sweep varies, and its values."""


@dataclass(frozen=True)
class Config:
    """What to compile."""

    model: str = "llama-3b"
    """llama-3b, qwen3-0.6b, smollm3-3b, mistral-7b or another of the shapes in docs/models.md, or the path of a
    config.json"""
    topology: str | None = None
    """device to compile for: v5e:2x2, v5p:2x2x1, v6e:2x2, a100-40gb, a100-80gb, h100, h100:8; one chip of it is used"""
    device: Literal["cpu"] | None = None
    """compile for this machine instead"""
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
    sweep: Literal["model", "length", "clients"] | None = None
    """vary this and plot the growth"""
    out: Path = Path("runs/memory")
    """folder for config.json, results.json and, for a sweep, growth.png"""

    def __post_init__(self):
        """Checks the options."""
        if self.topology and self.device:
            raise UserError("--topology and --device exclude each other: give one")
        for name in ("length", "rank", "clients_per_device", "directions"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def main(config: Config) -> None:
    """Compiles the programs, prints the table and writes the folder."""
    start = time.perf_counter()
    name = config.device or config.topology or "v5e:2x2"
    target = hardware.host() if name == "cpu" else hardware.describe(name)
    field, values = SWEEPS[config.sweep] if config.sweep else ("model", (config.model,))
    rows = []
    for value in values:
        for row in measure(replace(config, **{field: value}), target):
            rows.append(row)
            print(" ".join(str(part) for part in (value, row["what"], row["precision"], row["peak_bytes"])), flush=True)
    _cli.write_folder(config, rows, time.perf_counter() - start)
    title = f"{name}, {target.memory / hardware.GIB:.2f} GiB a device, r={config.rank} on "
    _cli.print_table(title + config.targets, rows)
    if config.sweep:
        plot_growth(config.out / "growth.png", rows, field, target.memory, title + config.targets)


def measure(config: Config, target: hardware.Topology) -> Iterator[dict[str, Any]]:
    """Yields one row per program; ``over_forward`` is the ratio of its peak to that of the forward pass."""
    forward = None
    for what, precision, function, arguments in programs(config, target.devices[0]):
        donated = (1,) if what != "forward" else ()  # the LoRA, which these programs return updated
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
        plan = hardware.plan(lowered, target)
        forward = forward or plan.peak
        yield {
            "model": config.model,
            "length": config.length,
            "clients_per_device": config.clients_per_device,
            "layers": config.layers,
            "what": what,
            "precision": precision,
            "peak_bytes": plan.peak,
            "temp_bytes": plan.temporary,
            "fits": plan.peak is not None and plan.peak <= target.memory,
            "over_forward": plan.peak / forward if plan.peak and forward else None,
        }


def programs(config: Config, device: Any) -> list[tuple[str, Precision, Callable[..., Any], tuple[Any, ...]]]:
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
    base = tree(jnp.float32 if config.precision == "float32" else jnp.bfloat16, base_shapes(llama))
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
    single = Llama(llama, 2.0, unpaired, trained=trained)
    checkpointed = single.clone(checkpointed=True)

    part, inputs = base, rows
    if first := single.trained_layers[0]:
        hidden = abstract(jnp.float32, (*tokens.shape, llama.hidden_size))
        inputs = HiddenBatch(hidden, *rows[1:])  # pyright: ignore

        def above(leaf):
            return abstract(leaf.dtype, (leaf.shape[0] - first, *leaf.shape[1:]))

        part = base | {"layers": jax.tree.map(above, base["layers"])}
        if not llama.tie_word_embeddings:
            del part["embed_tokens"]

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


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
