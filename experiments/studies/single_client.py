"""One client: MeZO against back-propagation, and the zeroth-order estimator's choices.

    python -m experiments.studies.single_client

Each method has a sweep of learning rates and is plotted at its best one; SGD also gets one of MeZO's rates. All use the
same number of forward passes, with a backward pass counted as one, so n directions have n times fewer steps. The second
table compares the two-point estimate (L(θ + μz) − L(θ − μz))/2μ and the forward difference (L(θ + μz) − L(θ))/μ with
the exact derivative along z. Both need two losses, but only the second has the curvature term μ·zᵀHz/2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from experiments import _cli
from experiments.studies import runner
from fedmezo_jax.core import mezo, random
from fedmezo_jax.core.random import run_key
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.run.prepare import prepare

PROBES = 16
SCALES = (1e-4, 1e-3, 1e-2, 1e-1)


def variants(steps: int, common: float, mezo: Sequence[float], five: Sequence[float], sgd: Sequence[float]):
    """Returns each method at the learning rates of its sweep, and SGD also at one of MeZO's rates.

    Args:
        steps: local steps of a round; five directions have a fifth of them.
        common: one of MeZO's learning rates, which SGD gets too.
        mezo: learning rates of MeZO with one direction per step.
        five: learning rates of MeZO with five directions per step.
        sgd: learning rates of back-propagated SGD.
    """
    return runner.swept(
        {
            "MeZO": ({"local_steps": steps}, mezo),
            "MeZO, Rademacher": ({"local_steps": steps, "distribution": "rademacher"}, mezo),
            "MeZO, n = 5": ({"local_steps": steps // 5, "directions": 5}, five),
            "back-propagation, SGD": ({"algorithm": "fedavg", "local_steps": steps}, (common, *sgd)),
        }
    )


PRESETS = runner.standard_presets(
    variants(20, 2e-4, (1e-4, 2e-4, 4e-4, 8e-4), (5e-4, 1e-3, 2e-3, 4e-3), (3e-3, 1e-2, 3e-2, 1e-1)),
    variants(30, 2.5e-5, (1e-5, 2.5e-5, 5e-5, 1e-4), (2.5e-5, 1e-4, 2.5e-4, 5e-4), (1e-2, 1e-1, 1.0)),
    paper=replace(runner.PAPER, clients=1),
    clients=1,
    partition="iid",
)


def estimators(config: runner.Config) -> list[dict[str, Any]]:
    """Returns the relative root-mean-square errors of both estimates over directions, per μ, on a training batch."""
    run = replace(
        runner.preset_of(PRESETS, config.preset).run, seed=config.seed, data_dir=config.data_dir, precision="float32"
    )
    setup = prepare(replace(run, model=config.model or run.model, data=config.data or run.data))
    loss = loss_of(setup.task.model.clone(precision="float32"), setup.task.base)
    rows = TokenBatch(*(leaf[:8] for leaf in setup.task.train))

    @jax.jit
    def measure(loss, lora, key):
        z = jax.tree.map(lambda new, old: new - old, mezo.shift(lora, mezo.Perturbation(key, 1.0)), lora)
        loss_value, exact = jax.jvp(lambda lora: loss(lora, rows), (lora,), (z,))
        pairs = [
            [loss(mezo.shift(lora, mezo.Perturbation(key, sign * scale)), rows) for sign in (1, -1)] for scale in SCALES
        ]
        two_point = [(plus - minus) / (2 * scale) for (plus, minus), scale in zip(pairs, SCALES, strict=True)]
        forward = [(plus - loss_value) / scale for (plus, _), scale in zip(pairs, SCALES, strict=True)]
        return exact, two_point, forward

    # A start with a non-zero adapter: B = 0 makes half of the gradient vanish.
    start_key = jax.random.fold_in(run_key(config.seed), random.ESTIMATORS_START)
    moved = mezo.shift(setup.params, mezo.Perturbation(start_key, 0.02))
    keys = jax.random.split(jax.random.fold_in(run_key(config.seed), random.ESTIMATORS), PROBES)
    measured = [jax.device_get(measure(loss, moved, key)) for key in keys]
    exact = np.array([values[0] for values in measured])
    typical_size = np.sqrt(np.mean(exact**2))
    return [
        {
            "perturbation_scale": scale,
            "two_point_error": float(
                np.sqrt(np.mean((np.array([values[1][i] for values in measured]) - exact) ** 2)) / typical_size
            ),
            "forward_error": float(
                np.sqrt(np.mean((np.array([values[2][i] for values in measured]) - exact) ** 2)) / typical_size
            ),
            "probes": PROBES,
        }
        for i, scale in enumerate(SCALES)
    ]


def main(config: runner.Config) -> None:
    """Runs the study, then measures the estimators."""
    start = time.perf_counter()
    title = "one client"
    out, outcomes = runner.run(config, "single_client", PRESETS, title=title, conclude=runner.tuned_rows)
    runner.plot(out / "single_client.png", title, [tuned.best for tuned in runner.tune(outcomes).values()])
    errors: Sequence[_cli.Row] = estimators(config)
    _cli.print_table("error over the exact derivative along z, root mean square", errors)
    merged = [{"what": "training", **row} for row in runner.tuned_rows(outcomes)]
    merged += [{"what": "estimator", **row} for row in errors]
    _cli.write_results(out, merged, time.perf_counter() - start)


if __name__ == "__main__":
    _cli.run(main, runner.Config, __doc__)
