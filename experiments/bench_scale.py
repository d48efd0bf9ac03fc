"""Times rounds of more and more clients in blocks: memory stays flat, and a client costs the same.

python -m experiments.bench_scale
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax

from experiments import common
from experiments.bench_step import Setting, random_case
from fedmezo_jax import client, federated, mezo, run_folder, server
from fedmezo_jax.llama.loss import pair_loss_of
from fedmezo_jax.llama.precision import Precision
from fedmezo_jax.llama.shapes import named_shape


@dataclass(frozen=True)
class Config:
    """What to time."""

    model: str = "smollm2-135m"
    """a shape known by name (smollm2-135m, llama-3b, …) or the path of a config.json"""
    clients: str = "8,64,512,1000"
    """numbers of clients"""
    block: int = 8
    """clients that run at once"""
    length: int = 32
    """tokens in the one row of a client, half of them labelled"""
    rank: int = 8
    """LoRA rank"""
    targets: str = "q_proj,v_proj"
    """projections with an adapter"""
    precision: Precision = "float32"
    """of the products with frozen weights"""
    seed: int = 0
    """of weights and rows"""
    out: Path = Path("runs/bench_scale")
    """folder for config.json and results.json"""


def main(config: Config) -> None:
    """Times rounds of one local step at each number, prints the table and writes the folder."""
    begin = time.perf_counter()
    llama, rows = named_shape(config.model), []
    for count in map(int, config.clients.split(",")):
        setting = Setting(count, 1, config.length, config.rank)
        case = random_case(llama, setting, config.targets.split(","), config.precision, config.seed)
        work = client.mezo_work(mezo.MezoConfig())
        init, round = federated.federated(work, server.RateConfig(1e-5), block_size=config.block)
        arguments = (init(case.lora, count), pair_loss_of(case.model, case.base), case.cohort, case.key)
        compiled = jax.jit(round.work).lower(*arguments).compile()
        plan = compiled.memory_analysis()
        assert plan is not None  # on this machine's own devices there is one
        ready = replace(round, work=compiled)
        seconds = []
        while len(seconds) < 3 and sum(seconds) < 20:  # a first short round still compiles the server's half
            start = time.perf_counter()
            jax.block_until_ready(ready(*arguments))
            seconds.append(time.perf_counter() - start)
        rows.append(
            {
                "clients": count,
                "temp_bytes": plan.temp_size_in_bytes,
                "seconds": min(seconds),
                "seconds_per_client": min(seconds) / count,
                "over_first": min(seconds) / count / rows[0]["seconds_per_client"] if rows else 1.0,
            }
        )
        print(f"{count} clients: {rows[-1]['seconds']:.2f} s", flush=True)
    config.out.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(config.out / "config.json", asdict(config) | {"out": str(config.out)})
    common.write_results(config.out, rows, time.perf_counter() - begin)
    common.print_table(f"{config.model}, {config.length} tokens a client, {config.block} clients at once", rows)


if __name__ == "__main__":
    common.run(main, Config, __doc__)
