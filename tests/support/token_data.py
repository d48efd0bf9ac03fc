"""Tokenised rows of given lengths, and a small byte-pair tokenizer."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.data.prompts import prompt
from fedmezo_jax.data.synthetic.bundled import bundled


def table(given, seed=0, vocabulary=50):
    """Rows of the given lengths, about a third of each labels, of random tokens."""
    draw = np.random.default_rng(seed)
    width, most = -(-max(given) // 8) * 8, -(-max(given) // 24) * 8
    rows = TokenBatch(
        np.zeros((len(given), width), np.int32),
        *(np.zeros((len(given), most), kind) for kind in (np.int32, np.int32, np.float32)),
    )
    for i, length in enumerate(given):
        count = max(1, length // 3)
        rows.tokens[i, :length] = draw.integers(1, vocabulary, length)
        places = np.arange(length - count, length)
        rows.label_positions[i, :count] = places - 1
        rows.labels[i, :count] = rows.tokens[i, places]
        rows.label_weights[i, :count] = 1
    return rows


def make_tokenizer(begin=False, **tokens):
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([prompt(example) + example.response for example in bundled(0, 200)], trainer)
    if begin:
        model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=model, **{"bos_token": "<s>", "eos_token": "</s>", **tokens})
