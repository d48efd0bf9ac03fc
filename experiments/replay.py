"""Rebuilds the adapter of any round of a run from its ledger alone, without data, and checks it against the run's.

python -m experiments.replay runs/fedmezo/run.ledger
python -m experiments.replay runs/fedmezo/run.ledger --model FOLDER --round 10 --out runs/round10
python -m experiments.replay runs/fedmezo/run.ledger --without 3 --out runs/without3

Exits with 2 if the ledger or the base model is refused, and with 3 if the adapter beside the ledger is another one.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.progress import Progress

from experiments import _cli
from fedmezo_jax.llama.checkpoints.adapter import load_adapter, save_adapter
from fedmezo_jax.llama.lora import trained_layers
from fedmezo_jax.run.replay import VerifiedLedger, largest_difference, replay


@dataclass(frozen=True)
class Config:
    """What to rebuild."""

    ledger: tyro.conf.Positional[Path]
    """the run.ledger in a run's folder"""
    model: str | None = None
    """the run's base model, whose weights are checked against the ledger, fetched where that is needed; by default the
    one that the run names, if it is on this machine"""
    round: int | None = None
    """round to go up to; by default the last"""
    identities: Path | None = None
    """the public keys that a signed ledger must be signed with, an identities.json; by default those in the ledger"""
    without: int | None = None
    """a client whose numbers are left out of every round; how near that comes to a run that never had it, see the study
    experiments.studies.forgetting"""
    out: Path = Path("runs/replay")
    """folder for adapter/, config.json and results.json"""


def main(config: Config) -> None:
    """Verifies the ledger and the base, rebuilds the adapter, compares it and writes the folder."""
    begin = time.perf_counter()
    with Progress() as bar:
        task, verified = bar.add_task("rounds", total=None), begin

        def start(verified_ledger: VerifiedLedger) -> None:
            nonlocal verified
            bar.update(task, total=verified_ledger.rounds if config.round is None else config.round)
            verified = time.perf_counter()

        def show(done: int) -> None:
            bar.update(task, completed=done)

        notify = partial(bar.console.print, soft_wrap=True, markup=False, highlight=False)
        replayed = replay(
            config.ledger,
            config.model,
            config.round,
            identities=config.identities,
            without=config.without,
            on_start=start,
            on_round=show,
            notify=notify,
        )
    reconstructed = time.perf_counter()
    verified_ledger, lora, done = replayed
    run = verified_ledger.config

    settings: dict[str, Any] = {"rank": run.lora_rank, "alpha": run.lora_alpha, "targets": run.target_names}
    if verified_ledger.llama is not None:
        settings["trained"] = trained_layers(run.layers, verified_ledger.llama)
    save_adapter(config.out / "adapter", lora, **settings, base_name=config.model or run.model)
    beside = config.ledger.parent / "adapter"
    row: dict[str, Any] = {"rounds": done, "ledger_bytes": verified_ledger.size, "verify_seconds": verified - begin}
    row |= {
        "rebuild_seconds": reconstructed - verified,
        "compared": False,
        "bit_identical": None,
        "largest_difference": None,
    }
    if done == run.rounds and config.without is None and beside.exists():
        assert verified_ledger.llama is not None  # as no task was given
        difference = largest_difference(jax.device_get(load_adapter(beside, verified_ledger.llama).lora), lora)
        row |= {"compared": True, "bit_identical": difference is None, "largest_difference": difference or 0.0}
    _cli.write_folder(config, [row], time.perf_counter() - begin)
    _cli.print_table(f"adapter after round {done}: {config.out / 'adapter'}", [row])
    if config.without is None:
        print(_verdict(row, verified_ledger.header))
    else:
        print(f"not compared: this adapter is without the numbers of client {config.without}")
    if row["compared"] and not row["bit_identical"]:
        sys.exit(3)


def _verdict(row: dict[str, Any], header: dict[str, Any]) -> str:
    if not row["compared"]:
        return "not compared: the run's folder has no adapter of this round"
    if row["bit_identical"]:
        return "the rebuilt adapter is the run's, bit for bit"
    device = jax.devices()[0]
    here = {"platform": device.platform, "device": device.device_kind, "devices": jax.device_count()}
    there = header["backend"]
    return (
        f"the rebuilt adapter differs from the run's by at most {row['largest_difference']:.3g}: the run was on "
        f"{there} with JAX {header['versions']['jax']}, this is {here} with JAX {jax.__version__}. Where these are the "
        "same, the adapter or the ledger is not the run's, or a client's LoRA was not that of its coefficients; where "
        "they are not, small differences come from rounding"
    )


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
