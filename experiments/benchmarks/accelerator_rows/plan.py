"""Which rows there are, and in which order: those that matter most come first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from experiments.benchmarks.accelerator_rows import memory
from experiments.benchmarks.accelerator_rows.exactness import TINY
from fedmezo_jax.llama.precision import Precision

DEVICE = "device"
"""The process of most jobs."""


class Job(NamedTuple):
    """Rows that are measured together.

    Attributes:
        kind: one of :data:`worker.KINDS`.
        rows: their names.
        seconds: how long they take, guessed; see :mod:`schedule`.
        options: of the function that measures them.
        process: jobs in a row that name the same process share it; None is one that no other job has used.
    """

    kind: str
    rows: tuple[str, ...]
    seconds: float
    options: dict[str, Any]
    process: str | None = DEVICE


class Sizes(NamedTuple):
    """What a plan is made of.

    Attributes:
        model: of all rows but those of memory and of ``tiny``.
        memory: models whose memory is measured, and layers with an adapter.
        programs: whose memory is measured, with their precisions.
        memory_length: tokens of the example there.
        rank: LoRA rank.
        few: (clients, tokens) of the speeds that matter most.
        many: of the others.
        precision: of the speeds that matter most, and of the comparison with PyTorch.
        precisions: of the other speeds.
        last: layers with an adapter of the rounds that start from hidden states.
        slopes: precisions whose projected gradient is measured, from the first on.
        exact: precisions of the runs of ``tiny``.
        rounds: rounds of these.
        probes: directions of the projected gradient's error.
        rebuilt: clients and local steps of the round that is rebuilt.
        product: width of the matrices of the card's products.
        copied: numbers in the array that the card copies.
        patience: seconds for a small program to be compiled and run.
    """

    model: str
    memory: Sequence[tuple[str, str]]
    programs: Sequence[tuple[str, str]]
    memory_length: int
    rank: int
    few: Sequence[tuple[int, int]]
    many: Sequence[tuple[int, int]]
    precision: Precision
    precisions: Sequence[Precision]
    last: str
    slopes: Sequence[Precision]
    exact: Sequence[Precision]
    rounds: int
    probes: int
    rebuilt: tuple[int, int]
    product: int
    copied: int
    patience: float


ACCELERATOR = Sizes(
    model="llama-3b",
    memory=(("llama-3b", "all"), ("llama3-8b", "all"), ("llama-3b", "last:4")),
    programs=memory.PROGRAMS,
    memory_length=1024,
    rank=128,
    few=((4, 1024), (16, 256), (64, 256), (1, 1024)),
    many=((1, 256), (4, 256), (16, 1024), (64, 1024)),
    precision="paired",
    precisions=("bfloat16", "float32"),
    last="last:4",
    slopes=get_args(Precision),
    exact=("float32", "paired"),
    rounds=4,
    probes=12,
    rebuilt=(3, 30),
    product=8192,
    copied=1 << 29,
    patience=12.0,
)
CPU = Sizes(
    model=TINY,
    memory=((TINY, "all"),),
    programs=memory.PROGRAMS[:2],
    memory_length=32,
    rank=8,
    few=((2, 32),),
    many=(),
    precision="float32",
    precisions=(),
    last="last:2",
    slopes=get_args(Precision)[:1],
    exact=("float32",),
    rounds=2,
    probes=2,
    rebuilt=(2, 5),
    product=1024,
    copied=1 << 24,
    patience=1.0,
)
"""A smoke test: every kind of row, at sizes that say nothing about an accelerator."""


def jobs(sizes: Sizes, folder: Path) -> list[Job]:
    """Returns the jobs, the most valuable first.

    Args:
        sizes: one of the two above.
        folder: where the runs of ``tiny`` go.
    """
    first, *others = (_memory(sizes, *case) for case in sizes.memory)
    exact, *more_exact = (_exactness(sizes, precision, folder) for precision in sizes.exact)
    card = {"width": sizes.product, "copied": sizes.copied}
    rebuilt = dict(zip(("clients", "local_steps"), sizes.rebuilt, strict=True)) | {"rank": sizes.rank}
    slopes = tuple(f"slope {precision}" for precision in sizes.slopes)
    more = (*sizes.few[1:], *sizes.many)
    return [
        Job("card", ("card",), sizes.patience, card),
        first,
        *_speeds(sizes, sizes.few, (sizes.precision,), "all"),
        *exact,
        Job("rebuild", ("rebuild",), sizes.patience, {"model": sizes.model, **rebuilt}),
        Job("slope", slopes, 3 * sizes.patience, {"scale": 1e-3, "probes": sizes.probes}),
        *_speeds(sizes, sizes.few[:1], sizes.precisions, "all"),
        *_speeds(sizes, sizes.few[:1], (sizes.precision,), sizes.last),
        _peer(sizes, *sizes.few[0]),
        *others,
        *itertools.chain(*more_exact),
        *_speeds(sizes, sizes.many, (sizes.precision,), "all"),
        *_speeds(sizes, more, (sizes.precision,), sizes.last),
        *_speeds(sizes, more, sizes.precisions, "all"),
    ]


def _memory(sizes: Sizes, model: str, layers: str) -> Job:
    names = tuple(memory.name(model, layers, *program) for program in sizes.programs)
    options = {"model": model, "layers": layers, "length": sizes.memory_length, "rank": sizes.rank}
    return Job("memory", names, len(names) * sizes.patience, options, process=None)


def _speeds(
    sizes: Sizes, settings: Iterable[tuple[int, int]], precisions: Sequence[Precision], layers: str
) -> Iterable[Job]:
    for precision, (clients, length) in itertools.product(precisions, settings):
        name = f"speed {clients}x{length} {precision} {layers}"
        options = {"model": sizes.model, "clients": clients, "length": length, "rank": sizes.rank}
        # Full float32 takes an accelerator about ten times as long as sixteen bits.
        seconds = sizes.patience * (2 + clients * length / 2**14 * (10 if precision == "float32" else 1))
        yield Job("speed", (name,), seconds, options | {"precision": precision, "layers": layers})


def _exactness(sizes: Sizes, precision: Precision, folder: Path) -> tuple[Job, Job]:
    options = {"folder": str(folder), "precision": precision, "rounds": sizes.rounds}
    seconds = 4 * sizes.patience
    return (
        Job("exactness", (f"replay {precision}",), seconds, options),
        Job("comparison", (f"cpu {precision}",), seconds, options, process="cpu"),
    )


def _peer(sizes: Sizes, clients: int, length: int) -> Job:
    names = tuple(f"peer {what}" for what in ("fedmezo", "torch mezo", "torch backprop"))
    options = {"model": sizes.model, "clients": clients, "length": length, "rank": sizes.rank}
    options |= {"precision": sizes.precision}
    return Job("peer", names, 4 * sizes.patience, options, process="peer")
