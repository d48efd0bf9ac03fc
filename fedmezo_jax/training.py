"""A whole run: model, data, partition and rounds put together, with checkpoints and metrics on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmezo_jax import client, federated, mezo, run_folder, server, wire
from fedmezo_jax.config import RunConfig
from fedmezo_jax.data.batches import round_batches
from fedmezo_jax.data.buckets import Widths, computed_tokens, lengths, narrowed, widths
from fedmezo_jax.data.examples import Rows
from fedmezo_jax.data.partition import heterogeneity
from fedmezo_jax.data.table import deal, tabulate
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.adapter import save_adapter
from fedmezo_jax.llama.checkpoint import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.loss import loss_of, loss_sums, pair_loss_of
from fedmezo_jax.llama.model import Base, Llama
from fedmezo_jax.llama.registry import cache_folder, load_tokenizer, resolve

TOKENS_AT_ONCE = 8192
"""Clients run at once so long as their batches hold no more tokens than this; further ones follow in blocks."""


class Setup(NamedTuple):
    """What a run works with, loaded and checked.

    Attributes:
        config: the run's.
        model: the decoder, with the run's α/r and precision.
        base: its frozen weights, on the device.
        lora: θ at the start.
        train: training rows.
        test: test rows.
        parts: for each client the indices of its rows in ``train``.
        categories: category of each training row, or what stands for it where the partition goes by something else.
        dropped: rows left out because they are longer than ``max_length``.
        cut: rows that lost their end for it.
        widths: at which steps run.
    """

    config: RunConfig
    model: Llama
    base: Base
    lora: mezo.Params
    train: Rows
    test: Rows
    parts: list[np.ndarray]
    categories: list[str]
    dropped: int
    cut: int
    widths: Widths

    @property
    def heterogeneity(self) -> float:
        """Mean total-variation distance between a client's categories and all rows' categories."""
        return heterogeneity(self.parts, self.categories)


def run_key(seed: int) -> jax.Array:
    """The run's key. The generator is named: under ``vmap`` some of JAX's others differ from a loop."""
    return jax.random.key(seed, impl="threefry2x32")


def prepare(config: RunConfig) -> Setup:
    """Loads model and data and deals the rows to clients.

    Raises:
        UserError: anything about model, data or partition that does not fit.
    """
    folder = resolve(config.model)
    llama = LlamaConfig.from_json(folder)
    if config.max_length > llama.max_position_embeddings:
        raise UserError(
            f"--max-length {config.max_length}: the model takes {llama.max_position_embeddings} tokens at most"
        )
    key = jax.random.fold_in(run_key(config.seed), federated.INIT)
    lora = init_lora(key, llama, config.lora_rank, config.target_names)

    tokenizer = load_tokenizer(folder)
    table = tabulate(
        config.data,
        tokenizer,
        data_dir=config.data_dir,
        fields=config.fields,
        style=config.prompt_style,
        max_length=config.max_length,
        long_rows=config.long_rows,
        test_rows=config.test_rows,
        seed=config.seed,
        cache=cache_folder() / "tokens",
    )
    check_tokens(table.rows, tokenizer, llama, folder)
    train, test = (Rows(*(leaf[picked] for leaf in table.rows)) for picked in (table.train, table.test))
    trained = [table.examples[i] for i in table.train]
    how = (config.clients, config.dirichlet_alpha, config.seed)
    parts, categories = deal(config.partition, trained, lengths(train), *how)

    stored = jnp.float32 if config.precision == "float32" else jnp.bfloat16
    base = jax.tree.map(jnp.asarray, load_base(folder, llama, stored))
    model = Llama(llama, config.lora_alpha / config.lora_rank, config.precision)
    among = widths(train, config.length_buckets)
    return Setup(config, model, base, lora, train, test, parts, categories, table.dropped, table.cut, among)


def check_tokens(rows: Rows, tokenizer: Any, llama: LlamaConfig, folder: Path) -> None:
    """Refuses tokens that the embedding has no row for, which a look-up would quietly take from its last row.

    A padding token beyond the vocabulary, as many a tokenizer has been given, is harmless: no loss depends on it.
    """
    largest = np.max(rows.tokens, where=rows.tokens != tokenizer.pad_token_id, initial=0)
    if largest >= llama.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer makes token {largest}, but the model's vocabulary has {llama.vocab_size}: "
            "give the tokenizer that belongs to the model"
        )


def build(setup: Setup) -> tuple[federated.Federated, Any]:
    """The run's ``(init, round)`` and the loss that its rounds take."""
    config = setup.config
    if config.algorithm == "fedmezo":
        settings = (config.perturbation_scale, config.directions, config.distribution, config.weight_decay)
        work, loss = client.mezo_work(mezo.MezoConfig(*settings)), pair_loss_of(setup.model, setup.base)
    else:
        work, loss = client.backprop_work(_local_optimizer(config)), loss_of(_single(setup.model), setup.base)
    loss = narrowed(loss, setup.widths)
    rates = server.RateConfig(config.learning_rate, config.personalize, config.personalize_scale)
    at_once = max(1, TOKENS_AT_ONCE // (config.batch_size * setup.train.tokens.shape[1]))
    return federated.federated(work, rates, _server_optimizer(config), min(at_once, config.participants)), loss


def _local_optimizer(config: RunConfig) -> Callable[[Any], optax.GradientTransformation]:
    if config.local_optimizer == "adam":
        return partial(optax.adamw, weight_decay=config.weight_decay)
    return lambda rate: optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate))


def _server_optimizer(config: RunConfig) -> optax.GradientTransformation:
    if config.server_optimizer == "adam":
        return optax.adam(config.server_learning_rate)
    return optax.sgd(config.server_learning_rate, 0.9 if config.server_optimizer == "momentum" else None)


def _single(model: Llama) -> Llama:
    """The model for losses at one θ: ``paired`` needs two."""
    return model.clone(precision="bfloat16") if model.precision == "paired" else model


def evaluator(setup: Setup) -> Callable[[mezo.Params], float]:
    """``test_loss(lora)``: mean cross-entropy over the label tokens of all test rows, in nats."""
    model, count = _single(setup.model), len(setup.test.tokens)
    size = min(count, max(1, TOKENS_AT_ONCE // setup.test.tokens.shape[1]))
    fill = -count % size  # copies of the first row without weight, so that all batches have one shape

    def batched(leaf):
        filled = np.concatenate([leaf, np.repeat(leaf[:1], fill, axis=0)])
        return jnp.asarray(filled.reshape(-1, size, *leaf.shape[1:]))

    weights = np.concatenate(
        [setup.test.label_weights, np.zeros_like(setup.test.label_weights[:1].repeat(fill, axis=0))]
    )
    rows = Rows(*map(batched, setup.test))._replace(
        label_weights=jnp.asarray(weights.reshape(-1, size, weights.shape[1]))
    )

    @jax.jit
    def mean(base, lora, rows):
        sums = jax.lax.map(lambda batch: loss_sums(model, base, lora, batch), rows)
        total, labels = (jnp.sum(column) for column in sums)
        return total / labels

    return lambda lora: float(mean(setup.base, lora, rows))


class Traffic(NamedTuple):
    """Bytes of one client in one round, counted from messages as they are serialised.

    Attributes:
        up: from client to server.
        down: from server to client.
    """

    up: int
    down: int


def lora_traffic(setup: Setup) -> Traffic:
    """The whole LoRA each way, as the run sends it."""
    size = len(wire.lora_message(jax.device_get(setup.lora)))
    return Traffic(size, size)


def seed_traffic(config: RunConfig) -> Traffic:
    """Seeds and coefficients instead: a client sends its own and gets those of all participants."""
    coefficients = np.zeros((config.local_steps, config.directions), np.float32)
    size = len(wire.seed_message(config.rounds - 1, config.clients - 1, coefficients))
    return Traffic(size, config.participants * size)


def forward_passes(config: RunConfig) -> int:
    """Forward passes of a round over all clients; a back-propagated step counts as two.

    With a frozen base the backward pass has as many products as the forward one: gradients of activations alone.
    """
    each = 2 * config.directions if config.algorithm == "fedmezo" else 2
    return config.participants * config.local_steps * each


class Result(NamedTuple):
    """A finished run.

    Attributes:
        lora: θ at the end.
        loss_before: test loss of the base model, in nats.
        loss_after: test loss at the end.
        metrics: one record a round, as in ``metrics.jsonl``.
    """

    lora: mezo.Params
    loss_before: float
    loss_after: float
    metrics: list[dict[str, Any]]


def train(
    setup: Setup,
    folder: Path,
    *,
    checkpoint_every: int,
    eval_every: int,
    on_round: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Result:
    """Runs all rounds that the folder's newest checkpoint has not seen yet and writes the adapter.

    Args:
        setup: from :func:`prepare`.
        folder: the run's, with its ``config.json`` written; gets metrics, checkpoints and ``adapter``.
        checkpoint_every: rounds between checkpoints; the last round always gets one.
        eval_every: rounds between measurements of the test loss; the last round always gets one.
        on_round: called with each round's record, those of earlier sessions first.
    """
    config = setup.config
    (init, round), loss = build(setup)
    step = jax.jit(round, donate_argnums=0)
    test_loss = evaluator(setup)
    sizes = np.array([len(part) for part in setup.parts], np.float32)
    key = run_key(config.seed)

    def cohort(t: int) -> tuple[federated.Cohort, int, int]:
        ids = server.sample_participants(config.seed, t, config.clients, config.participants)
        weights = sizes[ids] if config.weighting == "samples" else np.ones(len(ids), np.float32)
        settings = {"seed": config.seed, "local_steps": config.local_steps, "batch_size": config.batch_size}
        by_length = len(setup.widths) > 1
        batches = round_batches(setup.train, setup.parts, ids, t, **settings, by_length=by_length)
        return jax.device_put(federated.Cohort(ids, weights, batches)), *computed_tokens(batches, setup.widths)

    passes, traffic = forward_passes(config), lora_traffic(setup)
    loss_before = test_loss(setup.lora)
    with run_folder.checkpoints(folder) as manager:
        fresh = init(setup.lora, config.clients)
        state = run_folder.restore(manager, fresh) or fresh
        metrics = run_folder.keep_metrics(folder, int(state.round))
        for record in metrics:
            on_round(record)
        following = cohort(int(state.round))
        for t in range(int(state.round), config.rounds):
            start, (current, held, tokens) = time.perf_counter(), following
            state, report = step(state, loss, current, key)
            last = t + 1 == config.rounds
            following = following if last else cohort(t + 1)  # while the device works
            report = jax.device_get(report)
            seconds = time.perf_counter() - start
            record = {
                "round": t + 1,
                "train_loss": float(np.mean(report.losses)),
                "test_loss": test_loss(state.params) if last or (t + 1) % eval_every == 0 else None,
                "participants": current.ids.tolist(),
                "learning_rates": report.learning_rates.tolist(),
                "seconds": seconds,
                "forward_passes": passes,
                "tokens": passes * tokens // (config.participants * config.local_steps),
                "padding_share": 1 - held / tokens,
                "uplink_bytes": traffic.up * config.participants,
                "downlink_bytes": traffic.down * config.participants,
            }
            run_folder.append_metrics(folder, record)
            metrics.append(record)
            if last or (t + 1) % checkpoint_every == 0:
                run_folder.save(manager, state)
            on_round(record)

    lora = jax.device_get(state.params)
    settings = {"rank": config.lora_rank, "alpha": config.lora_alpha, "targets": config.target_names}
    save_adapter(folder / "adapter", lora, **settings, base_name=config.model)
    return Result(lora, loss_before, metrics[-1]["test_loss"], metrics)
