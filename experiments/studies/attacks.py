"""Which rules of aggregation withstand which attacks, with one or two liars among eight or ten clients.

    python -m experiments.studies.attacks

Liars know everything: the numbers of the honest clients and the rule. What they send goes through the messages of a run
and the server's checks. All clients draw the same directions, so that the rules act on the clients' scalars; with
``--own-directions`` each draws its own, the rules act on rebuilt parameters, and lies that follow the others' numbers
are left out. The table has the share of the loss drop that is left, of what the mean gains where nobody lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
import tyro
from scipy import stats

from experiments import _cli, _plots
from experiments.studies import result_cache, runner
from fedmezo_jax.core import federated, random
from fedmezo_jax.core.aggregation import Aggregation
from fedmezo_jax.data.batches import take
from fedmezo_jax.data.seeding import generator
from fedmezo_jax.errors import UserError
from fedmezo_jax.run import divergence, rounds
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, algorithm, build, round_examples
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.round_metrics import metrics_of
from fedmezo_jax.run.traffic import Traffic

RULES: tuple[Aggregation, ...] = get_args(Aggregation)
NO_ATTACK, LABEL_FLIP, LYING_LOSSES = "none", "label flip", "sign flip, lying losses"
A_LITTLE, INNER_PRODUCT = "a little is enough", "inner product"
Lie = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
"""``lie(honest, own, draw) -> sent``: from the honest clients' ``[K, m]`` numbers and the liars' own ``[f, m]``, what
the liars send."""


def _size(honest: np.ndarray) -> float:
    return float(np.sqrt(np.mean(honest**2)))


def _a_little(honest: np.ndarray, own: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The honest mean less z standard deviations, z so small that honest clients lie beyond it (arXiv 1902.06156)."""
    clients = len(honest) + len(own)
    needed = clients // 2 + 1 - len(own)
    z = stats.norm.ppf((len(honest) - needed) / len(honest))
    return np.broadcast_to(np.mean(honest, axis=0) - z * np.std(honest, axis=0), own.shape)


def _inner_product(honest: np.ndarray, own: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A multiple of the honest mean that just turns the mean of all around (arXiv 1903.03936)."""
    return np.broadcast_to(-1.1 * len(honest) / len(own) * np.mean(honest, axis=0), own.shape)


LIES: Mapping[str, Lie] = {
    "sign flip": lambda honest, own, draw: -own,
    "sign flip × 10": lambda honest, own, draw: -10 * own,
    "noise × 100": lambda honest, own, draw: 100 * _size(honest) * draw.standard_normal(own.shape),
    "constant × 3": lambda honest, own, draw: np.full(own.shape, 3 * _size(honest)),
    A_LITTLE: _a_little,
    INNER_PRODUCT: _inner_product,
    LABEL_FLIP: lambda honest, own, draw: own,  # measured on labels that are wrong
    LYING_LOSSES: lambda honest, own, draw: -own,
}


class Preset(NamedTuple):
    """One scale of the study.

    Attributes:
        run: configuration of all its runs.
        settings: (clients, liars).
        num_seeds: number of seeds.
    """

    run: RunConfig
    settings: Sequence[tuple[int, int]]
    num_seeds: int


_FAST: dict[str, Any] = {
    **runner.Q_AND_V,
    "learning_rate": 5e-3,
    "directions": 4,
    "directions_shared": True,
    "length_buckets": 1,
    "rounds": 6,
}
PRESETS: Mapping[runner.PresetName, Preset] = MappingProxyType(
    {
        "small": Preset(RunConfig(**_FAST, batch_size=1, precision="float32"), ((8, 1), (8, 2), (10, 2)), 5),
        "paper": Preset(replace(runner.PAPER, directions_shared=True, clients=10), ((10, 2),), 3),
        "smollm2": Preset(
            RunConfig(
                **runner.SMOLLM2,
                layers="last:1",
                learning_rate=1.5e-2,
                directions_shared=True,
                rounds=8,
                clients=10,
                precision="float32",
            ),
            ((10, 2),),
            1,
        ),
        "smoke": Preset(replace(runner.SMOKE, directions_shared=True, clients=5), ((5, 1),), 2),
    }
)


@dataclass(frozen=True)
class Config(runner.Config):
    """The preset, and changes to it."""

    settings: str | None = None
    """clients and liars among them, e.g. 8:1,8:2,10:2; by default the preset's"""
    own_directions: tyro.conf.FlagCreatePairsOff[bool] = False
    """each client draws its own directions"""
    rules: tuple[Aggregation, ...] = RULES
    """rules of aggregation, mean among them"""
    attacks: tuple[str, ...] = tuple(LIES)
    """attacks, by their names in the table"""


def main(config: Config) -> None:
    """Runs every attack against every rule, prints the table, draws the matrix."""
    preset = runner.preset_of(PRESETS, config.preset)
    settings = preset.settings if config.settings is None else _settings(config.settings)
    base = replace(runner.changed(config, preset.run), directions_shared=not config.own_directions)
    if "mean" not in config.rules:
        raise UserError("--rules must have mean, which the others are compared with")
    if unknown := set(config.attacks) - set(LIES):
        raise UserError(f"--attacks must be of {', '.join(map(repr, LIES))}, not {min(unknown)!r}")
    out = config.out or Path("runs") / f"attacks-{config.preset}"
    points = [
        {"attack": attack, "liars": liars, "run": asdict(run)}
        for clients in dict.fromkeys(clients for clients, _ in settings)
        for seed in range(config.seed, config.seed + (config.num_seeds or preset.num_seeds))
        for personalised in (False, True)
        for attack, liars in _attacks(config.attacks, settings, clients, personalised, base.directions_shared)
        for run in _runs(base, config.rules, clients, seed, personalised)
    ]
    found, seconds = result_cache.measure(out / "points", points, lambda point: _final_losses(**point))
    table = conclude(points, found)
    _cli.write_folder(replace(config, out=out), table, seconds, run=asdict(base))
    plot(out / "attacks.png", table)
    _cli.print_table("share of the loss drop that is left", table)


def _settings(text: str) -> list[tuple[int, int]]:
    try:
        settings = [(int(clients), int(liars)) for clients, liars in (part.split(":") for part in text.split(","))]
    except ValueError:
        settings = []
    if not settings or not all(1 <= 2 * liars < clients for clients, liars in settings):
        raise UserError(f"--settings must be clients and liars, fewer than half, like 8:1,10:2, not {text}")
    return settings


def _attacks(
    attacks: Sequence[str],
    settings: Sequence[tuple[int, int]],
    clients: int,
    personalised: bool,
    directions_shared: bool,
) -> list[tuple[str, int]]:
    """(attack, liars) for so many clients; lies about losses are told where learning rates go by them."""
    names = [name for name in attacks if (name == LYING_LOSSES) == personalised]
    if not directions_shared:  # another client's numbers say nothing about one's own directions
        names = [name for name in names if name not in (A_LITTLE, INNER_PRODUCT)]
    clean = [(NO_ATTACK, 0)] if names else []
    return clean + [(name, liars) for n, liars in settings if n == clients for name in names]


def _runs(
    base: RunConfig, rules: Sequence[Aggregation], clients: int, seed: int, personalised: bool
) -> list[RunConfig]:
    """A run for each rule. Where losses matter, they set the learning rates and decide whether a round counts."""
    by_losses = {"personalize": "round-wise", "on_divergence": "rollback"} if personalised else {}
    return [replace(base, clients=clients, seed=seed, aggregation=rule, **by_losses) for rule in rules]


@lru_cache(maxsize=1)
def _context(run: RunConfig) -> RunContext:
    return prepare(run)


@lru_cache(maxsize=1)
def _built(run: RunConfig) -> tuple[federated.Federated, Any]:
    return build(_context(run))


@lru_cache(maxsize=64)
def _server(run: RunConfig) -> federated.Federated:
    return algorithm(run)


def _final_losses(attack: str, liars: int, run: Mapping[str, Any]) -> list[float]:
    """Test loss before and after a run in which the last ``liars`` clients lie."""
    config = RunConfig(**run)
    shared = replace(config, aggregation="mean")
    context, (_, loss) = _context(shared), _built(shared)
    work, (init, round) = _server(replace(shared, seed=0)).round.work, _server(replace(config, seed=0))
    task, key = context.task, random.run_key(config.seed)
    sizes = np.array([len(part) for part in task.parts], np.float32)
    draw = generator(config.seed, "attacks", config.clients)
    before = task.loss_before(context.params)
    progress, recent = rounds.begin(init(context.params, config.clients), config, 1.0), []
    lying = np.arange(config.clients) >= config.clients - liars

    def work_of(progress: rounds.Progress, cohort: federated.Cohort) -> rounds.Work:
        def answers(attempt: int, limit: float) -> rounds.Answers:
            report = jax.device_get(work(progress.state, loss, cohort, key, None, progress.rate))
            report, ids = told(report, attack, lying, draw), np.asarray(cohort.ids)
            return rounds.simulated_answers(config, round, progress.state, sizes, ids, report, key)

        return answers

    for t in range(config.rounds):
        ids, picks = round_examples(config, task, t)
        batches = take(task.train, picks)
        if attack == LABEL_FLIP:
            batches = batches._replace(labels=_flipped(batches.labels, lying, task.model.config.vocab_size))
        typical = divergence.typical(before, recent[-divergence.MEMORY :])
        work_now = work_of(progress, federated.Cohort(ids, sizes[ids], batches))
        entry, _ = rounds.run_round(config, t, sizes, typical, work_now, context.params)
        moved = rounds.move(config, round, progress, entry, None, key)
        progress = rounds.advance(config, progress, entry, moved)
        report = rounds.report_of(entry, config.local_steps, config.sent_directions)
        record = metrics_of(config, entry, report, Traffic([], []), typical)
        recent += [record] if divergence.kept(record) else []
    return [before, float(task.evaluate(progress.state.params))]


def told(
    report: federated.RoundReport, attack: str, lying: np.ndarray, draw: np.random.Generator
) -> federated.RoundReport:
    """What the clients say they found, of whom those of the ``[P]`` mask lie."""
    if not lying.any():
        return report
    numbers = np.array(report.projected_gradients).reshape(len(lying), -1)
    numbers[lying] = LIES[attack](numbers[~lying].astype(np.float64), numbers[lying].astype(np.float64), draw)
    losses = np.array(report.losses)
    if attack == LYING_LOSSES:
        losses[lying] *= 100
    return report._replace(projected_gradients=numbers.reshape(report.projected_gradients.shape), losses=losses)


def _flipped(labels: Any, lying: np.ndarray, vocabulary: int) -> np.ndarray:
    """``[P, …]`` labels, those of liars moved by half of the vocabulary."""
    flipped = np.array(labels)
    flipped[lying] = (flipped[lying] + vocabulary // 2) % vocabulary
    return flipped


def conclude(points: Sequence[Mapping[str, Any]], found: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """A row for each attack, number of liars and rule: the final loss, and the share of the clean loss drop left.

    ``drop_left`` is the mean over seeds of each one's loss drop, over the mean drop of the weighted mean of honest
    clients in the same setting; it is below 0 where the loss rises.
    """
    losses: dict[tuple[str, int, int, bool, str], list[Sequence[float]]] = {}
    for point, pair in zip(points, found, strict=True):
        run = point["run"]
        personalised = run["personalize"] != "frozen"
        key = (point["attack"], point["liars"], run["clients"], personalised, run["aggregation"])
        losses.setdefault(key, []).append(pair)
    table = []
    for (attack, liars, clients, personalised, rule), pairs in losses.items():
        before, after = np.transpose(np.asarray(pairs, np.float64))
        clean_before, clean_after = np.transpose(losses[NO_ATTACK, 0, clients, personalised, "mean"])
        drop, clean = before - after, float(np.mean(clean_before - clean_after))
        band = runner.half_width(drop)
        finite = bool(np.all(np.isfinite(after)))
        table.append(
            {
                "attack": attack,
                "liars": liars,
                "clients": clients,
                "directions": "shared" if points[0]["run"]["directions_shared"] else "own",
                "rates": "by losses" if personalised else "the same",
                "aggregation": rule,
                "seeds": len(pairs),
                "loss_before": float(np.mean(before)),
                "loss_after": float(np.mean(after)) if finite else None,
                "drop_left": float(np.mean(drop)) / clean if finite else None,
                "band_90": band / clean if finite and band is not None else None,
            }
        )
    return table


def plot(file: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Draws a matrix of attacks by rules for each number of clients and liars: the share of the loss drop left."""
    settings = list(dict.fromkeys((row["clients"], row["liars"]) for row in table if row["liars"]))
    figure, all_axes = _plots.subplots(
        1, len(settings), figsize=(2 + 3.6 * len(settings), 4), sharey=True, squeeze=False
    )
    attacks = list(dict.fromkeys(row["attack"] for row in table))
    rules = list(dict.fromkeys(row["aggregation"] for row in table))
    for axes, (clients, liars) in zip(all_axes[0], settings, strict=True):
        left = {
            (row["attack"], row["aggregation"]): row["drop_left"]
            for row in reversed(table)
            if row["clients"] == clients and row["liars"] in (0, liars)
        }
        shares = [[left.get((attack, rule)) for rule in rules] for attack in attacks]
        values = np.array([[-np.inf if share is None else share for share in row] for row in shares])
        axes.imshow(np.clip(values, 0, 1), cmap="RdYlGn", vmin=0, vmax=1.2, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{value:.2f}" if value > -10 else "↓", ha="center", va="center", fontsize="x-small")
        axes.set_xticks(range(len(rules)), rules, rotation=60, ha="right", fontsize="small")
        axes.set_yticks(range(len(attacks)), attacks, fontsize="small")
        axes.set_title(f"{liars} of {clients} clients lie", fontsize="medium")
    figure.suptitle("share of the clean loss drop that is left (1 is all, ↓ below −10)", fontsize="medium")
    _plots.save(figure, file, dpi=110)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
