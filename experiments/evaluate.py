"""Evaluates a model, with or without an adapter: test loss and perplexity, GSM8K answers, multiple choice.

    python -m experiments.evaluate --adapter runs/fedmezo/adapter
    python -m experiments.evaluate --model smollm2-135m --data gsm8k --data-dir FOLDER --metric loss,gsm8k
    python -m experiments.evaluate --model smollm2-135m --data mmlu.jsonl --metric choice --test-examples 0

The examples are those that a run with the same data options, --max-length, --test-examples and --seed holds out.
--test-examples 0 takes all examples, for a file that is a test set.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from experiments import _cli
from fedmezo_jax.data.encode import encode
from fedmezo_jax.data.examples import Example, TokenBatch
from fedmezo_jax.data.partition import hold_out
from fedmezo_jax.data.prompts import prompt_ids
from fedmezo_jax.data.sources import load_records
from fedmezo_jax.errors import UserError
from fedmezo_jax.evaluation import choice, gsm8k, likelihood
from fedmezo_jax.llama.checkpoints.adapter import load_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.generate import generate
from fedmezo_jax.llama.model import Base, Llama, Lora
from fedmezo_jax.llama.registry import load_tokenizer, resolve
from fedmezo_jax.run.config_parts import DataConfig, ModelConfig
from fedmezo_jax.run.prepare import check_tokens, table_of

ROWS_AT_ONCE = 16
"""Prompts that are continued together."""
METRICS = ("loss", "gsm8k", "choice")


@dataclass(frozen=True)
class Config(DataConfig, ModelConfig):
    """Model, data and metrics."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """of the products with frozen weights"""
    test_examples: int = 64
    """examples to measure on, held out as in a run; 0 takes all"""
    adapter: Path | None = None
    """folder of a LoRA adapter, as PEFT or the main job writes it"""
    metric: str = "loss"
    """what to measure, of loss,gsm8k,choice: test loss and perplexity; exact match of generated answers; accuracy of
    the likeliest choice, whose --data has question, choices and answer, and on which --max-length has no effect"""
    max_new_tokens: int = 256
    """most tokens of a generated answer"""
    seed: int = 0
    """seed of the split, and of the bundled data"""
    out: Path = Path("runs/evaluate")
    """folder for config.json, results.json and, for gsm8k, generations.jsonl"""

    def __post_init__(self):
        """Checks the options."""
        super().__post_init__()
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f"--metric: unknown {', '.join(map(repr, unknown))}; choose from {','.join(METRICS)}")
        if self.test_examples < 0 or self.max_new_tokens < 1:
            raise UserError("--test-examples must be at least 0 and --max-new-tokens at least 1")

    @property
    def metrics(self) -> list[str]:
        """The names in ``metric``."""
        return [name.strip() for name in self.metric.split(",")]


class LoadedModel(NamedTuple):
    """The model to evaluate.

    Attributes:
        model: the decoder.
        base: its frozen weights.
        lora: the adapter, ``{}`` for none.
        tokenizer: its tokenizer.
        name: what error messages call the model.
    """

    model: Llama
    base: Base
    lora: Lora
    tokenizer: Any
    name: str


def main(config: Config) -> None:
    """Loads and evaluates the model, prints the table and writes the folder."""
    start = time.perf_counter()
    if (config.out / "metrics.jsonl").exists():
        raise UserError(f"--out {config.out} holds a run, whose results would be overwritten: give another folder")
    folder = resolve(config.model)
    llama, tokenizer = LlamaConfig.from_json(folder), load_tokenizer(folder)
    adapter = None if config.adapter is None else load_adapter(config.adapter, llama)
    scale, lora, trained = 1.0, {}, None
    if adapter is not None:
        scale, lora, trained = adapter.alpha / adapter.rank, adapter.lora, adapter.trained
    table = table_of(config, config.seed, tokenizer) if set(config.metrics) - {"choice"} else None
    if table:
        check_tokens(table.rows, llama, folder)
    questions = _questions(config) if "choice" in config.metrics else []
    candidates = _encoded(config, questions, tokenizer, llama) if questions else None
    if candidates:
        check_tokens(candidates, llama, folder)
    weight_dtype = jnp.float32 if config.precision == "float32" else jnp.bfloat16
    base = jax.tree.map(jnp.asarray, load_base(folder, llama, weight_dtype))
    model = Llama(llama, scale, config.precision, trained=trained)
    loaded = LoadedModel(model, base, lora, tokenizer, f"--model {config.model}")

    rows: list[dict[str, Any]] = []
    generations: list[dict[str, str]] = []

    def add(metric: str, value: float, count: int) -> None:
        rows.append({"metric": metric, "value": value, "count": count})

    if table and "loss" in config.metrics:
        test_batch = TokenBatch(*(leaf[table.test] for leaf in table.rows))
        test_loss = likelihood.mean_loss(*loaded[:3], test_batch, loaded.name)
        add("loss (nats/token)", test_loss.loss, len(table.test))
        add("perplexity", test_loss.perplexity, len(table.test))
    if table and "gsm8k" in config.metrics:
        examples = [example for i in table.test if isinstance(example := table.examples[i], Example)]
        if not examples:
            raise UserError("--metric gsm8k is for data with questions and answers, not for chats")
        prompts = prompt_ids(examples, tokenizer, config.prompt_style)
        solutions = generator(loaded, config.max_new_tokens)(prompts)
        score = gsm8k.score(solutions, [example.response for example in examples])
        add("gsm8k exact match", score.accuracy, score.count)
        add("gsm8k answers stated", score.stated, score.count)
        generations = [
            {"question": example.instruction, "generated": solution, "given": example.response}
            for example, solution in zip(examples, solutions, strict=True)
        ]
    if candidates:
        losses = likelihood.row_losses(*loaded[:3], candidates, loaded.name)
        add("choice accuracy", choice.accuracy(questions, losses), len(questions))
        add("choice by chance", float(np.mean([1 / len(question.choices) for question in questions])), len(questions))

    if generations:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in generations)
        (config.out / "generations.jsonl").write_text("".join(lines), encoding="utf-8")
    _cli.write_folder(config, rows, time.perf_counter() - start)
    _cli.print_table(f"{config.model}{f' with {config.adapter}' if adapter else ''} on {config.data}", rows)
    print(f"{config.out}: config.json, results.json{', generations.jsonl' if generations else ''}")


def generator(subject: LoadedModel, max_new_tokens: int) -> Callable[[list[list[int]]], list[str]]:
    """Returns ``generate(prompts)``, which returns the model's continuations; similar lengths share a batch."""

    def run(prompts: list[list[int]]) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [""] * len(prompts)
        for start in track(range(0, len(order), ROWS_AT_ONCE), "generating", transient=True):
            batch = order[start : start + ROWS_AT_ONCE]
            generated = generate(*subject[:3], [prompts[i] for i in batch], max_new_tokens, name=subject.name)
            for i, ids in zip(batch, generated, strict=True):
                texts[i] = subject.tokenizer.decode(ids, skip_special_tokens=True)
        return texts

    return run


def _questions(config: Config) -> list[choice.Question]:
    questions = [choice.question(record) for record in load_records(config.data, data_dir=config.data_dir)]
    if config.test_examples in range(1, len(questions)):
        picks = hold_out(
            len(questions), config.test_examples, config.seed, [question.category for question in questions]
        )[1]
        questions = [questions[i] for i in picks]
    return questions


def _encoded(config: Config, questions: list[choice.Question], tokenizer: Any, llama: LlamaConfig) -> TokenBatch:
    """One tokenised example per choice of each question."""
    examples = [example for question in questions for example in choice.candidates(question)]
    limit = llama.max_position_embeddings
    encoded = encode(examples, tokenizer, limit, style=config.prompt_style, source=f"--data {config.data}")
    if encoded.skipped:
        raise UserError(
            f"--data {config.data}: a question with its choices is longer than the model's {limit} tokens: leave it out"
        )
    return encoded.rows


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
