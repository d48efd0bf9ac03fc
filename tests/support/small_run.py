"""A run small enough for tests: a random LLaMA with its own tokenizer in a folder, and data of three categories."""

import json
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.prompts import prompt
from fedmezo_jax.llama.checkpoints.base_model import save_base
from fedmezo_jax.llama.checkpoints.layout import base_shapes
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.run.config import paper_config

WORDS = ("red", "green", "blue", "cat", "dog", "bird", "one", "two", "three", "sun", "moon", "star")


def examples():
    """Pairs of words in, for each of three categories a simple answer out."""
    pairs = [(first, second) for first in WORDS for second in WORDS if first < second]
    return [
        Example(f"{category} {first} {second}", "", answer, category)
        for first, second in pairs
        for category, answer in (("first", first), ("last", second), ("both", f"{second} {first}"))
    ]


def write_data(file, count=None):
    """The examples as JSON lines, in the field names of Alpaca."""
    names = ("instruction", "input", "output", "category")
    lines = [json.dumps(dict(zip(names, example, strict=True))) for example in examples()[:count]]
    file.write_text("\n".join(lines) + "\n")
    return file


def write_model(folder):
    """Random weights from a seed, large enough that the loss depends on every one; and a byte-pair tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator([prompt(example) + example.response for example in examples()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    draw = np.random.RandomState(0)
    shapes = base_shapes(config)
    base = jax.tree.map(
        lambda shape: (draw.standard_normal(shape) / shape[0 if len(shape) < 3 else 1] ** 0.5).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    for norm in (base["layers"]["input_layernorm"], base["layers"]["post_attention_layernorm"], base["norm"]):
        norm["scale"] = 1 + 0.1 * norm["scale"]
    save_base(folder, config, base, tokenizer=tokenizer)
    return folder


@contextmanager
def place(tmp_path_factory, name):
    """A folder with the model and the data, and a cache of its own."""
    folder = tmp_path_factory.mktemp(name)
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMEZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield folder


def configuration(folder, **changed):
    """A run of the paper's method on them, of a few rounds."""
    given = {
        **{"model": str(folder / "model"), "data": str(folder / "data.jsonl"), "clients": 3, "rounds": 4},
        **{"local_steps": 3, "max_length": 64, "test_examples": 10, "length_buckets": 1, "lora_rank": 2},
    }
    return paper_config(**given | changed)
