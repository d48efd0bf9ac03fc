"""Times a FedMeZO round, forward passes, matrix products alone and PyTorch/PEFT, alternately in one run.

    python -m experiments.benchmarks.step
    python -m experiments.benchmarks.step --settings 8x1x128x8 --no-peer

Weights and examples are random; their values do not affect the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from experiments import _cli
from experiments._random_arrays import random_like
from experiments.benchmarks.pytorch_baseline import peer_steps
from fedmezo_jax.core import client, federated, mezo, personalization
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import base_shapes
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora, trained_layers
from fedmezo_jax.llama.loss import loss_of, pair_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.precision import Products, frozen_product, keep_in_loop
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.planning import cost_model


@dataclass(frozen=True)
class Config:
    """What to time."""

    model: str = "smollm2-135m"
    """a shape known by name (smollm2-135m, llama-3b, …) or the path of a config.json"""
    settings: str = "8x1x128x8,3x1x128x8,8x1x32x8,20x1x64x8,3x1x256x128"
    """clients x batch x tokens x LoRA rank, separated by commas; half of each example is labelled"""
    targets: str = "q_proj,v_proj"
    """projections with an adapter"""
    precisions: str = "float32,paired"
    """of the products with frozen weights: float32, bfloat16, paired"""
    peer: bool = True
    """time PyTorch and PEFT too (they must be installed)"""
    repeats: int = 5
    """rounds timed, after one that compiles, alternating with the other programs"""
    seed: int = 0
    """seed of weights and examples"""
    out: Path = Path("runs/step")
    """folder for config.json and results.json"""


class Setting(NamedTuple):
    """The sizes of one case.

    Attributes:
        clients: clients at once.
        batch: examples per client.
        length: tokens per example.
        rank: LoRA rank.
    """

    clients: int
    batch: int
    length: int
    rank: int


def main(config: Config) -> None:
    """Times every setting, prints the table and writes the folder."""
    start = time.perf_counter()
    settings = [parse_setting(text) for text in config.settings.split(",")]
    if config.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {config.repeats}")
    llama = named_shape(config.model)
    rows = []
    for setting in track(settings, "settings timed", transient=True):
        rows += bench(config, llama, setting)
    _cli.write_folder(config, rows, time.perf_counter() - start)
    hidden = ("seconds_median", "losses_seconds", "forward_tokens_per_second", "peak_flops")
    shown = [{name: value for name, value in row.items() if name not in hidden} for row in rows]
    _cli.print_table(f"{config.model}, {config.targets}, best of {config.repeats}", shown)


def bench(config: Config, llama: LlamaConfig, setting: Setting) -> list[dict[str, Any]]:
    """One row for each precision."""
    works: dict[str, Callable[[], Any]] = {}
    precisions = config.precisions.split(",")
    for precision in precisions:
        programs = _programs(config, llama, setting, precision)
        works |= {f"{precision} {name}": work for name, work in programs.items()}
    if config.peer:
        peer_dtypes = ("float32", "bfloat16") if set(precisions) != {"float32"} else ("float32",)
        shape = (setting.clients, setting.batch, setting.length, setting.rank, config.targets.split(","))
        works |= {f"peer {dtype}": peer_steps(llama, *shape, dtype).mezo for dtype in peer_dtypes}
    times = alternate(works, config.repeats)
    best = {name: min(seconds) for name, seconds in times.items()}
    tokens = setting.clients * setting.batch * setting.length
    rows = []
    for precision in precisions:
        # The server makes the update from the coefficients, so a step is the whole round.
        step, products = best[f"{precision} round"], best[f"{precision} products"]
        forwards = best[f"{precision} forward"] * 2
        rate = 2 * _operations(llama, setting, ()) / products
        share = 2 * _operations(llama, setting, config.targets.split(",")) / step / rate
        rows.append(
            setting._asdict()
            | {
                "dtype": precision,
                "seconds": step,
                "seconds_median": statistics.median(times[f"{precision} round"]),
                "losses_seconds": best[f"{precision} step"],
                "tokens_per_second": 2 * tokens / step,
                "forward_tokens_per_second": 2 * tokens / forwards,
                "peak_flops": rate,
                "share_of_peak": share,
                "step_over_two_forwards": step / forwards,
                "speedup_over_peer": best["peer float32"] / step if config.peer else None,
                "speedup_over_peer_bfloat16": best["peer bfloat16"] / step if "peer bfloat16" in best else None,
            }
        )
    return rows


def alternate(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each program, run ``repeats`` times in turn after a warm-up, so slow phases affect all."""
    for work in works.values():
        jax.block_until_ready(work())
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            jax.block_until_ready(work())
            times[name].append(time.perf_counter() - start)
    return times


class Case(NamedTuple):
    """Random weights and examples of one setting at one precision.

    Attributes:
        model: the decoder.
        base: its frozen weights.
        lora: the initial adapter.
        cohort: a cohort with one batch per client.
        key: the run's key.
    """

    model: Llama
    base: Any
    lora: mezo.Params
    cohort: federated.Cohort
    key: jax.Array


def random_case(
    llama: LlamaConfig, setting: Setting, targets: list[str], precision: Any, seed: int, layers: str = "all"
) -> Case:
    """Returns a cohort of one local step, half of each example labelled; weights are float32 only for float32."""
    clients, batch, length, rank = setting
    weight_dtype = jnp.float32 if precision == "float32" else jnp.bfloat16
    rng = np.random.default_rng(seed)
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, weight_dtype),
        base_shapes(llama),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    base, trained = random_like(shapes, seed), trained_layers(layers, llama)
    key = jax.random.key(seed, impl="threefry2x32")
    tokens = rng.integers(0, llama.vocab_size, (clients, 1, batch, length)).astype(np.int32)
    labelled = np.arange(length - _labels(setting), length, dtype=np.int32)
    positions = np.broadcast_to(labelled - 1, (clients, 1, batch, len(labelled)))
    labels = np.take_along_axis(tokens, positions + 1, axis=-1)
    rows = jax.device_put(TokenBatch(tokens, positions, labels, np.ones_like(labels, np.float32)))
    cohort = federated.Cohort(np.arange(clients), np.ones(clients, np.float32), rows)
    lora = init_lora(key, llama, rank, targets, trained)
    return Case(Llama(llama, 2.0, precision, trained=trained), base, lora, cohort, key)


class CompiledRound(NamedTuple):
    """A round of one local step of a :class:`Case`, whose clients' half is compiled.

    Attributes:
        run: runs both halves.
        program: the clients' half.
        seconds: time to compile it.
    """

    run: Callable[[], Any]
    program: Any
    seconds: float


def compile_round(case: Case, block: int | None = None) -> CompiledRound:
    """Compiles a round of the published method, with ``block`` clients at once or all, and runs the server's half."""
    settings = (client.mezo_client(mezo.MezoConfig()), personalization.RateConfig(1e-5))
    init, round = federated.federated(*settings, block_size=block)
    count = len(case.cohort.ids)
    state, loss = init(case.lora, count), pair_loss_of(case.model, case.base)
    start = time.perf_counter()
    program = jax.jit(round.work).lower(state, loss, case.cohort, case.key).compile()
    seconds = time.perf_counter() - start
    compiled = replace(round, work=program)
    steps = np.zeros((count, 1), np.float32)
    report = federated.RoundReport(steps, steps[..., None], steps[:, 0])  # compiles the server's part without a round
    jax.block_until_ready(compiled.apply(state, case.cohort.ids, case.cohort.weights, report, case.key))
    return CompiledRound(lambda: compiled(state, loss, case.cohort, case.key), program, seconds)


def _programs(config: Config, llama: LlamaConfig, setting: Setting, precision: Any) -> dict[str, Callable[[], Any]]:
    """A round of one local step, a forward pass of all clients, and the matrix products of two forward passes."""
    case = random_case(llama, setting, config.targets.split(","), precision, config.seed)
    init, round = federated.federated(client.mezo_client(mezo.MezoConfig()), personalization.RateConfig(1e-5))
    single = case.model.clone(precision="bfloat16") if precision == "paired" else case.model
    state, pair_loss, loss = (
        init(case.lora, setting.clients),
        pair_loss_of(case.model, case.base),
        loss_of(single, case.base),
    )
    rows = jax.tree.map(lambda leaf: leaf[:, 0], case.cohort.batches)
    loras = jax.tree.map(lambda leaf: jnp.stack([leaf] * setting.clients), case.lora)
    forward = jax.jit(lambda loss, loras, rows: jax.vmap(loss)(loras, rows))
    products = jax.jit(lambda base: _products(llama, base, setting, precision))
    return {
        "round": lambda: round(state, pair_loss, case.cohort, case.key),
        "step": lambda: round.work(state, pair_loss, case.cohort, case.key),
        "forward": lambda: forward(loss, loras, rows),
        "products": lambda: products(case.base),
    }


def _products(llama: LlamaConfig, base: Any, setting: Setting, precision: Any) -> jax.Array:
    """The products of two forward passes with frozen weights and little else: the machine's peak for these shapes.

    ``paired`` has one product with twice the rows, of a mean and a difference.
    """
    passes, times = (1, 2) if precision == "paired" else (2, 1)
    tokens = setting.clients * setting.batch
    kind = "bfloat16" if precision == "paired" else precision
    product = partial(frozen_product, products=Products(kind))

    def layer(x, index):
        sliced = partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)
        kernels = jax.tree.map(lambda leaf: sliced(*keep_in_loop(leaf, index)), base["layers"])
        attention, mlp = kernels["self_attn"], kernels["mlp"]
        query, key, value = (product(x, attention[name]["kernel"]) for name in ("q_proj", "k_proj", "v_proj"))
        gate, up = (product(x, mlp[name]["kernel"]) for name in ("gate_proj", "up_proj"))
        moved = product(query, attention["o_proj"]["kernel"]) + product(gate + up, mlp["down_proj"]["kernel"])
        return moved.at[:, : key.shape[1]].add(key + value), None

    def forward(scale):
        x = jnp.full((times * tokens * setting.length, llama.hidden_size), scale)
        x, _ = jax.lax.scan(layer, x, jnp.arange(llama.num_hidden_layers))
        labelled = x[: times * tokens * _labels(setting)]
        table = base["embed_tokens"]["embedding"] if llama.tie_word_embeddings else base["lm_head"]["kernel"].T
        blocks = -(-llama.vocab_size // 4096)
        width = llama.vocab_size // blocks

        def part(block):
            return jnp.max(
                product(labelled, jax.lax.dynamic_slice_in_dim(*keep_in_loop(table, block * width), width).T)
            )

        return jnp.max(jax.lax.map(part, jnp.arange(blocks)))

    return jax.lax.map(forward, jnp.arange(1.0, 1.0 + passes))


def _operations(llama: LlamaConfig, setting: Setting, targets: Sequence[str]) -> int:
    """Floating-point operations of the products of one forward pass of all clients.

    Without targets only products with frozen weights count. With targets those of the adapters and of causal attention
    count too.
    """
    frozen, rest = cost_model.forward_operations(llama, setting.length, setting.rank, targets)
    return setting.clients * setting.batch * (frozen + (rest if targets else 0))


def _labels(setting: Setting) -> int:
    return max(1, setting.length // 2)


def parse_setting(text: str) -> Setting:
    """The sizes that an option gives as clients x batch x tokens x rank; ``UserError`` where it is anything else."""
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"a setting is clients x batch x tokens x rank, like 8x1x128x8, not {text!r}")
    return Setting(*map(int, parts))


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
