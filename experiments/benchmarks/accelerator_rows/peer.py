"""The same step by PyTorch and PEFT on the same card, alternately with a round of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.accelerator_rows.speed import TARGETS
from experiments.benchmarks.pytorch_baseline import peer_steps
from experiments.benchmarks.step import Setting, alternate, compile_round, random_case
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.shapes import named_shape

_REPEATS = 3


def measure(
    wanted: Sequence[str], card: Any, model: str, clients: int, length: int, rank: int, precision: Precision
) -> Iterator[dict[str, Any]]:
    """Yields a row for our round, PyTorch's zeroth-order step and its back-propagation, best seconds of each.

    Args:
        wanted: names of the three rows.
        card: not used.
        model: a shape known by name, or a folder.
        clients: clients; PyTorch's run one after the other.
        length: tokens of an example, half of them labels.
        rank: LoRA rank.
        precision: of our round; beside ``paired`` PyTorch's is bfloat16.

    Raises:
        UserError: PyTorch or PEFT is not installed, or sees no such card.
    """
    del card
    shape, device = named_shape(model), _torch_device()
    dtype = "bfloat16" if precision == "paired" else precision
    steps = peer_steps(shape, clients, 1, length, rank, list(TARGETS), dtype, device)
    ours = compile_round(random_case(shape, Setting(clients, 1, length, rank), list(TARGETS), precision, 0))
    times = alternate({"fedmezo": ours.run, "torch mezo": steps.mezo, "torch backprop": steps.backprop}, _REPEATS)
    for name, (what, seconds) in zip(wanted, times.items(), strict=True):
        peak = _peak(device, steps.mezo if what == "torch mezo" else steps.backprop) if what != "fedmezo" else None
        yield {
            "row": name,
            "model": Path(model).name,
            "what": what,
            "precision": precision if what == "fedmezo" else dtype,
            "clients": clients,
            "length": length,
            "rank": rank,
            "seconds": min(seconds),
            "over_fedmezo": min(seconds) / min(times["fedmezo"]),
            "torch_peak_bytes": peak,
            "torch": version("torch"),
            "peft": version("peft"),
        }


def _torch_device() -> str:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"PyTorch is not installed ({error})") from None
    if jax.devices()[0].platform == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU")
    return "cuda"


def _peak(device: str, step: Any) -> int | None:
    """Most bytes that PyTorch had allocated during a step; None on a CPU."""
    if device == "cpu":
        return None
    import torch

    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()
