"""Pretrains the shipped ``tiny`` LLaMA and its tokenizer on generated text, from scratch.

    python -m experiments.studies.pretrain --out fedmezo_jax/llama/tiny

The text (``data.synthetic.pretraining``) has the tasks of the ``bundled`` data and others, answered in many styles.
``bundled`` uses one that is rare here, so fine-tuning has something to learn.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedmezo_jax.data.encode import encode
from fedmezo_jax.data.examples import Example, TokenBatch
from fedmezo_jax.data.prompts import prompt
from fedmezo_jax.data.synthetic.pretraining import pretraining
from fedmezo_jax.llama.checkpoints.base_model import save_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.loss import loss_sums
from fedmezo_jax.llama.model import Base, Llama

END = "<|end|>"


@dataclass(frozen=True)
class Config:
    """Pretraining of the tiny model; the defaults make the shipped one."""

    out: Path
    """folder to write: config.json, model.safetensors, tokenizer.json"""
    seed: int = 0
    examples: int = 60_000
    steps: int = 600
    batch_size: int = 48
    learning_rate: float = 3e-3
    vocabulary: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 5
    heads: int = 4
    key_value_heads: int = 2
    value_gain: float = 5.0
    """factor by which changes of the values move the finished model's output, see ``stretch_values``"""


def make_tokenizer(examples: list[Example], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of ``vocabulary`` entries, with single digits and one special token as the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((f"{prompt(e)}{e.response}" for e in examples), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def whole_text(rows: TokenBatch) -> TokenBatch:
    """Returns the examples with every token as a label: training from scratch learns from prompts too."""
    end = jnp.max(rows.label_positions, axis=1, keepdims=True)  # the last label's position
    positions = np.broadcast_to(np.arange(rows.tokens.shape[1] - 1, dtype=np.int32), rows.tokens[:, 1:].shape)
    weights = (positions <= np.asarray(end)).astype(np.float32)
    return TokenBatch(rows.tokens, positions, rows.tokens[:, 1:], weights)


def stretch_values(base: Base, gain: float) -> Base:
    """Returns the same function with v_proj divided by ``gain`` and o_proj multiplied by it.

    A LoRA on v_proj then moves the output ``gain`` times as far. Without this, such a small model would need far too
    many steps for a first run (20 rounds lower the test loss by 1 % without it, and by 14 % with it).
    """
    attention = dict(base["layers"]["self_attn"])
    attention["v_proj"] = {"kernel": attention["v_proj"]["kernel"] / gain}
    attention["o_proj"] = {"kernel": attention["o_proj"]["kernel"] * gain}
    return base | {"layers": base["layers"] | {"self_attn": attention}}


def main(config: Config) -> None:
    """Generates the text, trains tokenizer and model, and writes the folder."""
    held_out = 512
    examples = pretraining(config.seed, config.examples)
    tokenizer = make_tokenizer(examples, config.vocabulary)
    rows = encode(examples, tokenizer, 160).rows
    rows = whole_text(rows)
    test, train = (jax.tree.map(lambda leaf, s=s: leaf[s], rows) for s in (slice(held_out), slice(held_out, None)))
    print(f"{len(train.tokens)} examples of {train.tokens.shape[1]} tokens, vocabulary {len(tokenizer)}")

    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=(tokenizer.get_vocab()[END],),
    )
    model = Llama(llama)
    base = model.init(jax.random.key(config.seed, impl="threefry2x32"), jnp.zeros((1, 8), jnp.int32), {})["params"]
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(base)):,} parameters")

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 20, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))

    def loss(base, batch: TokenBatch):
        total, count = loss_sums(model, base, {}, batch)
        return total / count

    @jax.jit
    def step(base, state, batch):
        value, gradient = jax.value_and_grad(loss)(base, batch)
        updates, state = optimizer.update(gradient, state, base)
        return optax.apply_updates(base, updates), state, value

    evaluate = jax.jit(loss)
    state = optimizer.init(base)
    generator = np.random.default_rng(config.seed)
    for i in track(range(config.steps), "pretraining"):
        picked = generator.choice(len(train.tokens), config.batch_size, replace=False)
        base, state, value = step(base, state, jax.tree.map(lambda leaf, p=picked: leaf[p], train))
        if i % 100 == 0 or i == config.steps - 1:
            print(f"step {i}: loss {value:.4f}, held out {evaluate(base, test):.4f}", flush=True)
    save_base(config.out, llama, stretch_values(dict(base), config.value_gain), dtype="float16", tokenizer=tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
