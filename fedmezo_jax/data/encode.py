"""Tokenises examples into arrays of fixed shape, and caches the tokens between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
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
_LISTS = ("tokens", "labelled")  # columns of the cached tokens; a third one, "padding", repeats a single number
_FORMAT = 2  # of the cached tokens: raise it when the same text must give other tokens


class Encoded(NamedTuple):
    """Tokenised examples.

    Attributes:
        rows: the tokenised examples that were kept.
        kept: int64 [N], the index of each kept example, ascending.
        skipped: number of examples left out: too long, or without a label left after truncation.
        truncated: number of examples that lost their end.
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

    Prompt and response are tokenised separately and joined, so no token crosses the boundary between them. The prompt's
    tokens are those of :func:`prompts.prompt_ids`, from which a response is generated. The begin token comes first if
    the tokenizer is set to add one.

    The paper's code and TRL tokenise prompt and response as one text. That gives the same tokens with byte-level
    tokenizers, unless one merges across the boundary. With a tokenizer that puts a space before every text, as LLaMA 1
    and 2's do, the first label differs (``▁Paris`` here, ``Paris`` there), so losses do not compare with theirs.

    A chat is tokenised as one text in the tokenizer's chat template. A token is a label if it begins in a turn of the
    assistant, including the end-of-turn mark. Tokens after the last label are left out.

    Args:
        examples: pairs or chats, [n]. Chats go through the chat template whatever the style.
        tokenizer: a fast tokenizer with an end token.
        max_length: most tokens in an example.
        style: how an instruction becomes a prompt.
        overlong: an example of more than ``max_length`` tokens is skipped, or truncated if a label is left.
        cache: folder for the tokens, under a hash of everything that determines them; None caches nothing.
        source: what error messages call the examples.

    Returns:
        N <= n tokenised examples, with S the longest one and M the largest number of labels, each rounded up to a
        multiple of 8 (S at most to ``max_length``); the indices of the examples kept; how many were skipped and
        truncated.

    Raises:
        UserError: the tokenizer has no end token, a chat does not fit its template, or no example fits.
    """
    tokenised, padding = _tokens(examples, tokenizer, style, cache, source) if examples else ([], 0)
    kept_indices, token_rows, place_rows, truncated, shortest = [], [], [], 0, None
    for i, (ids, labelled) in enumerate(tokenised):
        length = len(ids)
        shortest = length if shortest is None else min(length, shortest)
        if length > max_length and overlong == "skip":
            continue
        label_places = labelled[: np.searchsorted(labelled, max_length)]
        if not len(label_places):
            continue
        truncated += length > max_length
        kept_indices.append(i)
        token_rows.append(ids[: label_places[-1] + 1])
        place_rows.append(label_places)
    if shortest is not None and not kept_indices and not any(len(label_places) for _, label_places in tokenised):
        raise UserError(
            f"{source}: no row has anything to learn: every turn of the assistant opens its chat and answers nothing"
        )
    if not kept_indices:
        reason = f"the shortest has {shortest}" if shortest else "there are no rows"
        raise UserError(f"{source}: no row fits into {max_length} tokens ({reason}): raise --max-length")

    row_width = min(_round_up(max(map(len, token_rows))), max_length)
    labels_width = _round_up(max(map(len, place_rows)))
    rows = TokenBatch(
        tokens=np.full((len(kept_indices), row_width), padding, np.int32),
        label_positions=np.zeros((len(kept_indices), labels_width), np.int32),
        labels=np.zeros((len(kept_indices), labels_width), np.int32),
        label_weights=np.zeros((len(kept_indices), labels_width), np.float32),
    )
    for i, (ids, label_places) in enumerate(zip(token_rows, place_rows, strict=True)):
        rows.tokens[i, : len(ids)] = ids
        rows.labels[i, : len(label_places)] = ids[label_places]
        rows.label_positions[i, : len(label_places)] = label_places - 1
        rows.label_weights[i, : len(label_places)] = 1
    return Encoded(rows, np.array(kept_indices, np.int64), len(examples) - len(kept_indices), int(truncated))


def _tokens(
    examples: Sequence[Example] | Sequence[Chat],
    tokenizer: PreTrainedTokenizerFast,
    style: Style,
    cache: Path | None,
    source: str,
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """The token ids of each example and the positions of its labels in them, and the padding; cached ones if possible.

    The package ``datasets`` keeps the cache. Where it is not installed, the examples are tokenised each time.
    """
    in_chat = style == "chat" or isinstance(examples[0], Chat)
    chats = [as_chat(row) if isinstance(row, Example) else row for row in examples] if in_chat else []
    # As JSON, one column holds both kinds of example.
    pairs = [(prompt(row, style), response(row, style)) for row in examples if isinstance(row, Example)]
    texts = [json.dumps(row) for row in (chats or pairs)]
    key = _digest(texts, tokenizer, in_chat)
    file = None if find_spec("datasets") is None else _cache_file(cache, key)
    table = None if file is None else _kept(file, len(texts))
    if table is None:
        padding = _padding(tokenizer)
        if in_chat:
            check_template(tokenizer)
        tokenise = partial(_tokenise_chats if in_chat else _tokenise_pairs, tokenizer=tokenizer, source=source)
        if file is None:
            columns = tokenise(texts, range(len(texts)))
            rows = zip(*(columns[name] for name in _LISTS), strict=True)
            return [(np.array(tokens, np.int32), np.array(labelled, np.int32)) for tokens, labelled in rows], padding

        from datasets import Dataset, Features, List, Value, disable_progress_bars  # takes a second to import

        disable_progress_bars()
        table = Dataset.from_dict({"text": texts}).map(
            lambda texts, indices: tokenise(texts, indices) | {"padding": [padding] * len(texts)},
            batched=True,
            with_indices=True,
            input_columns="text",
            remove_columns="text",
            features=Features({name: List(Value("int32")) for name in _LISTS} | {"padding": Value("int32")}),
            new_fingerprint=key[:32],
            cache_file_name=file,
            load_from_cache_file=False,
        )
        table = table.data
    return list(zip(*(_lists(table.column(name)) for name in _LISTS), strict=True)), table.column("padding")[0].as_py()


def _padding(tokenizer: Any) -> int:
    """The token that fills rows up.

    Raises:
        UserError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end token (eos_token), which must close every response")
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _kept(file: str, rows: int) -> Any:
    """The Arrow table of a file of the cache; None where there is none, or a damaged one, or one with other columns."""
    import pyarrow

    columns = [*((name, pyarrow.list_(pyarrow.int32())) for name in _LISTS), ("padding", pyarrow.int32())]
    try:
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all()
    except (OSError, pyarrow.ArrowException):
        return None
    return table if table.schema.equals(pyarrow.schema(columns)) and len(table) == rows else None


def _lists(column: Any) -> list[np.ndarray]:
    """A column of lists as one array per row, without a Python object for each number (and without pandas)."""
    lists = column.combine_chunks()
    values, edges = np.from_dlpack(lists.values), np.from_dlpack(lists.offsets)
    return np.split(values[edges[0] : edges[-1]], edges[1:-1] - edges[0])


def _tokenise_pairs(texts: Sequence[str], indices: Sequence[int], tokenizer: Any, source: str) -> dict[str, list]:
    del indices, source
    prompts, responses = zip(*map(json.loads, texts), strict=True)
    tokens, labelled = [], []
    for prompt_ids, response_ids in zip(text_ids(prompts, tokenizer), token_ids(responses, tokenizer), strict=True):
        tokens.append([*prompt_ids, *response_ids, tokenizer.eos_token_id])
        labelled.append(list(range(len(prompt_ids), len(tokens[-1]))))
    return {"tokens": tokens, "labelled": labelled}


def _tokenise_chats(texts: Sequence[str], indices: Sequence[int], tokenizer: Any, source: str) -> dict[str, list]:
    rendered = []
    for index, text in zip(indices, texts, strict=True):
        messages, category = json.loads(text)
        try:
            rendered.append(render(Chat(tuple(Message(*turn) for turn in messages), category), tokenizer))
        except UserError as error:
            raise UserError(f"{source}: chat {index} (counted from 0): {error}") from None
    encoding = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    tokens, labelled = [], []
    for (_, spans), ids, offsets in zip(rendered, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        starts = np.array([start for start, _ in offsets], np.int64)
        is_label = np.zeros(len(ids), bool)
        for start, end in spans:
            is_label |= (starts >= start) & (starts < end)
        label_places = np.flatnonzero(is_label[1:]) + 1  # the first token has no predecessor to predict it
        tokens.append(ids[: label_places[-1] + 1] if len(label_places) else ids)
        labelled.append(label_places.tolist())
    return {"tokens": tokens, "labelled": labelled}


def _digest(texts: Sequence[str], tokenizer: Any, in_chat: bool) -> str:
    """sha256 of everything that determines the tokens: texts, tokenizer, and chat template where it is used.

    A tokenizer that is not opened yet brings a ``cache_key`` of its own.
    """
    digest = hashlib.sha256()
    if own_key := getattr(tokenizer, "cache_key", None):
        settings = [_FORMAT, own_key, in_chat]
    else:
        template = [tokenizer.chat_template, tokenizer.special_tokens_map] if in_chat else None
        settings = [_FORMAT, tokenizer.backend_tokenizer.to_str(), begin(tokenizer), tokenizer.eos_token_id, template]
        settings.append(tokenizer.pad_token_id)
    for part in (json.dumps(settings, sort_keys=True), *texts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.encode())
    return digest.hexdigest()


def _cache_file(cache: Path | None, key: str) -> str | None:
    if cache is None:
        return None
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # the folder cannot be written: tokenise without a cache
        return None
    return str(cache / f"{key}.arrow")


def _round_up(length: int) -> int:
    return -(-int(length) // _MULTIPLE) * _MULTIPLE
