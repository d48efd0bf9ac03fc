"""Estimators and trained layers at equal compute, each at its best learning rate.

    python -m experiments.studies.estimators

Compute is counted in products with the frozen weights: tokens × layers that are run, and the head as its share. A
tangent costs a forward pass through the trained layers, and all tangents of a step together one more product with the
head. A backward pass costs as much as a forward pass, since the base is frozen. Layers below the first trained one are
run once for each example that a run uses, whatever its rounds, and other runs share the result: they are counted apart.
Every method gets the rounds that the paper's method has for its compute, and is shown at the best rate of its sweep.
Back-propagation from the same layers on stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments import _cli, _plots
from experiments.studies import runner
from fedmezo_jax.core.estimators import ESTIMATORS
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import round_examples
from fedmezo_jax.run.prepare import prepare

PAPER_METHOD = "two-point, all layers"


class Decoder(NamedTuple):
    """What the products of a model cost.

    Attributes:
        layers: their number.
        head: products of the head, in those of one layer: V·D at the share of tokens that have a label.
    """

    layers: int
    head: float


TINY = Decoder(5, 0.3)  # 1813·128 at a quarter of the tokens, against 196,608 in a layer
SMOLLM2 = Decoder(30, 4.9)  # 49152·576 at 0.6 of the tokens, against 3.54 million
OPEN_LLAMA_3B = Decoder(26, 0.4)  # 32000·3200 at half of the tokens, against 123.9 million


def compute(config: RunConfig, decoder: Decoder) -> float:
    """Products of a run's steps, in those of one example's forward pass through one layer."""
    trained = trained_layers(config, decoder)
    passes = heads = 2  # of back-propagation
    if config.algorithm == "fedmezo":
        _, _, passes_of, heads_of = ESTIMATORS[config.estimator]
        passes, heads = passes_of(config.directions), heads_of(config.directions)
    steps = config.rounds * config.participants * config.local_steps
    return steps * config.batch_size * (passes * trained + heads * decoder.head)


def trained_layers(config: RunConfig, decoder: Decoder) -> int:
    """How many layers have an adapter."""
    return decoder.layers if config.layers == "all" else int(config.layers.removeprefix("last:"))


@cache
def examples_used(config: RunConfig) -> tuple[int, ...]:
    """How many training examples a run of all layers has used after 0, 1, … rounds."""
    task = prepare(config).task
    used, counts = np.zeros(len(task.train.labels), bool), [0]
    for t in range(config.rounds):
        used[round_examples(config, task, t)[1]] = True
        counts.append(int(np.sum(used)))
    return tuple(counts)


Methods = Mapping[str, tuple[Mapping[str, Any], Sequence[float]]]
"""Label → fields of :class:`RunConfig` and learning rates."""


def variants(base: RunConfig, decoder: Decoder, methods: Methods) -> runner.Variants:
    """Every method at every rate of its sweep, with as many rounds as the compute of ``base`` allows it."""
    whole = compute(base, decoder)
    rounds = {
        label: max(1, round(whole / compute(replace(base, **fields, rounds=1), decoder)))
        for label, (fields, _) in methods.items()
    }
    return runner.swept(
        {label: ({**fields, "rounds": rounds[label]}, rates) for label, (fields, rates) in methods.items()}
    )


def methods(last: int, few: int, scale: float) -> Methods:
    """The methods that are compared, where ``last`` or ``few`` layers are trained; their rates are times ``scale``."""
    forward = {"estimator": "forward-gradient", "distribution": "rademacher"}
    table = {
        PAPER_METHOD: ({}, (3e-4, 7e-4, 1e-3, 2e-3)),
        "two-point, all layers, batch 1": ({"batch_size": 1}, (2e-4, 4e-4, 7e-4, 1e-3)),
        f"two-point, last {last}": ({"layers": f"last:{last}"}, (1e-3, 2e-3, 4e-3, 8e-3)),
        f"two-point, last {few}": ({"layers": f"last:{few}"}, (2e-3, 4e-3, 8e-3, 1.6e-2)),
        "forward gradient, n = 8, all layers": ({**forward, "directions": 8}, (1e-3, 2e-3, 5e-3, 1e-2)),
        **{
            f"forward gradient, n = {n}, last {last}": ({**forward, "directions": n, "layers": f"last:{last}"}, rates)
            for n, rates in (
                (1, (1e-3, 2e-3, 4e-3, 8e-3)),
                (4, (5e-3, 1e-2, 2e-2, 4e-2)),
                (10, (1e-2, 2e-2, 4e-2, 8e-2)),
            )
        },
        f"backward gradient, n = 40, last {last}": (
            {**forward, "estimator": "backward-gradient", "directions": 40, "layers": f"last:{last}"},
            (1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1),
        ),
        "back-propagation, all layers": ({"algorithm": "fedavg"}, (1e-2, 3e-2, 6e-2, 1e-1)),
        "back-propagation with Adam, all layers": (
            {"algorithm": "fedavg", "local_optimizer": "adam"},
            (1e-3, 3e-3, 1e-2, 3e-2),
        ),
        f"back-propagation, last {last}": ({"algorithm": "fedavg", "layers": f"last:{last}"}, (3e-2, 1e-1, 2e-1, 4e-1)),
    }
    return {label: (fields, [rate * scale for rate in rates]) for label, (fields, rates) in table.items()}


def _smollm2_methods() -> Methods:
    """The paper's method, tangents and back-propagated slopes of the last layer, and back-propagation of the same."""
    last = {"layers": "last:1", "targets": "up_proj,down_proj"}
    forward = {"estimator": "forward-gradient", "distribution": "rademacher", "directions": 10}
    return {
        PAPER_METHOD: ({}, (8.75e-4, 1.75e-3, 3.5e-3, 7e-3)),
        "forward gradient, n = 10, up and down, last 1": ({**forward, **last}, (7.5e-3, 1.5e-2, 3e-2, 6e-2)),
        "backward gradient, n = 40, up and down, last 1": (
            {**forward, **last, "estimator": "backward-gradient", "directions": 40},
            (5e-3, 1e-2, 2e-2, 4e-2),
        ),
        "back-propagation, up and down, last 1": ({"algorithm": "fedavg", **last}, (5e-2, 1e-1, 2e-1)),
    }


_SMOLLM2_RUN = replace(runner.SMALL, **runner.SMOLLM2)
_SMALL_METHODS, _PAPER_METHODS = methods(2, 1, 1.0), methods(8, 4, 0.03)
_SMOKE_METHODS = {label: _SMALL_METHODS[label] for label in (PAPER_METHOD, "forward gradient, n = 4, last 2")}
PRESETS: dict[runner.PresetName, runner.Preset] = {
    "small": runner.Preset(runner.SMALL, 5, 1, variants(runner.SMALL, TINY, _SMALL_METHODS)),
    "paper": runner.Preset(runner.PAPER, 3, 10, variants(runner.PAPER, OPEN_LLAMA_3B, _PAPER_METHODS)),
    "smollm2": runner.Preset(_SMOLLM2_RUN, 3, 5, variants(_SMOLLM2_RUN, SMOLLM2, _smollm2_methods()), sweep_seeds=1),
    "smoke": runner.Preset(runner.SMOKE, 2, 1, variants(runner.SMOKE, TINY, _SMOKE_METHODS)),
}
_DECODERS = {"small": TINY, "paper": OPEN_LLAMA_3B, "smollm2": SMOLLM2, "smoke": TINY}


_PICKS = ("rounds", "batch_size", "local_steps")
"""What decides, of all that the methods differ in, which examples a run uses."""


def conclude(decoder: Decoder, outcomes: Sequence[runner.Outcome]) -> list[dict[str, Any]]:
    """:func:`runner.tuned_rows`, with each method's compute, and how it compares with the paper's method.

    ``compute`` is in that of the paper's method; ``compute_to_its_loss`` is what had been spent when the mean test loss
    was first as low as the paper's method ends, with the same seeds. ``hidden_states`` and
    ``hidden_states_to_its_loss`` are what the frozen layers below the first trained one take beside them, for all
    examples used until then. ``p_paired`` is of a paired t test of the final losses, by seeds.
    """
    paper = runner.tune(outcomes)[PAPER_METHOD].best
    whole = compute(paper.config, decoder)
    table = []
    for outcome, row in zip(outcomes, runner.tuned_rows(outcomes), strict=True):
        share = compute(outcome.config, decoder) / whole
        curve, papers = outcome.curves[0], paper.after[: len(outcome.after)]
        reached = float(np.mean(papers))
        means = np.mean([run.test_loss for run in outcome.curves], axis=0)
        there = np.flatnonzero(means <= reached)
        rounds = curve.rounds[there[0]] if len(there) else None
        used = examples_used(replace(paper.config, **{name: getattr(outcome.config, name) for name in _PICKS}))
        below = (decoder.layers - trained_layers(outcome.config, decoder)) / whole
        p_paired = None
        if outcome is not paper and len(papers) > 1:
            p_paired = float(stats.ttest_rel(outcome.after, papers).pvalue)
        table.append(
            row
            | {
                "compute": share,
                "compute_to_its_loss": None if rounds is None else share * rounds / curve.rounds[-1],
                "hidden_states": below * used[-1],
                "hidden_states_to_its_loss": None if rounds is None else below * used[rounds],
                "drop_over_its_drop": (means[0] - means[-1]) / (means[0] - reached) if np.isfinite(means[-1]) else None,
                "p_paired": p_paired if p_paired is None or np.isfinite(p_paired) else None,
                "numbers_up": outcome.config.local_steps * outcome.config.sent_directions
                if outcome.config.algorithm == "fedmezo"
                else None,
            }
        )
    return table


def plot(path: str, chosen: Mapping[str, runner.Outcome], decoder: Decoder) -> None:
    """Plots the test loss of each method at its best rate over the compute."""
    from matplotlib import colormaps

    figure, axes = _plots.subplots(figsize=(11, 5.5))
    axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])  # more methods than the usual ten colours
    whole = compute(chosen[PAPER_METHOD].config, decoder)
    for label, outcome in chosen.items():
        rounds = np.array(outcome.curves[0].rounds)
        share = compute(outcome.config, decoder) / whole
        values = np.array([curve.test_loss for curve in outcome.curves])
        runner.draw(axes, rounds / rounds[-1] * share, values, f"{label}, η = {outcome.config.learning_rate:g}")
    top = 1.1 * max(outcome.curves[0].test_loss[0] for outcome in chosen.values())  # a first step may go far beyond
    axes.set(xlabel="compute / compute of the paper's method", ylabel="test loss (nats/token)", ylim=(None, top))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    _plots.save(figure, path, dpi=100)


@dataclass(frozen=True)
class Config(runner.Config):
    """The preset, and changes to it."""

    only: str | None = None
    """methods to compare with the paper's, separated by semicolons; by default all"""
    rates: tuple[float, ...] = ()
    """learning rates to try, of those in the methods' sweeps; by default all"""


def _at_rates(variants: runner.Variants, rates: Sequence[float]) -> runner.Variants:
    """The variants with these learning rates, of which each is in a sweep, and each sweep has one."""
    if unknown := [rate for rate in rates if all(rate != fields["learning_rate"] for fields in variants.values())]:
        raise UserError(f"--rates: {unknown[0]:g} is in no method's sweep")
    kept = {label: fields for label, fields in variants.items() if fields["learning_rate"] in rates}
    for method in map(runner.method_of, variants):
        if method not in map(runner.method_of, kept):
            raise UserError(f"--rates has none for {method!r}: leave that out by --only")
    return kept


def main(config: Config) -> None:
    """Runs the study."""
    preset, decoder = runner.preset_of(PRESETS, config.preset), _DECODERS[config.preset]
    labels = list(dict.fromkeys(map(runner.method_of, preset.variants)))
    if config.only is not None:
        labels = runner.chosen(config.only, labels)
    kept = {label: fields for label, fields in preset.variants.items() if runner.method_of(label) in labels}
    if config.rates:
        kept = _at_rates(kept, config.rates)
    out, outcomes = runner.run(
        config,
        "estimators",
        {config.preset: preset._replace(variants=kept)},
        title="estimators at equal compute, each at its best rate",
        conclude=partial(conclude, decoder),
    )
    plot(str(out / "estimators.png"), {label: tuned.best for label, tuned in runner.tune(outcomes).items()}, decoder)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
