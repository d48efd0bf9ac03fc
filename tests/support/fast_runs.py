"""Small runs of the fast recipe: what they leave, how they are disturbed."""

import itertools
import json
import math
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from lying_clients import altered, intercepted

from experiments import _cli
from fedmezo_jax.llama.task import LlamaTask
from fedmezo_jax.run import ledger, rounds, run_folder
from fedmezo_jax.run.loop import RunResult, train

ROUNDS = 6
FACTORS = {2.0: 1.4, 1.0: 1.05, 0.25: 0.5, 0.0: 0.35}
"""The rule as the documents state it: what the server may take, and what the rate is multiplied by then."""
SCRIPT = [  # validation losses of a round: without the update, after all of it, after twice or a quarter of it
    (1.0, 2.0, 3.0),
    (1.0, 2.0, 0.5),
    (1.0, 0.5, 0.4),
    (1.0, 0.5, 0.6),
    (1.0, math.nan, math.inf),
    (1.0, 1.5, 0.9),
]
TAKEN = [0.0, 0.25, 2.0, 1.0, 0.0, 0.25]
"""What the server must take by that script."""


class Run(NamedTuple):
    """A finished run: its folder, θ after each of its rounds, and how many programs were compiled by then."""

    setup: Any
    folder: Path
    result: RunResult
    thetas: list[Any]
    compiled: list[int]

    @property
    def entries(self):
        return list(ledger.entries(self.folder / "run.ledger"))

    @property
    def states(self):
        """θ before each round and after the last."""
        return [jax.device_get(self.setup.params), *self.thetas]


@contextmanager
def recorded():
    """θ after each round that is made in the block, by a run or by a replay."""
    seen, advance = [], rounds.advance

    def record(*given):
        progress = advance(*given)
        seen.append(jax.device_get(progress.state.params))
        return progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "advance", record)
        yield seen


def start(folder, setup, **options):
    """Runs or resumes as the command does."""
    run_folder.check_folder(folder, setup.config, resume=True)
    folder.mkdir(exist_ok=True)
    run_folder.write_json(folder / "config.json", asdict(setup.config))
    compiled, after = [], []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with recorded() as thetas:
            count = {"on_round": lambda record: after.append(len(compiled))} | options
            result = train(setup, folder, checkpoint_every=2, eval_every=2, **count)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return Run(setup, folder, result, thetas, after)


def script(patch, first=0):
    """From round ``first`` on the validation losses are those of the script."""
    losses = itertools.chain(*SCRIPT[first:])
    patch.setattr(LlamaTask, "validate", lambda task, params: next(losses))


def poison(patch):
    nan = np.float32(np.nan)
    intercepted(patch, [1], lambda id, m: altered(m, projected_gradients=lambda g: g * nan))


def content(folder):
    """All that a run leaves and that is no time."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untimed = [{key: value for key, value in record.items() if "seconds" not in key} for record in records]
    book = folder / "run.ledger"
    adapter = {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()}
    return untimed, adapter, book.read_bytes() if book.exists() else None


def begun(folder):
    return len(list(ledger.entries(folder / "run.ledger")))


def command(module, monkeypatch, *argv):
    """Runs a command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    try:
        _cli.run(module.main, module.Config, module.__doc__)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def results(folder):
    return json.loads((folder / "results.json").read_text())["rows"]
