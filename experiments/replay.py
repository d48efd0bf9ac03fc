"""Rebuilds the adapter of any round of a run from its ledger alone, without data, and checks it against the run's.

python -m experiments.replay runs/fedmezo/run.ledger
python -m experiments.replay runs/fedmezo/run.ledger --model FOLDER --round 10 --out runs/round10

Exits with 2 if the ledger or the base model is refused, and with 3 if the adapter beside the ledger is another one.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.progress import Progress

from experiments import _cli
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.adapter import load_adapter, save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.checkpoints.layout import leaves
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import lora_shapes
from fedmezo_jax.llama.registry import resolve, resolve_local
from fedmezo_jax.run import ledger, ledger_checks, run_folder
from fedmezo_jax.run.config import RunConfig
from fedmezo_jax.run.context import start, stored_type
from fedmezo_jax.run.replay import largest_difference, replay


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
    seed: int = 0
    """has no part in this: the ledger knows the run's"""
    out: Path = Path("runs/replay")
    """folder for adapter/, config.json and results.json"""


def main(config: Config) -> None:
    """Verifies the ledger and the base, rebuilds the adapter, compares it and writes the folder."""
    begin = time.perf_counter()
    if config.round is not None and config.round < 0:
        raise UserError(f"--round must be 0 or more, not {config.round}")
    header = ledger.read_header(config.ledger)
    *_, last = ledger.records(config.ledger)  # the whole chain, before anything is computed
    torn = config.ledger.stat().st_size - last.end
    print(f"{config.ledger}: {last.index} rounds, {last.end:,} bytes, every checksum holds")
    if torn:
        print(f"notice: its last record was cut short: {torn} bytes are not looked at")
    run = ledger_checks.run_config(header, config.ledger)
    for _ in ledger_checks.entries(config.ledger, run):
        pass
    if last.index < run.rounds:
        print(f"notice: the ledger ends after round {last.index} of {run.rounds}: the run was stopped or is not over")
    folder = _base(config, run)
    llama = LlamaConfig.from_json(folder)
    _check_rank(run, llama, config.ledger)
    if ledger.tree_hash(load_base(folder, llama, stored_type(run.precision or "float32"))) != header["base_hash"]:
        raise UserError(f"--model {config.model or run.model}: its weights are not those that the run was on")
    verified = time.perf_counter()
    until = last.index if config.round is None else config.round
    with Progress() as bar:
        task = bar.add_task("rounds", total=until)
        lora, done = replay(config.ledger, run, start(run, llama), until, lambda done: bar.update(task, completed=done))
    reconstructed = time.perf_counter()

    settings: dict[str, Any] = {"rank": run.lora_rank, "alpha": run.lora_alpha, "targets": run.target_names}
    save_adapter(config.out / "adapter", lora, **settings, base_name=config.model or run.model)
    beside = config.ledger.parent / "adapter"
    row: dict[str, Any] = {"rounds": done, "ledger_bytes": last.end, "verify_seconds": verified - begin}
    row |= {
        "rebuild_seconds": reconstructed - verified,
        "compared": False,
        "bit_identical": None,
        "largest_difference": None,
    }
    if done == run.rounds and beside.exists():
        difference = largest_difference(jax.device_get(load_adapter(beside, llama).lora), lora)
        row |= {"compared": True, "bit_identical": difference is None, "largest_difference": difference or 0.0}
    paths = {"ledger": str(config.ledger), "out": str(config.out)}
    run_folder.write_json(config.out / "config.json", asdict(config) | paths)
    _cli.write_results(config.out, [row], time.perf_counter() - begin)
    _cli.print_table(f"adapter after round {done}: {config.out / 'adapter'}", [row])
    print(_verdict(row, header))
    if row["compared"] and not row["bit_identical"]:
        sys.exit(3)


def _base(config: Config, run: RunConfig) -> Path:
    """The folder of the base model. A ledger alone does not make this machine fetch anything."""
    if config.model is not None:
        return resolve(config.model)
    folder = resolve_local(run.model)
    if folder is None:
        raise UserError(
            f"{config.ledger}: its base model {run.model} is not on this machine: to fetch it, give --model "
            f"{run.model}; or give --model FOLDER"
        )
    return folder


def _check_rank(run: RunConfig, llama: LlamaConfig, file: Path) -> None:
    """Refuses an adapter that is larger than its base and than a gigabyte, before there is room made for it."""
    shapes = lora_shapes(llama, run.lora_rank, run.target_names)
    size = sum(math.prod(shape) for half in shapes.values() for shape in half.values())
    base = sum(map(math.prod, leaves(llama).values()))
    if size > max(base, 2**28):
        raise UserError(f"{file}: lora_rank {run.lora_rank} means {size:,} parameters, more than the model has")


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
