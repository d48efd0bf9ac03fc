"""Answers before and after federated tuning (Tab. 5 of arXiv 2402.05926): exact match on GSM8K by generation.

    python -m experiments.studies.task_metrics --data-dir FOLDER

The paper's other two metrics need MMLU and HumanEval. For multiple-choice questions see experiments.evaluate; HumanEval
runs generated code and is left out.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from experiments import _cli
from experiments.evaluate import LoadedModel, generator
from experiments.studies.runner import PAPER, SMOKE, PresetName, preset_of
from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.prompts import prompt_ids
from fedmezo_jax.evaluation import gsm8k
from fedmezo_jax.llama.registry import load_tokenizer, resolve
from fedmezo_jax.run.config import RunConfig, paper_config
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.prepare import table_of

SMALL = paper_config(
    model="smollm2-135m",
    data="gsm8k",
    partition="iid",
    clients=4,
    rounds=10,
    learning_rate=1e-3,
    length_buckets=1,
)
PRESETS: dict[PresetName, tuple[RunConfig, int, int]] = {
    "small": (SMALL, 64, 160),
    "paper": (replace(PAPER, rounds=200), 1319, 256),
    "smoke": (replace(SMOKE, rounds=1), 4, 4),
}
"""The run, the number of held-out questions, and the most tokens of an answer."""


@dataclass(frozen=True)
class Config:
    """The preset and its data."""

    preset: PresetName = "small"
    """small: SmolLM2-135M; paper: the paper's model and rounds; smoke: seconds"""
    data_dir: str | None = None
    """folder with a local copy of GSM8K; without it, it comes from the hub"""
    seed: int = 0
    """seed of the run"""
    out: Path = Path("runs/task_metrics")
    """folder for the run, which is resumed, for config.json and results.json"""


def main(config: Config) -> None:
    """Answers the questions before and after training, and writes the folder."""
    start = time.perf_counter()
    run, count, tokens = preset_of(PRESETS, config.preset)
    run = replace(run, seed=config.seed, data_dir=config.data_dir, test_examples=count)
    with Progress() as bar:
        task = bar.add_task("rounds", total=run.rounds)
        result = fine_tune(
            run,
            config.out / "run",
            resume=True,
            checkpoint_every=1,
            eval_every=run.rounds,
            check_rate=False,
            on_round=lambda _: bar.advance(task),
            notify=partial(bar.console.print, soft_wrap=True, markup=False, highlight=False),
        )
    setup = result.context
    tokenizer = load_tokenizer(resolve(run.model))
    table = table_of(run, run.seed, tokenizer)
    questions = [question for i in table.test if isinstance(question := table.examples[i], Example)]
    prompts = prompt_ids(questions, tokenizer, run.prompt_style)

    def answer(lora: Any) -> gsm8k.Score:
        subject = LoadedModel(
            setup.task.model.clone(precision="float32"), setup.task.base, lora, tokenizer, f"--model {run.model}"
        )
        return gsm8k.score(generator(subject, tokens)(prompts), [question.response for question in questions])

    rows = [
        {
            "rounds": rounds,
            "test_loss": loss,
            "exact_match": score.accuracy,
            "standard_error": float(np.sqrt(score.accuracy * (1 - score.accuracy) / score.count)),
            "answers_stated": score.stated,
            "questions": score.count,
        }
        for rounds, loss, score in (
            (0, result.loss_before, answer(setup.params)),
            (run.rounds, result.loss_after, answer(result.params)),
        )
    ]
    _cli.write_folder(config, rows, time.perf_counter() - start, run=asdict(setup.config))
    _cli.print_table(f"{run.model} on {run.data}", rows)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
