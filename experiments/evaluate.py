"""Evaluates a model, with or without an adapter: test loss, generated answers, multiple choice, lm-evaluation-harness.

    python -m experiments.evaluate --adapter runs/fedmezo/adapter
    python -m experiments.evaluate --model smollm2-135m --data gsm8k --data-dir FOLDER --metric loss,gsm8k
    python -m experiments.evaluate --model smollm2-135m --data mmlu.jsonl --metric choice --test-examples 0
    python -m experiments.evaluate --model smollm2-135m --tasks hellaswag,mmlu,gsm8k --task-data FOLDER

The examples are those that a run with the same data options, --max-length, --test-examples and --seed holds out.
--test-examples 0 takes all examples, for a file that is a test set.

--tasks names tasks of lm-evaluation-harness (extra eval). Their data sets lie in FOLDER/owner/name as on the hub, such
as FOLDER/openai/gsm8k; FOLDER/tasks may hold YAML files of further tasks. Nothing is fetched without --allow-download.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.progress import track

from experiments import _cli
from fedmezo_jax.data.encode import encode
from fedmezo_jax.data.examples import Example, TokenBatch
from fedmezo_jax.data.partition import hold_out
from fedmezo_jax.data.prompts import prompt_ids, text_ids
from fedmezo_jax.data.sources import load_records
from fedmezo_jax.errors import UserError
from fedmezo_jax.evaluation import choice, gsm8k, humaneval, likelihood, text
from fedmezo_jax.evaluation.loaded import LoadedModel
from fedmezo_jax.llama.checkpoints.adapter import load_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.generate import generate
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.quantised import held_as
from fedmezo_jax.llama.registry import load_tokenizer, resolve
from fedmezo_jax.run.config_parts import DataConfig, ModelConfig
from fedmezo_jax.run.prepare import check_tokens, table_of

ROWS_AT_ONCE = 16
"""Prompts that are continued together."""
METRICS = ("loss", "gsm8k", "text", "choice", "humaneval")
WITHOUT_TABLE = {"choice", "humaneval"}
"""Metrics that do not take --data as examples to train on."""


@dataclass(frozen=True)
class Config(DataConfig, ModelConfig):
    """Model, data and metrics."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """of the products with frozen weights"""
    test_examples: int = 64
    """examples to measure on, held out as in a run; 0 takes all"""
    adapter: Path | None = None
    """folder of a LoRA adapter, as PEFT or the main job writes it"""
    metric: str | None = None
    """what to measure, of loss,gsm8k,text,choice,humaneval: test loss and perplexity; exact match of generated answers
    that are numbers; exact match and likeness of generated texts; accuracy of the likeliest choice, whose --data has
    question, choices and answer, and on which --max-length has no effect; share of HumanEval's problems whose tests the
    generated code passes (extra eval). The default is loss, or nothing beside --tasks"""
    allow_code_execution: tyro.conf.FlagCreatePairsOff[bool] = False
    """run the code that the model writes for humaneval, in processes with limits that are no sandbox"""
    tasks: str = ""
    """tasks or groups of lm-evaluation-harness, such as hellaswag,mmlu,gsm8k; each takes all its examples"""
    task_data: Path | None = None
    """folder with the data sets of --tasks in owner/name, and with YAML files of further tasks in tasks"""
    allow_download: tyro.conf.FlagCreatePairsOff[bool] = False
    """fetch data sets of --tasks that are not in --task-data from the Hugging Face hub"""
    num_fewshot: int | None = None
    """solved examples before each question of --tasks; by default the number that the task names, or none"""
    task_limit: int = 0
    """examples of each of --tasks; 0 takes all"""
    chat_template: tyro.conf.FlagCreatePairsOff[bool] = False
    """put the questions of --tasks into the tokenizer's chat template"""
    max_new_tokens: int = 256
    """most tokens of a generated answer"""
    seed: int = 0
    """seed of the split, and of the bundled data"""
    out: Path = Path("runs/evaluate")
    """folder for config.json, results.json and, where texts are generated, generations.jsonl"""

    def __post_init__(self):
        """Checks the options."""
        super().__post_init__()
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f"--metric: unknown {', '.join(map(repr, unknown))}; choose from {','.join(METRICS)}")
        if not self.metrics and not _names(self.tasks):
            raise UserError(f"there is nothing to measure: name --tasks, or give --metric some of {','.join(METRICS)}")
        if "humaneval" in self.metrics and not self.allow_code_execution:
            raise UserError("--metric humaneval runs code that the model writes: add --allow-code-execution")
        if self.test_examples < 0 or self.max_new_tokens < 1:
            raise UserError("--test-examples must be at least 0 and --max-new-tokens at least 1")
        if self.task_limit < 0 or (self.num_fewshot is not None and self.num_fewshot < 0):
            raise UserError("--task-limit and --num-fewshot must be at least 0")

    @property
    def metrics(self) -> list[str]:
        """The names in ``metric``."""
        return _names(("" if self.tasks else "loss") if self.metric is None else self.metric)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


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
    table = table_of(config, config.seed, tokenizer) if set(config.metrics) - WITHOUT_TABLE else None
    if table:
        check_tokens(table.rows, llama, folder)
    questions = _questions(config) if "choice" in config.metrics else []
    candidates = _encoded(config, questions, tokenizer, llama) if questions else None
    if candidates:
        check_tokens(candidates, llama, folder)
    problems = humaneval.problems() if "humaneval" in config.metrics else []
    if config.test_examples:
        problems = problems[: config.test_examples]
    harness = _harness(config) if config.tasks else None
    base = load_base(folder, llama, *held_as(config))
    model = Llama(llama, scale, config.precision, eight_bit=config.eight_bit_products, trained=trained)
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
    if table and (named := [name for name in ("gsm8k", "text") if name in config.metrics]):
        examples = [example for i in table.test if isinstance(example := table.examples[i], Example)]
        if not examples:
            raise UserError(f"--metric {named[0]} is for data with questions and answers, not for chats")
        prompts = prompt_ids(examples, tokenizer, config.prompt_style)
        answers, given = generator(loaded, config.max_new_tokens)(prompts), [example.response for example in examples]
        if "gsm8k" in named:
            score = gsm8k.score(answers, given)
            add("gsm8k exact match", score.accuracy, score.count)
            add("gsm8k answers stated", score.stated, score.count)
        if "text" in named:
            likeness = text.score(answers, given)
            add("text exact match", likeness.exact, likeness.count)
            add("text similarity", likeness.similarity, likeness.count)
            add("text first word", likeness.first_word, likeness.count)
        generations = [
            {"question": example.instruction, "generated": answer, "given": example.response}
            for example, answer in zip(examples, answers, strict=True)
        ]
    if candidates:
        losses = likelihood.row_losses(*loaded[:3], candidates, loaded.name)
        add("choice accuracy", choice.accuracy(questions, losses), len(questions))
        add("choice by chance", float(np.mean([1 / len(question.choices) for question in questions])), len(questions))

    if problems:
        texts = generator(loaded, config.max_new_tokens, humaneval.STOPS)(
            text_ids([problem.prompt for problem in problems], tokenizer)
        )
        completions = [humaneval.cut(text) for text in texts]
        results = humaneval.run(problems, completions)
        add("humaneval pass@1", results.count("passed") / len(results), len(results))
        generations += [
            {"question": problem.prompt, "generated": completion, "given": problem.canonical_solution, "result": result}
            for problem, completion, result in zip(problems, completions, results, strict=True)
        ]

    scores = harness(loaded) if harness else None
    if scores:
        generations += scores.generations

    if generations:
        config.out.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in generations)
        (config.out / "generations.jsonl").write_text("".join(lines), encoding="utf-8")
    _cli.write_folder(config, [*rows, *(scores.rows if scores else [])], time.perf_counter() - start)
    subject = f"{config.model}{f' with {config.adapter}' if adapter else ''}"
    if rows:
        _cli.print_table(f"{subject} on {config.data}", rows)
    if scores:
        _cli.print_table(f"{subject} by lm-evaluation-harness", scores.rows)
    print(f"{config.out}: config.json, results.json{', generations.jsonl' if generations else ''}")


def _harness(config: Config) -> Callable[[LoadedModel], Any]:
    """Loads the tasks, and returns what measures a model on them."""
    try:
        from fedmezo_jax.evaluation import harness_tasks
        from fedmezo_jax.evaluation.lm_eval import HarnessModel
    except ModuleNotFoundError as error:
        raise UserError(f"--tasks needs {error.name}: pip install 'fedmezo_jax[eval]'") from None
    tasks = harness_tasks.load_tasks(_names(config.tasks), config.task_data, config.allow_download)

    def measure(subject: LoadedModel) -> harness_tasks.TaskScores:
        settings = (config.num_fewshot, config.task_limit, config.chat_template)
        return harness_tasks.measure(HarnessModel(subject), tasks, *settings)

    return measure


def generator(
    subject: LoadedModel, max_new_tokens: int, stops: Sequence[str] = ()
) -> Callable[[list[list[int]]], list[str]]:
    """Returns ``generate(prompts)``, which returns the model's continuations; similar lengths share a batch.

    A continuation may end, somewhere after it, where it contains one of ``stops``.
    """

    def text_of(ids: list[int]) -> str:
        return subject.tokenizer.decode(ids, skip_special_tokens=True)

    def is_complete(ids: list[int]) -> bool:
        text = text_of(ids)
        return any(stop in text for stop in stops)

    def run(prompts: list[list[int]]) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [""] * len(prompts)
        for start in track(range(0, len(order), ROWS_AT_ONCE), "generating", transient=True):
            batch = order[start : start + ROWS_AT_ONCE]
            generated = generate(
                *subject[:3],
                [prompts[i] for i in batch],
                max_new_tokens,
                name=subject.name,
                is_complete=is_complete if stops else None,
            )
            for i, ids in zip(batch, generated, strict=True):
                texts[i] = text_of(ids)
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
