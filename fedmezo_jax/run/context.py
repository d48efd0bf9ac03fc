"""What a run works with: model, data, partition and the federated algorithm, put together from its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fedmezo_jax.core import client, federated, mezo, personalization, random
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.buckets import Widths, bucketed_loss, lengths, widths
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.data.partition import heterogeneity
from fedmezo_jax.data.table import Table, data_named, deal, tabulate
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.checkpoints.weights import sixteen_bit
from fedmezo_jax.llama.checks import check_finite, check_ids
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.loss import loss_of, loss_sums, pair_loss_of
from fedmezo_jax.llama.model import Base, Llama
from fedmezo_jax.llama.precision import Precision, default_precision, least_clients, least_rows
from fedmezo_jax.llama.registry import cache_folder, load_tokenizer, resolve
from fedmezo_jax.parallel import sharding
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.config_parts import DataConfig, LocalConfig, ServerConfig

TOKENS_AT_ONCE = 8192
"""Clients run at once so long as their batches hold no more tokens than this; further ones follow in blocks."""


class RunContext(NamedTuple):
    """What a run works with, loaded and checked.

    Attributes:
        config: the run's, settled.
        model: the decoder, with the run's α/r and precision.
        base: its frozen weights, on the device.
        lora: θ at the start.
        train: training rows.
        test: test examples.
        parts: for each client the indices of its rows in ``train``.
        categories: category of each training row, or what stands for it where the partition goes by something else.
        skipped: rows left out because they are longer than ``max_length``.
        truncated: rows that lost their end for it.
        widths: at which steps run.
        mesh: the devices it is spread over; None for one.
    """

    config: RunConfig
    model: Llama
    base: Base
    lora: mezo.Params
    train: TokenBatch
    test: TokenBatch
    parts: list[np.ndarray]
    categories: list[str]
    skipped: int
    truncated: int
    widths: Widths
    mesh: Mesh | None

    @property
    def heterogeneity(self) -> float:
        """Mean total-variation distance between a client's categories and all rows' categories."""
        return heterogeneity(self.parts, self.categories)


def start(config: RunConfig, llama: LlamaConfig) -> mezo.Params:
    """θ at the start: a function of the seed and of the model's shape."""
    key = jax.random.fold_in(run_key(config.seed), random.INIT)
    return init_lora(key, llama, config.lora_rank, config.target_names)


def resolve_defaults(config: RunConfig, notify: Callable[[str], None] = lambda notice: None) -> RunConfig:
    """The configuration with a precision, chosen for the model's stored weights and this device where none is given.

    Args:
        config: the run's.
        notify: called with what was chosen and why, where none was given.

    Raises:
        UserError: there is no such model, or its files do not fit together.
    """
    if config.precision:
        return config
    folder = resolve(config.model)
    precision, reason = default_precision(sixteen_bit(folder, LlamaConfig.from_json(folder)))
    notify(f"precision {precision}: {reason}")
    return replace(config, precision=precision)


def stored_type(precision: Precision) -> Any:
    """The dtype that a run holds the frozen weights in."""
    return jnp.float32 if precision == "float32" else jnp.bfloat16


def prepare(config: RunConfig, mesh: Mesh | None = None) -> RunContext:
    """Loads model and data and deals the rows to clients.

    Args:
        config: the run's.
        mesh: what to spread it over; the weights are read straight onto its devices.

    Raises:
        UserError: anything about model, data, partition or mesh that does not fit.
    """
    config = resolve_defaults(config)
    assert config.precision
    folder = resolve(config.model)
    llama = LlamaConfig.from_json(folder)
    sharding.check_mesh(mesh, llama)
    if config.max_length > llama.max_position_embeddings:
        raise UserError(
            f"--max-length {config.max_length}: the model takes {llama.max_position_embeddings} tokens at most"
        )
    tokenizer = load_tokenizer(folder)
    table = table_of(config, config.seed, tokenizer)
    check_tokens(table.rows, llama, folder)
    train, test = (TokenBatch(*(leaf[picked] for leaf in table.rows)) for picked in (table.train, table.test))
    trained = [table.examples[i] for i in table.train]
    how = (config.clients, config.dirichlet_alpha, config.seed)
    with data_named(config.data):
        parts, categories = deal(config.partition, trained, lengths(train), *how)

    base = load_base(folder, llama, stored_type(config.precision), sharding.base_sharding(mesh))
    model = Llama(llama, config.lora_alpha / config.lora_rank, config.precision)
    among = widths(train, config.length_buckets)
    lora = sharding.replicate(mesh, start(config, llama))
    counted = (table.skipped, table.truncated)
    return RunContext(config, model, base, lora, train, test, parts, categories, *counted, among, mesh)


def table_of(config: DataConfig, seed: int, tokenizer: Any) -> Table:
    """The rows that these options mean, tokenised, and split by the seed (which also generates ``bundled``)."""
    return tabulate(
        config.data,
        tokenizer,
        data_dir=config.data_dir,
        fields=config.fields,
        style=config.prompt_style,
        max_length=config.max_length,
        overlong=config.overlong,
        test_examples=config.test_examples,
        seed=seed,
        cache=cache_folder() / "tokens",
    )


def check_tokens(rows: TokenBatch, llama: LlamaConfig, folder: Path) -> None:
    """Refuses rows with a token beyond the model's vocabulary.

    Padding with such a token, as many a tokenizer has been given, is harmless: no loss depends on it.
    """
    inside = np.arange(rows.tokens.shape[1]) < lengths(rows)[:, None]
    check_ids(int(np.max(rows.tokens, where=inside, initial=0)), llama, folder)


def build(setup: RunContext) -> tuple[federated.Federated, Any]:
    """The run's ``(init, round)`` and the loss that its rounds take."""
    config, mesh = setup.config, setup.mesh
    at_once = max(1, TOKENS_AT_ONCE // (config.batch_size * setup.train.tokens.shape[1]))
    groups = 1 if mesh is None else mesh.shape[federated.CLIENTS]
    least = least_clients(setup.model.precision, config.batch_size)
    width = max(least, federated.block_width(-(-config.participants // groups), at_once))
    model = setup.model.clone(least_rows=least_rows(setup.model.precision, width))
    loss = pair_loss_of(model, setup.base) if config.algorithm == "fedmezo" else loss_of(unpaired(model), setup.base)
    return algorithm(config, width, mesh, least), bucketed_loss(loss, setup.widths)


def algorithm(
    config: RunConfig, block_size: int | None = None, mesh: Mesh | None = None, least_width: int = 1
) -> federated.Federated:
    """The run's ``(init, round)``; its server's half needs neither model nor data."""
    if config.algorithm == "fedmezo":
        settings = (config.perturbation_scale, config.directions, config.distribution, config.weight_decay)
        work = client.mezo_client(mezo.MezoConfig(*settings))
    else:
        work = client.sgd_client(local_optimizer(config))
    rates = personalization.RateConfig(config.learning_rate, config.personalize, config.personalize_scale)
    return federated.federated(
        work, rates, server_optimizer(config), block_size, config.directions_shared, mesh, least_width
    )


def local_optimizer(config: LocalConfig) -> Callable[[Any], optax.GradientTransformation]:
    """The optimizer of back-propagated local steps, made of a learning rate."""
    if config.local_optimizer == "adam":
        return partial(optax.adamw, weight_decay=config.weight_decay)
    return lambda rate: optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate))


def server_optimizer(config: ServerConfig) -> optax.GradientTransformation:
    """The server's, fed with the pseudo-gradient."""
    if config.server_optimizer == "adam":
        return optax.adam(config.server_learning_rate)
    return optax.sgd(config.server_learning_rate, 0.9 if config.server_optimizer == "momentum" else None)


def unpaired(model: Llama) -> Llama:
    """The model for losses at one θ: ``paired`` needs two."""
    return model.clone(precision="bfloat16") if model.precision == "paired" else model


def evaluator(setup: RunContext) -> Callable[[mezo.Params], float]:
    """``test_loss(lora)``: mean cross-entropy over the label tokens of all test examples, in nats."""
    model, count = unpaired(setup.model), len(setup.test.tokens)
    size = min(count, max(1, TOKENS_AT_ONCE // setup.test.tokens.shape[1]))
    fill = -count % size  # copies of the first row without weight, so that all batches have one shape

    def batched(leaf):
        filled = np.concatenate([leaf, np.repeat(leaf[:1], fill, axis=0)])
        return filled.reshape(-1, size, *leaf.shape[1:])

    weights = np.concatenate(
        [setup.test.label_weights, np.zeros_like(setup.test.label_weights[:1].repeat(fill, axis=0))]
    )
    rows = TokenBatch(*map(batched, setup.test))._replace(label_weights=weights.reshape(-1, size, weights.shape[1]))
    rows = jax.device_put(rows) if setup.mesh is None else sharding.replicate(setup.mesh, rows)

    return lambda lora: float(_mean_loss(model, setup.base, lora, rows))


@partial(jax.jit, static_argnums=0)
def _mean_loss(model: Llama, base: Base, lora: mezo.Params, rows: TokenBatch) -> jax.Array:
    sums = jax.lax.map(lambda batch: loss_sums(model, base, lora, batch), rows)
    total, labels = (jnp.sum(column) for column in sums)
    return total / labels


def base_loss(setup: RunContext) -> float:
    """The test loss before training, that of the base.

    Raises:
        UserError: it overflows.
    """
    loss = evaluator(setup)(setup.lora)
    name = f"--model {setup.config.model}"
    check_finite(math.isfinite(loss), "losses", setup.model.config, setup.base, {}, name)
    return loss
