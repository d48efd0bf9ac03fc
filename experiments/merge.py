"""Writes a model folder with an adapter merged into its weights, or in another format or dtype.

python -m experiments.merge --model smollm2-135m --adapter runs/fedmezo/adapter --out merged
python -m experiments.merge --model llama.Q4_K_M.gguf --out llama --dtype bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import _cli
from fedmezo_jax.llama.checkpoints.adapter import load_adapter
from fedmezo_jax.llama.checkpoints.base_model import WeightFormat
from fedmezo_jax.llama.checkpoints.export import export
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.registry import resolve


@dataclass(frozen=True)
class Config:
    """What to read and how to write it."""

    out: Path
    """new folder to write"""
    model: str = "tiny"
    """tiny, smollm2-135m, a model folder, a .gguf file or a hub id owner/name"""
    adapter: Path | None = None
    """folder of a LoRA adapter, as PEFT or the main job writes it"""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """of the weights written"""
    form: WeightFormat = "safetensors"
    """safetensors, which transformers opens too, or an Orbax checkpoint"""


def main(config: Config) -> None:
    """Merges, writes the folder and lists its files."""
    folder = resolve(config.model)
    adapter = None if config.adapter is None else load_adapter(config.adapter, LlamaConfig.from_json(folder))
    export(folder, config.out, adapter, config.dtype, config.form)
    rows = [
        {"file": str(file.relative_to(config.out)), "bytes": file.stat().st_size}
        for file in sorted(config.out.rglob("*"))
        if file.is_file()
    ]
    _cli.print_table(str(config.out), rows)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
