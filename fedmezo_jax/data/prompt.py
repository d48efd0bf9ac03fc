"""The Stanford Alpaca prompt, and tokenised rows of fixed shape from it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from fedmezo_jax.data.examples import Example, Rows
from fedmezo_jax.errors import UserError

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_MULTIPLE = 8


class Encoded(NamedTuple):
    """Tokenised examples.

    Attributes:
        rows: the rows that fit.
        kept: int64 [N], the index of each row's example, ascending.
        dropped: number of examples that are longer than allowed.
    """

    rows: Rows
    kept: np.ndarray
    dropped: int


def prompt(example: Example) -> str:
    """The text before the response; the input block is there only where the example has an input."""
    template = _WITH_INPUT if example.input else _WITHOUT_INPUT
    return template.format(instruction=example.instruction, input=example.input)


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int) -> Encoded:
    """Tokenises prompt, response and end token; the labels are the response and the end token.

    Prompt and response are tokenised apart and joined, so that the boundary between them lies between two tokens
    whatever the vocabulary would merge across it. The begin token leads where the tokenizer is set to add one. A row of
    more than `max_length` tokens is dropped and never cut: a row without labels would have no loss.

    Args:
        examples: the pairs, [n].
        tokenizer: a fast tokenizer with an end token.
        max_length: most tokens in a row.

    Returns:
        N <= n rows with S the longest row and M the largest number of labels, each rounded up to a multiple of 8
        (S at most to `max_length`), the examples they come from, and how many were dropped.

    Raises:
        UserError: the tokenizer has no end token, or no row fits.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer names no end token (eos_token), which must close every response")
    # Read off an empty text: the setting itself sits in a different place in each family of tokenizers.
    start = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    # One batched call each, not `datasets.map`: the tokenizer already works on all cores, and the table would be
    # written to Arrow and read back for nothing.
    prompts = _tokenise(tokenizer, [prompt(example) for example in examples])
    responses = _tokenise(tokenizer, [example.response for example in examples])
    pairs = [([*start, *before], [*after, end]) for before, after in zip(prompts, responses, strict=True)]
    lengths = np.array([len(before) + len(after) for before, after in pairs], np.int64)
    kept = np.flatnonzero(lengths <= max_length)
    if not len(kept):
        shortest = f"the shortest has {lengths.min()}" if len(lengths) else "there are no rows"
        raise UserError(f"no row fits into {max_length} tokens ({shortest}): raise --max-length")
    width = min(_round_up(lengths[kept].max()), max_length)
    labels_width = _round_up(max(len(pairs[i][1]) for i in kept))

    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = Rows(
        tokens=np.full((len(kept), width), padding, np.int32),
        label_positions=np.zeros((len(kept), labels_width), np.int32),
        labels=np.zeros((len(kept), labels_width), np.int32),
        label_weights=np.zeros((len(kept), labels_width), np.float32),
    )
    for row, i in enumerate(kept):
        before, after = pairs[i]
        rows.tokens[row, : lengths[i]] = before + after
        rows.labels[row, : len(after)] = after
        rows.label_positions[row, : len(after)] = np.arange(len(before) - 1, lengths[i] - 1)
        rows.label_weights[row, : len(after)] = 1
    return Encoded(rows, kept, len(examples) - len(kept))


def _tokenise(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: a text longer than the model's context is measured and dropped here, not worth a warning.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _round_up(length: int) -> int:
    return -(-int(length) // _MULTIPLE) * _MULTIPLE
