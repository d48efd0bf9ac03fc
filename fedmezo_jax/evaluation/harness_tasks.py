"""The tasks of lm-evaluation-harness, with their data from local files; needs the extra ``eval``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from fedmezo_jax.errors import UserError
from fedmezo_jax.evaluation.lm_eval import HarnessModel

_RESAMPLES = 1000
"""Of the bootstrap, for the standard errors that have no formula."""


class TaskScores(NamedTuple):
    """What a model reaches on tasks.

    Attributes:
        rows: one a task or group and metric: ``metric``, ``value``, ``stderr`` (None where there is none) and ``count``
            of examples.
        generations: one a generated text: ``task``, ``question``, ``generated`` and ``given``, the task's own answer.
    """

    rows: list[dict[str, Any]]
    generations: list[dict[str, str]]


def load_tasks(names: Sequence[str], folder: Path | None, download: bool) -> list[Any]:
    """Loads tasks, groups of tasks or tags by name, with their data.

    A task's data set is looked for in ``folder/owner/name``, a copy of what the hub has, and then among those that were
    fetched before. Further tasks are read from the harness's YAML files in ``folder/tasks``; their paths of data start
    at ``folder``.

    Args:
        names: what the harness calls them.
        folder: as above; None for none.
        download: whether data sets may be fetched from the hub.

    Raises:
        UserError: a task is unknown, or cannot be loaded.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-data {folder}: there is no such folder")
    own = None if folder is None or not (folder / "tasks").is_dir() else folder.resolve() / "tasks"
    manager = TaskManager(include_path=own)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(f"--tasks: unknown {', '.join(map(repr, unknown))}; `lm-eval ls tasks` lists those there are")
    found = []
    # ``datasets`` takes a folder of the working directory for the hub's data set of that name.
    with contextlib.chdir(folder or "."), _hub(download):
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as error:  # of the hub's clients, of modules that a task needs, and many more
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise UserError(
                    f"--tasks {name}: cannot be loaded ({reason}); its data set belongs into --task-data FOLDER as "
                    "FOLDER/owner/name, a copy of what the hub has, or --allow-download fetches it"
                ) from None
            group = loaded.get("groups", {}).get(name)
            found += loaded["tasks"].values() if group is None else [group]
    return found


@contextlib.contextmanager
def _hub(download: bool) -> Iterator[None]:
    """Keeps the hub's clients from the network unless ``download``, and from the hub's metrics, which are code."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("evaluate.config.HF_EVALUATE_OFFLINE", True))
        if not download:
            stack.enter_context(mock.patch("datasets.config.HF_HUB_OFFLINE", True))
            stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        yield


def measure(
    model: HarnessModel, tasks: list[Any], num_fewshot: int | None = None, limit: int = 0, chat_template: bool = False
) -> TaskScores:
    """Measures a model on tasks.

    Args:
        model: the model.
        tasks: from :func:`load_tasks`.
        num_fewshot: solved examples before each question; None for the number that each task names.
        limit: examples of each task; 0 for all.
        chat_template: whether questions go through the tokenizer's chat template.
    """
    # The bootstrap would fork this process, and JAX's threads do not survive that.
    with mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}), _hub(download=False):
        results: Any = simple_evaluate(
            model,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit or None,
            apply_chat_template=chat_template,
            bootstrap_iters=_RESAMPLES,
        )
    return TaskScores([*_rows(results)], [*_generations(results["samples"])])


def _rows(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    counts = {task: sizes["effective"] for task, sizes in results["n-samples"].items()}
    members = results.get("group_subtasks", {})

    def count(name: str) -> int:
        return counts[name] if name in counts else sum(map(count, members[name]))

    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = values.get(f"{metric}_stderr,{kind}")
                yield {
                    "metric": " ".join([task, metric, *([] if kind == "none" else [kind])]),
                    "value": value,
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "count": count(task),
                }


def _generations(samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, str]]:
    for task, documents in samples.items():
        seen = set()
        for document in documents:
            texts = [text for texts in document["resps"] for text in texts]
            # A document comes once for every filter of the task's answers.
            if isinstance(texts[0], str) and document["doc_id"] not in seen:
                seen.add(document["doc_id"])
                question = document["arguments"][0][0]
                for text in texts:
                    yield {"task": task, "question": question, "generated": text, "given": str(document["target"])}
