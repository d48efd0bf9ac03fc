"""What is drawn from the run's key: each use folds in a constant of its own."""

import ast
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from fedmezo_jax.core import random
from fedmezo_jax.core.random import run_key

ROOT = Path(__file__).parents[2]


def uses(file):
    """What each ``jax.random`` call on ``run_key(…)`` folds in, as source text."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    direct = [call for call in calls if ast.unparse(call.func).startswith("jax.random.") and call.args]
    return [
        ast.unparse(call.args[1]) if ast.unparse(call.func) == "jax.random.fold_in" else ast.unparse(call)
        for call in direct
        if isinstance(call.args[0], ast.Call) and ast.unparse(call.args[0].func) == "run_key"
    ]


def test_no_two_uses_of_the_run_s_key_share_a_stream():
    files = [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "fedmezo_jax").rglob("*.py")]
    found = Counter(use for file in files for use in uses(file))
    assert {"INIT", "random.PROBE", "random.EFFECTIVE_RANK"} <= set(found)
    named = {use: getattr(random, use.removeprefix("random."), None) for use in found}
    assert None not in named.values(), f"streams without a constant in random.py: {named}"
    assert set(found.values()) == {1}, f"streams in use twice: {found}"
    rounds = {random.WORK, random.RATES, random.SHARED}  # folded in within a round
    assert rounds.isdisjoint(named.values())
    assert len(set(named.values())) == len(named)


def test_the_split_of_a_key_is_not_a_way_around():
    # JAX's split gives the keys that fold_in gives: splitting the run's key would reuse the streams of all constants.
    split, folded = jax.random.split(run_key(0), 2), jax.random.fold_in(run_key(0), 1)
    assert np.array_equal(jax.random.key_data(split[1]), jax.random.key_data(folded))
