"""The runner of all training studies: it runs variants × seeds together, resumes, averages and plots them.

A study's module defines its variants and presets. ``paper`` has the paper's model, data and hyper-parameters; ``small``
answers the same question on two CPU cores; ``smollm2``, which some studies have, answers it with a real model in hours;
``smoke`` takes seconds and only tests the code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from scipy import stats

from experiments import _cli, _plots
from experiments.studies.paper import QUESTIONS
from experiments.studies.result_cache import ResultCache, progress
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.config import RunConfig, paper_config
from fedmezo_jax.run.context import RunContext
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.run_folder import write_json
from fedmezo_jax.run.sweep import Curve, SweepAxes, runs_at_once, shape_of, sweep

PresetName = Literal["small", "paper", "smollm2", "smoke"]
PAPER = paper_config(
    model="openlm-research/open_llama_3b_v2",
    data="gsm8k",
    partition="iid",
    clients=3,
    rounds=500,
    local_steps=30,
    batch_size=1,
    length_buckets=1,
    max_length=1000,
    learning_rate=2.5e-5,
    perturbation_scale=1e-3,
    lora_rank=128,
    lora_alpha=256.0,
    precision="paired",
)
"""The paper's setting (Sec. 4.1, arXiv 2402.05926) on GSM8K; it ran in fp16, where ``paired`` is exact enough."""
SMALL = paper_config(clients=4, rounds=20, learning_rate=5e-4, length_buckets=1, precision="float32")
"""For minutes on two CPU cores: the shipped model, with bundled tasks partitioned by Dirichlet shares."""
SMOLLM2: Mapping[str, Any] = MappingProxyType(
    {
        "model": "smollm2-135m",
        "data": "gsm8k",
        "max_length": 144,
        "partition": "iid",
        "batch_size": 1,
        "length_buckets": 1,
    }
)
"""A real model on real data that two CPU cores can train; the shorter half of the questions, for less compute."""
Q_AND_V: Mapping[str, Any] = MappingProxyType({"layers": "last:40%", "targets": "q_proj,v_proj"})
"""The adapters of studies that were measured when these were the default recipe's."""
SMOKE = replace(SMALL, clients=2, rounds=2, local_steps=2, test_examples=8, lora_rank=2)


_RATE = ", η = "  # between a method's label and a learning rate, in the labels of variants
Variants: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Label → fields of :class:`RunConfig` that it changes."""


class Preset(NamedTuple):
    """One scale of a study.

    Attributes:
        run: configuration of all its runs.
        num_seeds: number of seeds per variant.
        eval_every: rounds between measurements of the test loss.
        variants: the variants to compare.
        sweep_seeds: number of seeds with which every rate of a sweep is tried; the best rate of each method is run with
            the other seeds too. By default all seeds try every rate.
    """

    run: RunConfig
    num_seeds: int
    eval_every: int
    variants: Variants
    sweep_seeds: int | None = None


@dataclass(frozen=True)
class Config:
    """The preset, and changes to it."""

    preset: PresetName = "small"
    """small: minutes on two CPU cores; paper: the paper's model, data and hyper-parameters; smollm2: SmolLM2-135M on
    GSM8K, hours on two CPU cores; smoke: seconds. Not every study has all"""
    seed: int = 0
    """the first seed"""
    num_seeds: int | None = None
    """number of seeds; by default the preset's"""
    rounds: int | None = None
    """communication rounds; by default the preset's"""
    model: str | None = None
    """another model than the preset's"""
    data: str | None = None
    """another data set than the preset's"""
    data_dir: str | None = None
    """folder with local copies of the data sets; without it they come from the hub"""
    out: Path | None = None
    """folder for results, plots and finished runs, which are not run again; runs/NAME-PRESET by default"""


class Outcome(NamedTuple):
    """A variant's runs.

    Attributes:
        label: the variant's label.
        config: configuration of its first seed.
        curves: one curve per seed.
    """

    label: str
    config: RunConfig
    curves: list[Curve]

    @property
    def after(self) -> np.ndarray:
        """``[seeds]`` test loss at the end."""
        return np.array([curve.test_loss[-1] for curve in self.curves])


class Tuned(NamedTuple):
    """A method at the best learning rate of its sweep.

    Attributes:
        best: the outcome at that rate.
        at_an_end: whether it is the smallest or largest rate of the sweep, so that a better rate may lie outside.
    """

    best: Outcome
    at_an_end: bool


def standard_presets(
    variants: Variants,
    paper_variants: Variants | None = None,
    *,
    paper: RunConfig = PAPER,
    num_seeds: int = 3,
    **small: Any,
) -> dict[PresetName, Preset]:
    """Returns the usual presets; ``small`` changes :data:`SMALL`, and ``smoke`` runs the variants of ``small``."""
    return {
        "small": Preset(replace(SMALL, **small), num_seeds, 2, variants),
        "paper": Preset(paper, 3, 10, paper_variants or variants),
        "smoke": Preset(SMOKE, 2, 1, variants),
    }


def vary(name: str, values: Sequence[Any], label: str) -> Variants:
    """Returns variants of one field; ``label`` is formatted with each value."""
    return {label.format(value): {name: value} for value in values}


def swept(methods: Mapping[str, tuple[Mapping[str, Any], Sequence[float]]]) -> Variants:
    """Returns variants of several methods, each with its own sweep of learning rates.

    Args:
        methods: label → (fields of :class:`RunConfig`, learning rates).
    """
    return {
        f"{label}{_RATE}{rate:g}": {**fields, "learning_rate": rate}
        for label, (fields, rates) in methods.items()
        for rate in rates
    }


def method_of(label: str) -> str:
    """Returns the method in the label of a variant of :func:`swept`."""
    return label.rpartition(_RATE)[0]


def tune(outcomes: Sequence[Outcome]) -> dict[str, Tuned]:
    """Returns each method of :func:`swept` at its best rate, by label. A rate at which a run diverged is never best."""
    methods: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        methods.setdefault(method_of(outcome.label), []).append(outcome)
    return {label: best_of(sweep) for label, sweep in methods.items()}


def best_of(sweep: Sequence[Outcome]) -> Tuned:
    """Returns the outcome with the lowest final mean test loss, of runs that differ in their learning rate.

    The mean is over the seeds that all of them have.
    """
    common = min(len(outcome.curves) for outcome in sweep)
    best = min(sweep, key=lambda outcome: np.nan_to_num(np.mean(outcome.after[:common]), nan=np.inf))
    rates = [outcome.config.learning_rate for outcome in sweep]
    return Tuned(best, best.config.learning_rate in (min(rates), max(rates)))


def tuned_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """:func:`rows`, with the best rate of each method marked, and whether it is at an end of the method's sweep."""
    at_an_end = {tuned.best.label: tuned.at_an_end for tuned in tune(outcomes).values()}
    return [
        row | {"best": row["variant"] in at_an_end, "at_an_end_of_the_sweep": at_an_end.get(row["variant"], False)}
        for row in rows(outcomes)
    ]


AnyPreset = TypeVar("AnyPreset")


def preset_of(presets: Mapping[PresetName, AnyPreset], name: PresetName) -> AnyPreset:
    """Returns a study's preset.

    Raises:
        UserError: the study has none of that name.
    """
    if name not in presets:
        raise UserError(f"--preset {name}: this study has {', '.join(presets)}")
    return presets[name]


def chosen(only: str, labels: Sequence[str]) -> list[str]:
    """Returns the first label and those that ``--only`` names, separated by semicolons.

    Raises:
        UserError: a name is none of the labels.
    """
    names = [name.strip() for name in only.split(";")]
    if unknown := [name for name in names if name not in labels]:
        raise UserError(f"--only: unknown {', '.join(map(repr, unknown))}; choose from {'; '.join(labels)}")
    return [label for i, label in enumerate(labels) if i == 0 or label in names]


def changed(config: Config, run: RunConfig) -> RunConfig:
    """Returns a preset's run with the options that the command line changes."""
    options = {key: getattr(config, key) for key in ("rounds", "model", "data", "data_dir")}
    return replace(run, **{key: value for key, value in options.items() if value is not None})


def run(
    config: Config,
    name: str,
    presets: Mapping[PresetName, Preset],
    *,
    title: str,
    conclude: Callable[[Sequence[Outcome]], Sequence[_cli.Row]] | None = None,
) -> tuple[Path, list[Outcome]]:
    """Runs a study and writes its folder: ``config.json``, ``results.json``, ``curves.json`` and ``NAME.png``.

    Args:
        config: the options of the command line.
        name: name of the module and of its plot.
        presets: the study's presets.
        title: title of plot and table.
        conclude: returns the table's rows from all outcomes; by default :func:`rows`.

    Returns:
        The folder and the outcomes.
    """
    preset = preset_of(presets, config.preset)
    out = config.out or Path("runs") / f"{name}-{config.preset}"
    base = changed(config, preset.run)
    seeds = range(config.seed, config.seed + (config.num_seeds or preset.num_seeds))
    variants = _scaled(preset.variants, base.rounds / preset.run.rounds)
    plan = {label: [replace(base, **fields, seed=seed) for seed in seeds] for label, fields in variants.items()}
    tried = {label: runs[: preset.sweep_seeds] for label, runs in plan.items()}
    outcomes, seconds = _outcomes(tried, preset.eval_every, out / "finished")
    if tried != plan:
        tried |= {tuned.best.label: plan[tuned.best.label] for tuned in tune(outcomes).values()}
        outcomes, seconds = _outcomes(tried, preset.eval_every, out / "finished")
    write_json(
        out / "curves.json",
        {"curves": [{"variant": one.label, **curve._asdict()} for one in outcomes for curve in one.curves]},
    )
    table = conclude(outcomes) if conclude else rows(outcomes, QUESTIONS[name].by_variant)
    _cli.write_folder(replace(config, out=out), table, seconds, run=asdict(base))
    plot(out / f"{name}.png", title, outcomes)
    _cli.print_table(title, table)
    print(f"{out}: config.json, results.json, curves.json, {name}.png ({seconds:.0f} s)")
    return out, outcomes


def _scaled(variants: Variants, share: float) -> Variants:
    """The variants, with ``share`` times the rounds where they have a number of their own."""

    def scaled(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**fields, "rounds": max(1, round(share * fields["rounds"]))} if "rounds" in fields else fields

    return {label: scaled(fields) for label, fields in variants.items()}


def rows(outcomes: Sequence[Outcome], paper: Mapping[str, str] = MappingProxyType({})) -> list[dict[str, Any]]:
    """Returns a row per variant: mean test loss before and after, and half of its 90 % confidence interval.

    Args:
        outcomes: outcomes of all variants.
        paper: the paper's figures by label; if given, the rows have a column for them.
    """
    return [
        {
            "variant": outcome.label,
            "seeds": len(outcome.curves),
            "rounds": outcome.config.rounds,
            "loss_before": float(np.mean([curve.test_loss[0] for curve in outcome.curves])),
            "loss_after": float(np.mean(outcome.after)),
            "band_90": half_width(outcome.after),
            "seconds_per_round": float(np.mean([curve.seconds_per_round for curve in outcome.curves])),
            **({"paper": paper.get(outcome.label)} if paper else {}),
        }
        for outcome in outcomes
    ]


def half_width(values: np.ndarray, axis: int = 0) -> Any:
    """Returns half of the two-sided 90 % confidence interval of the mean (Student's t); None for a single value."""
    count = values.shape[axis]
    if count < 2:
        return None
    width = stats.t.ppf(0.95, count - 1) * np.std(values, axis=axis, ddof=1) / np.sqrt(count)
    return float(width) if values.ndim == 1 else width


def plot(file: Path, title: str, outcomes: Sequence[Outcome]) -> None:
    """Plots the mean test loss over rounds with its 90 % band, with one line per variant."""
    figure, axes = _plots.subplots(figsize=(6.4, 4))
    for outcome in outcomes:
        draw(axes, outcome.curves[0].rounds, np.array([curve.test_loss for curve in outcome.curves]), outcome.label)
    _plots.whole_rounds(axes)
    axes.set(ylabel="test loss (nats/token)", title=title)
    axes.grid(alpha=0.3)
    _plots.legend(figure, axes, columns=4)
    _plots.save(figure, file, dpi=100)


def draw(axes: Any, x: Sequence[float] | np.ndarray, values: np.ndarray, label: str) -> None:
    """Draws the mean of ``[seeds, len(x)]`` values and its 90 % band."""
    mean = np.mean(values, axis=0)
    (line,) = axes.plot(x, mean, ".-", label=label)
    if (width := half_width(values)) is not None:
        axes.fill_between(x, mean - width, mean + width, color=line.get_color(), alpha=0.15, linewidth=0)


def _outcomes(plan: Mapping[str, Sequence[RunConfig]], eval_every: int, folder: Path) -> tuple[list[Outcome], float]:
    """The outcomes of all runs by label, and the seconds spent on them."""
    curves, seconds = _finish([one for runs in plan.values() for one in runs], eval_every, folder)
    return [Outcome(label, runs[0], [curves[one] for one in runs]) for label, runs in plan.items()], seconds


def _finish(runs: Sequence[RunConfig], eval_every: int, folder: Path) -> tuple[dict[RunConfig, Curve], float]:
    """The curves of all runs, and the seconds spent on them, in this run of the study or an earlier one.

    Those in ``folder`` are read; the others run together and are stored.
    """
    cache = ResultCache(folder)
    points = {config: {"run": asdict(config), "eval_every": eval_every} for config in runs}
    stored = {config: found for config, point in points.items() if (found := cache.load(point))}
    finished = {config: Curve(**found["found"]) for config, found in stored.items()}
    total = sum(found["seconds"] for found in stored.values())
    groups: dict[RunConfig, list[RunConfig]] = {}
    for config in points:
        if config not in finished:
            groups.setdefault(shape_of(config), []).append(config)
    with progress() as bar:
        task = bar.add_task("rounds of all runs", total=sum(config.rounds for config in points))
        bar.advance(task, sum(config.rounds for config in finished))
        for shape, group in groups.items():
            parts = -(-len(group) // runs_at_once(shape))
            for batch in (group[i::parts] for i in range(parts)):
                size, start = len(batch), time.perf_counter()
                curves = sweep(_prepare(batch), eval_every, lambda t, size=size: bar.advance(task, size))
                seconds = time.perf_counter() - start
                total += seconds
                for config, curve in zip(batch, curves, strict=True):
                    cache.store(points[config], curve._asdict(), seconds / size)
                    finished[config] = curve
    return finished, total


def _prepare(runs: Sequence[RunConfig]) -> list[RunContext]:
    """The runs' setups; runs of one seed share a setup, and all runs share the base."""
    shared: dict[RunConfig, RunContext] = {}
    for config in runs:
        key = replace(config, **dict.fromkeys(SweepAxes._fields, 0.5))
        if key not in shared:
            shared[key] = prepare(key)
    return [shared[replace(config, **dict.fromkeys(SweepAxes._fields, 0.5))]._replace(config=config) for config in runs]
