"""Whether a short run of ``tiny`` is the same bits again, from its ledger, and on a CPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedmezo_jax.llama.checkpoints.adapter import load_adapter
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.run import ledger
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.job import fine_tune
from fedmezo_jax.run.replay import largest_difference, replay

TINY = str(Path(ledger.__file__).parents[1] / "llama" / "tiny")
_SIZES = {"clients": 4, "local_steps": 5, "test_examples": 8}


def measure(wanted: Sequence[str], card: Any, folder: str, precision: Precision, rounds: int) -> Iterator[dict]:
    """Yields one row: the run against itself once more, and against its replay.

    Args:
        wanted: the row's name.
        card: not used.
        folder: where the runs go; :func:`compare` needs them.
        precision: of the products with frozen weights.
        rounds: rounds T.
    """
    del card
    start = time.perf_counter()
    first, again = (_run(Path(folder) / f"{name}-{precision}", precision, rounds) for name in ("card", "again"))
    seconds = time.perf_counter() - start
    _save_rounds(first, rounds)
    replayed = largest_difference(_adapter(first), replay(first / "run.ledger").params)
    repeated = largest_difference(_adapter(first), _adapter(again))
    yield {
        "row": wanted[0],
        "precision": precision,
        "rounds": rounds,
        "run_seconds": seconds / 2,
        "replay_bit_exact": replayed is None,
        "replay_largest_difference": replayed or 0.0,
        "repeat_bit_exact": repeated is None and _records(first) == _records(again),
        "repeat_largest_difference": repeated or 0.0,
    }


def compare(wanted: Sequence[str], card: Any, folder: str, precision: Precision, rounds: int) -> Iterator[dict]:
    """Yields one row: the run of :func:`measure` against the same on this process's device, a CPU.

    ``…_parts_in_round`` is the first round, from 1, whose bits differ, or None. The ledger's records are compared
    without their hashes and without the header, which names the device.
    """
    del card
    theirs = Path(folder) / f"card-{precision}"
    theta, records = [_theta(theirs)], [_records(theirs)]
    ours = _run(Path(folder) / f"cpu-{precision}", precision, rounds)
    _save_rounds(ours, rounds)
    theta, records = [*theta, _theta(ours)], [*records, _records(ours)]
    row: dict[str, Any] = {"row": wanted[0], "precision": precision, "rounds": rounds}
    for name, (one, other) in {"theta": theta, "ledger": records}.items():
        apart = [differing_bits(a, b) for a, b in zip(one, other, strict=True)]
        row |= {
            f"{name}_bits": sum(8 * len(part) for part in other),
            f"{name}_bits_apart": sum(apart),
            f"{name}_parts_in_round": next((t for t, count in enumerate(apart, 1) if count), None),
        }
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (theirs, ours)]
    difference = largest_difference(_adapter(theirs), _adapter(ours))
    yield row | {"adapter_bits_apart": differing_bits(*adapters), "adapter_largest_difference": difference or 0.0}


def differing_bits(one: bytes, other: bytes) -> int:
    """How many bits differ; what one has more than the other counts whole."""
    common = min(len(one), len(other))
    arrays = (np.frombuffer(content[:common], np.uint8) for content in (one, other))
    return int(np.bitwise_count(np.bitwise_xor(*arrays)).sum()) + 8 * abs(len(one) - len(other))


def _run(folder: Path, precision: Precision, rounds: int) -> Path:
    shutil.rmtree(folder, ignore_errors=True)  # of a measurement that was cut off
    config = paper_config(precision=precision, rounds=rounds, **_SIZES)
    fine_tune(config, folder, check_rate=False, eval_every=rounds)
    return folder


def _save_rounds(folder: Path, rounds: int) -> None:
    """Keeps θ after each round, as the ledger gives it on this device."""
    thetas = [jax.tree.leaves(replay(folder / "run.ledger", until=t + 1).params) for t in range(rounds)]
    np.save(folder / "theta.npy", [np.concatenate([np.ravel(leaf) for leaf in theta]) for theta in thetas])


def _theta(folder: Path) -> list[bytes]:
    return [theta.tobytes() for theta in np.load(folder / "theta.npy", allow_pickle=False)]


def _records(folder: Path) -> list[bytes]:
    _, *records = ledger.records(folder / "run.ledger")
    return [record.payload for record in records]


def _adapter(folder: Path) -> Any:
    return jax.device_get(load_adapter(folder / "adapter", named_shape(TINY)).lora)
