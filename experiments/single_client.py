"""One client: MeZO against back-propagation at one learning rate, and the zeroth-order estimator's choices.

    python -m experiments.single_client

The variants spend equal forward passes: n directions a step come with n times fewer steps. The second table holds the
two-point estimate (L(θ + μz) − L(θ − μz))/2μ and the forward difference (L(θ + μz) − L(θ))/μ against the exact
derivative along z; both take two losses, and only the first is free of the curvature's term μ·zᵀHz/2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from experiments import common, study
from fedmezo_jax import mezo
from fedmezo_jax.data.examples import Rows
from fedmezo_jax.llama.loss import loss_of
from fedmezo_jax.setup import prepare, run_key

PROBES = 16
SCALES = (1e-4, 1e-3, 1e-2, 1e-1)


def variants(steps: int) -> study.Variants:
    """What is compared, at ``2·steps`` forward passes a round."""
    return {
        "MeZO": {"local_steps": steps},
        "MeZO, Rademacher": {"local_steps": steps, "distribution": "rademacher"},
        "MeZO, n = 5": {"local_steps": steps // 5, "directions": 5},
        "back-propagation, SGD": {"algorithm": "fedavg", "local_steps": steps},
    }


PRESETS = study.three(
    variants(20),
    variants(30),
    paper=replace(study.PAPER, clients=1),
    clients=1,
    partition="iid",
    learning_rate=2e-4,
    rounds=40,
)


def estimators(config: study.Config) -> list[dict[str, Any]]:
    """Median relative errors of both estimates over directions, at scales of μ, on a batch of training rows."""
    run = replace(PRESETS[config.preset].run, seed=config.seed, data_dir=config.data_dir, precision="float32")
    setup = prepare(replace(run, model=config.model or run.model, data=config.data or run.data))
    loss = loss_of(setup.model.clone(precision="float32"), setup.base)
    rows = Rows(*(leaf[:8] for leaf in setup.train))

    @jax.jit
    def measure(loss, lora, key):
        z = jax.tree.map(lambda new, old: new - old, mezo.shift(lora, mezo.Perturbation(key, 1.0)), lora)
        here, exact = jax.jvp(lambda lora: loss(lora, rows), (lora,), (z,))
        pairs = [
            [loss(mezo.shift(lora, mezo.Perturbation(key, sign * scale)), rows) for sign in (1, -1)] for scale in SCALES
        ]
        two_point = [(plus - minus) / (2 * scale) for (plus, minus), scale in zip(pairs, SCALES, strict=True)]
        forward = [(plus - here) / scale for (plus, _), scale in zip(pairs, SCALES, strict=True)]
        return exact, two_point, forward

    # A start at which the adapter does something: B = 0 makes half of the gradient vanish.
    moved = mezo.shift(setup.lora, mezo.Perturbation(jax.random.fold_in(run_key(config.seed), 99), 0.02))
    keys = [jax.random.fold_in(run_key(config.seed), probe) for probe in range(PROBES)]
    found = [jax.device_get(measure(loss, moved, key)) for key in keys]
    exact = np.array([one[0] for one in found])
    usual = np.sqrt(np.mean(exact**2))
    return [
        {
            "perturbation_scale": scale,
            "two_point_error": float(np.sqrt(np.mean((np.array([one[1][i] for one in found]) - exact) ** 2)) / usual),
            "forward_error": float(np.sqrt(np.mean((np.array([one[2][i] for one in found]) - exact) ** 2)) / usual),
            "probes": PROBES,
        }
        for i, scale in enumerate(SCALES)
    ]


def main(config: study.Config) -> None:
    """Runs the study, then measures the estimators."""
    start = time.perf_counter()
    out, outcomes = study.run(config, "single_client", PRESETS, title="one client, equal forward passes")
    errors: Sequence[common.Row] = estimators(config)
    common.print_table("error over the exact derivative along z, root mean square", errors)
    merged = [{"what": "training", **row} for row in study.rows(outcomes, {})]
    merged += [{"what": "estimator", **row} for row in errors]
    common.write_results(out, merged, time.perf_counter() - start)


if __name__ == "__main__":
    common.run(main, study.Config, __doc__)
