"""A model as lm-evaluation-harness wants it, so that its tasks measure our models with their adapters.

What is asked of the model (which tokens a text becomes, where a context is cut, where a generated text ends) follows
the harness's backend ``hf``, so that the numbers compare. The module needs the extra ``eval``, and no PyTorch:

    results = lm_eval.simple_evaluate(HarnessModel(loaded), tasks=["hellaswag"])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import Progress

from fedmezo_jax.data.examples import Message, TokenBatch
from fedmezo_jax.data.prompts import templated
from fedmezo_jax.errors import UserError
from fedmezo_jax.evaluation.likelihood import label_scores
from fedmezo_jax.evaluation.loaded import LoadedModel
from fedmezo_jax.llama.generate import generate

TEXTS_AT_ONCE = 16
"""Prompts that are continued together."""
MOST_NEW_TOKENS = 256
"""Tokens of a generated text, where the task names no number."""
_LABELS_IN_ROW = 64
"""Continuations of one context share a row of the batch up to about so many labels."""
_GREEDY_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts of a context and its continuation, for the harness's cache alone, and the token ids of both."""


class HarnessModel(TemplateLM):
    """A loaded model with the harness's three questions: two kinds of likelihood, and generated texts."""

    def __init__(self, loaded: LoadedModel):
        """Takes a model, at any precision but ``paired``."""
        super().__init__()
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self.loaded.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text that has no context: the begin token, or the end token where there is none."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, in the names of the harness's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the token ids of a text, with the special tokens that the tokenizer is set to add.

        They are not added where ``add_special_tokens`` is False, or where it is None and the text starts with the
        begin token already, as those of chat templates do.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, in windows of the model's length that predict each token once."""
        texts = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for (text,) in (request.args for request in requests)
        ]
        scores = iter(self._loglikelihood_tokens([*chain(*texts)], disable_tqdm=disable_tqdm))
        return [sum(next(scores)[0] for _ in windows) for windows in texts]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns log p(continuation | context) of each request, and whether each of its tokens is the likeliest one.

        Requests that differ in their last token alone, as the letters of a multiple choice, share a row. A context
        that is too long loses its first tokens.
        """
        if not requests:
            return []
        limit = self.max_length
        inputs: list[list[int]] = []
        slots: list[list[tuple[int, int]]] = []  # of each row: positions and labels
        places = []  # of each request: its row, and its first and last slot there
        row_of: dict[tuple[int, ...], int] = {}
        for _, context, continuation in requests:
            if len(continuation) > limit:
                raise UserError(f"a task has a continuation of {len(continuation)} tokens; the model reads {limit}")
            read = (context + continuation)[-(limit + 1) :][:-1]
            row = row_of.get(tuple(read))
            if row is None or len(slots[row]) + len(continuation) > _LABELS_IN_ROW:
                row = row_of[tuple(read)] = len(inputs)
                inputs.append(read)
                slots.append([])
            first = len(slots[row])
            slots[row] += zip(range(len(read) - len(continuation), len(read)), continuation, strict=True)
            places.append((row, first, len(slots[row])))
        scores = label_scores(
            *self.loaded[:3], _rows(inputs, slots), self.loaded.name, None if disable_tqdm else "scoring"
        )
        return [
            (-float(scores.losses[row, first:last].sum()), bool(scores.is_best[row, first:last].all()))
            for row, first, last in places
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each text greedily up to its first stop sequence, which is left out.

        A text also ends with the end token of the model's config or of the tokenizer. Contexts of similar length share
        a batch; one that is too long loses its first tokens.

        Raises:
            UserError: a task asks for sampling, or for more new tokens than the model reads.
        """
        contexts, settings_of = zip(*(request.args for request in requests), strict=True)
        asked: dict[str, list[int]] = {}
        for i, settings in enumerate(settings_of):
            asked.setdefault(repr(settings), []).append(i)  # each set of settings has batches of its own
        prompts = [self.tok_encode(context) for context in contexts]
        texts = [""] * len(requests)
        with Progress(disable=disable_tqdm, transient=True) as progress:
            bar = progress.add_task("generating", total=len(requests))
            for group in asked.values():
                count, stops = self._settings(settings_of[group[0]])
                group = sorted(group, key=lambda i: len(prompts[i]))
                for start in range(0, len(group), TEXTS_AT_ONCE):
                    batch = group[start : start + TEXTS_AT_ONCE]
                    for i, text in zip(batch, self._texts([prompts[i] for i in batch], count, stops), strict=True):
                        texts[i] = text
                    progress.advance(bar, len(batch))
        return texts

    def _settings(self, given: dict[str, Any]) -> tuple[int, list[str]]:
        """The most new tokens and the stop sequences that a task asks for."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, MOST_NEW_TOKENS))
        if settings["do_sample"] or settings.keys() - _GREEDY_SETTINGS:
            raise UserError(f"a task asks for generation by {given}; texts are generated greedily alone")
        count = settings["max_gen_toks"]
        if count >= self.max_length:
            raise UserError(f"a task asks for {count} new tokens; the model reads {self.max_length} in all")
        end = self.tokenizer.decode(self.eot_token_id)
        return count, [*filter(None, settings["until"]), end]

    def _texts(self, prompts: list[list[int]], count: int, stops: list[str]) -> list[str]:
        def text_of(tokens: list[int]) -> str:
            return self.tokenizer.decode(tokens, skip_special_tokens=True)

        generated = generate(
            *self.loaded[:3],
            [prompt[-(self.max_length - count) :] for prompt in prompts],
            count,
            [*self.loaded.model.config.eos_token_id, self.eot_token_id],
            self.loaded.name,
            is_complete=lambda tokens: any(stop in text_of(tokens) for stop in stops),
        )
        return [reduce(lambda text, stop: text.partition(stop)[0], stops, text_of(tokens)) for tokens in generated]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the turns in the tokenizer's chat template.

        Where the template knows no system turn, those are left out. Without ``add_generation_prompt`` the last turn is
        one that the model goes on with.
        """
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]
        try:
            return templated(self.tokenizer, turns, ask=add_generation_prompt, unfinished=not add_generation_prompt)
        except UserError:
            without = [turn for turn in turns if turn.role != "system"]
            if len(without) == len(turns):
                raise
            return templated(self.tokenizer, without, ask=add_generation_prompt, unfinished=not add_generation_prompt)


def _rows(inputs: list[list[int]], slots: list[list[tuple[int, int]]]) -> TokenBatch:
    """The rows as one batch, padded with zeros."""
    tokens = np.zeros((len(inputs), max(map(len, inputs))), np.int32)
    positions, labels = np.zeros((2, len(inputs), max(1, *map(len, slots))), np.int32)
    weights = np.zeros(labels.shape, np.float32)
    for row, (read, own) in enumerate(zip(inputs, slots, strict=True)):
        tokens[row, : len(read)] = read
        positions[row, : len(own)], labels[row, : len(own)] = np.reshape(own, (-1, 2)).T
        weights[row, : len(own)] = 1
    return TokenBatch(tokens, positions, labels, weights)
