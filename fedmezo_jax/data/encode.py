"""Tokenised rows of fixed shape from examples, with the tokens kept from one run to the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from fedmezo_jax.data.examples import Chat, Example, Message, TokenBatch
from fedmezo_jax.data.prompts import (
    Style,
    as_chat,
    begin,
    check_template,
    prompt,
    render,
    response,
    text_ids,
    token_ids,
)
from fedmezo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Overlong: TypeAlias = Literal["skip", "truncate"]

_MULTIPLE = 8
_FORMAT = 1  # of the cached tokens: raise it when the same text is to give other tokens


class Encoded(NamedTuple):
    """Tokenised examples.

    Attributes:
        rows: the rows that are kept.
        kept: int64 [N], the index of each row's example, ascending.
        skipped: number of examples left out: too long or, where those are truncated, without a label left.
        truncated: number of rows that lost their end.
    """

    rows: TokenBatch
    kept: np.ndarray
    skipped: int
    truncated: int


def encode(
    examples: Sequence[Example] | Sequence[Chat],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    style: Style = "alpaca",
    overlong: Overlong = "skip",
    cache: Path | None = None,
    source: str = "the data",
) -> Encoded:
    """Tokenises examples; the labels are the response and the end token, or the assistant's turns of a chat.

    Prompt and response are tokenised apart and joined, so that the boundary between them lies between two tokens
    whatever the vocabulary would merge across it. The prompt's tokens are those of :func:`prompt.prompt_ids`, from
    which a response is generated. The begin token leads where the tokenizer is set to add one.

    The paper's code and TRL tokenise prompt and response as one text. That gives the same tokens with byte-level
    tokenizers, unless one merges across the boundary. With a tokenizer that puts a space before every text, as LLaMA 1
    and 2's do, the first label differs (``▁Paris`` here, ``Paris`` there), so losses do not compare with theirs.

    A chat is tokenised as one text in the tokenizer's chat template, and a token is a label if it begins in a turn of
    the assistant, whose end-of-turn mark counts; what follows the last label is left out.

    Args:
        examples: pairs or chats, [n]. Chats go through the chat template whatever the style.
        tokenizer: a fast tokenizer with an end token.
        max_length: most tokens in a row.
        style: how an instruction becomes a prompt.
        overlong: a row of more than `max_length` tokens is skipped, or truncated if a label is left.
        cache: folder in which the tokens are kept under a hash of all that decides them; None keeps them nowhere.
        source: what error messages call the examples.

    Returns:
        N <= n rows with S the longest row and M the largest number of labels, each rounded up to a multiple of 8
        (S at most to `max_length`), the examples they come from, and how many were skipped and truncated.

    Raises:
        UserError: the tokenizer has no end token, a chat does not fit its template, or no row fits.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer names no end token (eos_token), which must close every response")
    table = _tokens(examples, tokenizer, style, cache, source) if examples else []
    kept, tokens, labels, truncated, shortest = [], [], [], 0, None
    for i, (row, labelled) in enumerate(table):
        length = len(row)
        shortest = length if shortest is None else min(length, shortest)
        if length > max_length and overlong == "skip":
            continue
        places = labelled[: np.searchsorted(labelled, max_length)]
        if not len(places):
            continue
        truncated += length > max_length
        kept.append(i)
        tokens.append(row[: places[-1] + 1])
        labels.append(places)
    if shortest is not None and not kept and not any(len(places) for _, places in table):
        raise UserError(
            f"{source}: no row has anything to learn: every turn of the assistant opens its chat and answers nothing"
        )
    if not kept:
        reason = f"the shortest has {shortest}" if shortest else "there are no rows"
        raise UserError(f"{source}: no row fits into {max_length} tokens ({reason}): raise --max-length")

    width = min(_round_up(max(map(len, tokens))), max_length)
    labels_width = _round_up(max(map(len, labels)))
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = TokenBatch(
        tokens=np.full((len(kept), width), padding, np.int32),
        label_positions=np.zeros((len(kept), labels_width), np.int32),
        labels=np.zeros((len(kept), labels_width), np.int32),
        label_weights=np.zeros((len(kept), labels_width), np.float32),
    )
    for i, (row, places) in enumerate(zip(tokens, labels, strict=True)):
        rows.tokens[i, : len(row)] = row
        rows.labels[i, : len(places)] = row[places]
        rows.label_positions[i, : len(places)] = places - 1
        rows.label_weights[i, : len(places)] = 1
    return Encoded(rows, np.array(kept, np.int64), len(examples) - len(kept), int(truncated))


def _tokens(
    examples: Sequence[Example] | Sequence[Chat],
    tokenizer: PreTrainedTokenizerFast,
    style: Style,
    cache: Path | None,
    source: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens of each example and the places of its labels among them, from the cache where it has them."""
    from datasets import Dataset, Features, List, Value, disable_progress_bars  # takes a second to import
    from pyarrow import ArrowException

    disable_progress_bars()
    in_chat = style == "chat" or isinstance(examples[0], Chat)
    if in_chat:
        check_template(tokenizer)
    chats = [as_chat(row) if isinstance(row, Example) else row for row in examples] if in_chat else []
    # As JSON, one column holds both kinds of example.
    pairs = [(prompt(row, style), response(row, style)) for row in examples if isinstance(row, Example)]
    texts = [json.dumps(row) for row in (chats or pairs)]
    work = _tokenise_chats if in_chat else _tokenise_pairs
    key = _digest(texts, tokenizer, in_chat)
    file = _cache_file(cache, key)

    def tokenised(from_cache: bool) -> Dataset:
        return Dataset.from_dict({"text": texts}).map(
            work,
            batched=True,
            with_indices=True,
            remove_columns="text",
            features=Features({name: List(Value("int32")) for name in ("tokens", "labelled")}),
            fn_kwargs={"tokenizer": tokenizer, "source": source},
            new_fingerprint=key[:32],
            keep_in_memory=file is None,
            cache_file_name=file,
            load_from_cache_file=from_cache,
        )

    try:
        table = tokenised(from_cache=file is not None)
    except (ArrowException, ValueError):  # a damaged file, or one of other columns: made anew
        table = tokenised(from_cache=False)
    return list(zip(_lists(table, "tokens"), _lists(table, "labelled"), strict=True))


def _lists(table: Any, name: str) -> list[np.ndarray]:
    """A column of lists as one array a row, without a Python object for each number."""
    column = table.data.column(name).combine_chunks()
    return np.split(column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())[:-1])


def _tokenise_pairs(batch: dict[str, list[str]], indices: list[int], tokenizer: Any, source: str) -> dict[str, list]:
    del indices, source
    before, after = zip(*map(json.loads, batch["text"]), strict=True)
    tokens, labelled = [], []
    for asked, answered in zip(text_ids(before, tokenizer), token_ids(after, tokenizer), strict=True):
        tokens.append([*asked, *answered, tokenizer.eos_token_id])
        labelled.append(list(range(len(asked), len(tokens[-1]))))
    return {"tokens": tokens, "labelled": labelled}


def _tokenise_chats(batch: dict[str, list[str]], indices: list[int], tokenizer: Any, source: str) -> dict[str, list]:
    rendered = []
    for index, text in zip(indices, batch["text"], strict=True):
        messages, category = json.loads(text)
        try:
            rendered.append(render(Chat(tuple(Message(*turn) for turn in messages), category), tokenizer))
        except UserError as error:
            raise UserError(f"{source}: chat {index} (counted from 0): {error}") from None
    found = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    tokens, labelled = [], []
    for (_, spans), row, offsets in zip(rendered, found["input_ids"], found["offset_mapping"], strict=True):
        starts = np.array([start for start, _ in offsets], np.int64)
        inside = np.zeros(len(row), bool)
        for start, end in spans:
            inside |= (starts >= start) & (starts < end)
        places = np.flatnonzero(inside[1:]) + 1  # nothing stands before the first token to predict it
        tokens.append(row[: places[-1] + 1] if len(places) else row)
        labelled.append(places.tolist())
    return {"tokens": tokens, "labelled": labelled}


def _digest(texts: Sequence[str], tokenizer: Any, in_chat: bool) -> str:
    """sha256 of all that decides the tokens: the texts, the whole tokenizer, and its template where it is used."""
    digest = hashlib.sha256()
    template = [tokenizer.chat_template, tokenizer.special_tokens_map] if in_chat else None
    decides = [_FORMAT, tokenizer.backend_tokenizer.to_str(), begin(tokenizer), tokenizer.eos_token_id, template]
    for part in (json.dumps(decides, sort_keys=True), *texts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.encode())
    return digest.hexdigest()


def _cache_file(cache: Path | None, key: str) -> str | None:
    if cache is None:
        return None
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home to write to: then the work is done anew
        return None
    return str(cache / f"{key}.arrow")


def _round_up(length: int) -> int:
    return -(-int(length) // _MULTIPLE) * _MULTIPLE
