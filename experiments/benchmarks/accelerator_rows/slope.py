"""Error of the projected gradient by precision, on ``tiny`` and its generated data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.benchmarks import precision
from fedmezo_jax.llama.precision import expected_error
from fedmezo_jax.run.config import paper_config
from fedmezo_jax.run.prepare import prepare


def measure(wanted: Sequence[str], card: Any, scale: float, probes: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each precision, beside the error that a run on SmolLM2-135M would be told to expect.

    Args:
        wanted: names of the rows.
        card: not used.
        scale: perturbation scale μ.
        probes: directions.
    """
    del card
    setup, missing = prepare(paper_config(test_examples=8, base="bfloat16")), set(wanted)
    for row in precision.measure(setup, [scale], 2, probes):
        name = f"slope {row['precision']}"
        if name in missing:
            yield {
                "row": name,
                "precision": row["precision"],
                "perturbation_scale": scale,
                "probes": probes,
                "relative_error": row["error"],
                "expected_error": expected_error(row["precision"], scale),
            }
            missing.remove(name)
        if not missing:
            return
