"""Published and new changes to the default recipe's directions and steps, each at its best learning rate.

    python -m experiments.studies.candidates

All take the recipe's forward gradients, and all have the same compute: half the batch gets twice the rounds.
A candidate changes the directions z, the projected gradients of a step, or the server's step. It goes by what server
and clients both know from earlier rounds, and so sends no more than the recipe. What earned no place in the package can
still be measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments import _cli, _plots
from experiments.studies import rate_search, result_cache, runner
from fedmezo_jax.core import mezo, random
from fedmezo_jax.core.mezo import Params
from fedmezo_jax.data.batches import take
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import RunContext, build, round_examples
from fedmezo_jax.run.loop import forward_passes
from fedmezo_jax.run.prepare import prepare


class Memory(NamedTuple):
    """What all parties know from the rounds before.

    Attributes:
        update: exponential mean of the rounds' updates, weight 0.2 for the newest.
        squares: exponential mean of their squares, weight 0.05 for the newest.
        slopes: exponential mean of the squared projected gradients, weight 0.5 for the newest; float32 scalar.
        rounds: rounds so far, int32 scalar.
    """

    update: Params
    squares: Params
    slopes: jax.Array
    rounds: jax.Array


class Candidate(NamedTuple):
    """A change to the recipe.

    Attributes:
        fields: fields of :class:`RunConfig` that it changes.
        direction: ``direction(memory, z, key) -> z``, changes each direction; the key is for more random numbers.
        slopes: ``slopes(memory, [n]) -> [n]``, changes the projected gradients of a step.
        server: ``server(memory, update) -> update``, changes the mean update of a round; the memory has it already.
    """

    fields: Mapping[str, Any] = MappingProxyType({})
    direction: Callable[[Memory, Params, jax.Array], Params] = lambda memory, z, key: z
    slopes: Callable[[Memory, jax.Array], jax.Array] = lambda memory, slopes: slopes
    server: Callable[[Memory, Params], Params] = lambda memory, update: update


def _norm(tree: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def _entries(tree: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def guided(angle: float, by_block: bool, memory: Memory, z: Params, key: jax.Array) -> Params:
    """sin(t)·z + cos(t)·√d·(⊕_b a_b·m_b)/‖m‖ for the mean update m, b the layers of each LoRA matrix.

    With a_b ~ N(0, 1) the search is over the step size of each block; with a_b = 1 it is ConMeZO (arXiv 2511.02757).
    """
    length = _norm(memory.update)

    def one(place, z, update):
        size = jnp.ones(len(z)) if not by_block else jax.random.normal(jax.random.fold_in(key, place), (len(z),))
        known = size[:, None, None] * update / jnp.where(length > 0, length, 1) * np.sqrt(_entries(memory.update))
        return jnp.where(length > 0, np.sin(angle) * z + np.cos(angle) * known, z)

    leaves, tree = jax.tree.flatten(z)
    moved = [
        one(i, z, update) for i, (z, update) in enumerate(zip(leaves, jax.tree.leaves(memory.update), strict=True))
    ]
    return jax.tree.unflatten(tree, moved)


def by_curvature(memory: Memory, z: Params, key: jax.Array) -> Params:
    """z/√K with K the mean of squared updates (HiSo, arXiv 2506.02370), relative to its mean over all entries.

    1 is added to it, and z is scaled to a mean square of 1, so that rates mean the same for all candidates.
    """
    mean = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(memory.squares)) / _entries(memory.squares)
    relative = jax.tree.map(lambda leaf: 1 / jnp.sqrt(1 + leaf / jnp.where(mean > 0, mean, 1)), memory.squares)
    scale = np.sqrt(_entries(z)) / _norm(relative)
    return jax.tree.map(lambda z, factor: scale * factor * z, z, relative)


def without_a(memory: Memory, z: Params, key: jax.Array) -> Params:
    """z that moves B alone."""
    return {name: {"A": jnp.zeros_like(leaves["A"]), "B": leaves["B"]} for name, leaves in z.items()}


def over_deviation(memory: Memory, slopes: jax.Array) -> jax.Array:
    """Slopes over the standard deviation of the step's own (FZOO, arXiv 2506.09034)."""
    return slopes / (jnp.std(slopes, ddof=1) + 1e-6)


def over_usual(memory: Memory, slopes: jax.Array) -> jax.Array:
    """Slopes over the root of their mean square in the rounds before; 1 in the first round."""
    return slopes / jnp.where(memory.rounds > 0, jnp.sqrt(memory.slopes), 1)


def orthogonal(memory: Memory, update: Params) -> Params:
    """Each matrix of the update with its singular values nearly equal and its norm kept (ZO-Muon, arXiv 2602.17155)."""

    def one(matrix):
        norm = jnp.linalg.norm(matrix)
        x = matrix / jnp.where(norm > 0, norm, 1)
        for _ in range(5):
            square = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
            middle = 4.775 * square - 2.0315 * square @ square
            x = 3.4445 * x - (middle @ x if x.shape[0] <= x.shape[1] else x @ middle)
        length = jnp.linalg.norm(x)
        return x * norm / jnp.where(length > 0, length, 1)

    return jax.tree.map(jax.vmap(one), update)


def with_momentum(memory: Memory, update: Params) -> Params:
    """The exponential mean of the updates, without its bias towards 0."""
    return jax.tree.map(lambda leaf: leaf / (1 - 0.8**memory.rounds), memory.update)


RECIPE = "the recipe"
CANDIDATES: Mapping[str, Candidate] = MappingProxyType(
    {
        RECIPE: Candidate(),
        "block-guided directions, t = 1.2": Candidate(direction=partial(guided, 1.2, True)),
        "ConMeZO, t = 1.35": Candidate(direction=partial(guided, 1.35, False)),
        "HiSo": Candidate(direction=by_curvature),
        "B alone": Candidate(direction=without_a),
        "FZOO": Candidate(slopes=over_deviation),
        "slopes over their usual size": Candidate(slopes=over_usual),
        "orthogonal server step": Candidate(server=orthogonal),
        "server momentum": Candidate(server=with_momentum),
        "batch 1": Candidate({"batch_size": 1}),
        "5 directions": Candidate({"directions": 5}),
    }
)


class Preset(NamedTuple):
    """One scale of the study.

    Attributes:
        run: configuration of the recipe's run.
        candidates: labels of those that are compared.
        num_seeds: number of seeds.
    """

    run: RunConfig
    candidates: Sequence[str]
    num_seeds: int


_SMALL = RunConfig(clients=4, rounds=15, length_buckets=1, server_learning_rate=1.0)
PRESETS: Mapping[runner.PresetName, Preset] = MappingProxyType(
    {
        "small": Preset(_SMALL, tuple(CANDIDATES), 3),
        "paper": Preset(replace(_SMALL, model=runner.PAPER.model, data="gsm8k", rounds=100), tuple(CANDIDATES), 3),
        "smoke": Preset(
            replace(_SMALL, clients=2, rounds=2, local_steps=2, directions=2, test_examples=8),
            (RECIPE, "block-guided directions, t = 1.2", "FZOO", "orthogonal server step"),
            2,
        ),
    }
)


@dataclass(frozen=True)
class Config(runner.Config):
    """The preset, and changes to it."""

    only: str | None = None
    """labels of candidates to compare with the recipe, separated by semicolons; by default all"""


def main(config: Config) -> None:
    """Searches every candidate's best rate, prints the table and draws it."""
    preset = runner.preset_of(PRESETS, config.preset)
    base = runner.changed(config, preset.run)
    labels = preset.candidates if config.only is None else runner.chosen(config.only, list(CANDIDATES))
    out = config.out or Path("runs") / f"candidates-{config.preset}"
    seeds = list(range(config.seed, config.seed + (config.num_seeds or preset.num_seeds)))
    points = [{"candidate": label, "run": asdict(_run(base, CANDIDATES[label])), "seeds": seeds} for label in labels]
    found, seconds = result_cache.measure(out / "points", points, _measure)
    table = rows(points, found)
    _cli.write_folder(replace(config, out=out), table, seconds, run=asdict(base))
    plot(out / "candidates.png", table)
    _cli.print_table("candidates at equal compute, each at its best rate", table)


def _run(base: RunConfig, candidate: Candidate) -> RunConfig:
    """The candidate's run, with as many rounds as the compute of ``base`` allows it."""
    run = replace(base, **candidate.fields)
    cost = forward_passes(run) * run.batch_size / (forward_passes(base) * base.batch_size)
    return replace(run, rounds=max(1, round(base.rounds / cost)))


def _measure(point: Mapping[str, Any]) -> dict[str, Any]:
    """Test losses of each seed before, and after runs at every rate of the search."""
    label, run = point["candidate"], RunConfig(**point["run"])
    contexts = [prepare(replace(run, seed=seed, algorithm="fedavg", learning_rate=1.0)) for seed in point["seeds"]]

    def losses_at(rate: float) -> list[float]:
        return [final_loss(label, context, rate) for context in contexts]

    found = rate_search.search(losses_at, start=2e-2)
    return {"before": [context.task.loss_before(context.params) for context in contexts], "fixed": found}


def final_loss(label: str, context: RunContext, rate: float) -> float:
    """Test loss after a candidate's run from ``context``, whose loss must be that of back-propagation."""
    config, task, params = context.config, context.task, context.params
    _, loss = build(context)
    zeros = jax.tree.map(jnp.zeros_like, params)
    memory = Memory(zeros, zeros, jnp.float32(0), jnp.int32(0))
    for t in range(config.rounds):
        ids, picks = round_examples(config, task, t)
        batches, key = take(task.train, picks), random.run_key(config.seed)
        params, memory = _round(label, config.directions, loss, params, memory, ids, batches, key, rate)
    return float(task.evaluate(params))


@partial(jax.jit, static_argnums=(0, 1))
def _round(
    label: str,
    directions: int,
    loss: Any,
    params: Params,
    memory: Memory,
    ids: jax.Array,
    batches: Any,
    key: jax.Array,
    rate: jax.Array,
) -> tuple[Params, Memory]:
    """One round of all clients; the directions of the recipe are those of :class:`estimators.ForwardGradient`."""
    candidate = CANDIDATES[label]

    def step(params: Params, h_and_batch: Any):
        step_key, batch = h_and_batch

        def along(k: jax.Array):
            z = mezo.shift(zeros, mezo.Perturbation(jax.random.fold_in(step_key, k), 1.0, "rademacher"))
            z = candidate.direction(memory, z, jax.random.fold_in(step_key, directions + k))
            return jax.jvp(lambda params: loss(params, batch), (params,), (z,))[1], z

        slopes, z = jax.vmap(along)(jnp.arange(directions))
        moves = rate / directions * candidate.slopes(memory, slopes)
        return jax.tree.map(lambda leaf, z: leaf - jnp.tensordot(moves, z, 1), params, z), slopes

    def work(client: jax.Array, batches: Any):
        client_key, steps = random.client_key(key, memory.rounds, client), jnp.arange(local_steps)
        step_keys = jax.vmap(partial(jax.random.fold_in, client_key))(steps)
        return jax.lax.scan(step, params, (step_keys, batches))

    zeros = jax.tree.map(jnp.zeros_like, params)
    local_steps = jax.tree.leaves(batches)[0].shape[1]
    moved, slopes = jax.vmap(work)(ids, batches)
    update = jax.tree.map(lambda new, old: jnp.mean(new - old, axis=0), moved, params)
    memory = Memory(
        jax.tree.map(lambda mean, new: 0.8 * mean + 0.2 * new, memory.update, update),
        jax.tree.map(lambda mean, new: 0.95 * mean + 0.05 * new**2, memory.squares, update),
        jnp.where(memory.rounds > 0, (memory.slopes + jnp.mean(slopes**2)) / 2, jnp.mean(slopes**2)),
        memory.rounds + 1,
    )
    return jax.tree.map(jnp.add, params, candidate.server(memory, update)), memory


def rows(points: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each candidate at its best rate; the first is the recipe.

    ``drop_over_the_recipes`` is its mean loss drop in that of the recipe; ``p_paired`` is of a paired t test of the
    final losses against the recipe's, by seeds.
    """
    recipe = np.array(rate_search.best(found[0]["fixed"])[1])
    recipe_drop = np.mean(found[0]["before"]) - np.mean(recipe)
    table = []
    for point, each in zip(points, found, strict=True):
        rate, losses = rate_search.best(each["fixed"])
        drops = np.array(each["before"]) - np.array(losses)
        several = len(losses) > 1 and point["candidate"] != RECIPE
        table.append(
            {
                "candidate": point["candidate"],
                "rounds": point["run"]["rounds"],
                "seeds": len(losses),
                "learning_rate": rate,
                "rates_tried": len(each["fixed"]),
                "loss_before": float(np.mean(each["before"])),
                "loss_after": float(np.mean(losses)),
                "band_90": runner.half_width(np.array(losses)),
                "drop_over_the_recipes": float(np.mean(drops) / recipe_drop),
                "p_paired": float(stats.ttest_rel(losses, recipe).pvalue) if several else None,
            }
        )
    return table


def plot(file: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Draws each candidate's loss drop in the recipe's, with the 90 % band of its final losses."""
    figure, axes = _plots.subplots(figsize=(6.4, 0.6 + 0.32 * len(table)))
    rows = table[::-1]
    recipe_drop = table[0]["loss_before"] - table[0]["loss_after"]
    bands = [(row["band_90"] or 0) / recipe_drop for row in rows]
    drops, labels = [row["drop_over_the_recipes"] for row in rows], [row["candidate"] for row in rows]
    axes.errorbar(drops, labels, xerr=bands, fmt="o", capsize=3)
    axes.axvline(1.0, color="0.3", linewidth=1)
    axes.set(xlabel="loss drop at equal compute, in the recipe's")
    axes.grid(alpha=0.3, axis="x")
    _plots.save(figure, file, dpi=100)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
