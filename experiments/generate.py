"""Continues prompts with the most likely tokens, with or without an adapter.

python -m experiments.generate --model smollm2-135m --prompt "The capital of France is"
python -m experiments.generate --adapter runs/fedmezo/adapter --instruct --prompt "Name three colours."
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments import _cli
from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.prompts import Style, prompt_ids, text_ids
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.adapter import load_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.generate import generate
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.quantised import BaseType, check_eight_bit, held_as
from fedmezo_jax.llama.registry import load_tokenizer, resolve


@dataclass(frozen=True)
class Config:
    """Model, adapter and prompts."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """text to continue; give the option several times for several prompts, which run as one batch"""
    model: str = "tiny"
    """tiny, smollm2-135m, a model folder, a .gguf file or a hub id owner/name"""
    adapter: Path | None = None
    """folder of a LoRA adapter, as PEFT or the main job writes it"""
    instruct: tyro.conf.FlagCreatePairsOff[bool] = False
    """put each prompt as the instruction into the prompt style on which the adapter was trained"""
    prompt_style: Style = "alpaca"
    """that style: alpaca, plain, question-answer or chat, as in experiments.fedmezo"""
    max_new_tokens: int = 64
    """most tokens to add to each prompt"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the products with base weights"""
    base: BaseType | None = None
    """how the base weights are held: float32, bfloat16, int8, fp8, int4 or as-stored; by default as the precision"""
    eight_bit_products: tyro.conf.FlagCreatePairsOff[bool] = False
    """multiply the layers' projections in int8 or fp8 by activations that are rounded to the same type, row by row"""
    out: Path = Path("runs/generate")
    """folder for config.json and results.json"""

    def __post_init__(self):
        """Checks the options."""
        check_eight_bit(self.eight_bit_products, self.base)
        if self.prompt_style != "alpaca" and not self.instruct:
            raise UserError(f"--prompt-style {self.prompt_style} is for instructions: add --instruct")


def main(config: Config) -> None:
    """Loads the model, generates, prints the texts and writes the folder."""
    start = time.perf_counter()
    if not config.prompt:
        raise UserError('no prompt is given: add --prompt "…", once or several times')
    folder = resolve(config.model)
    llama, tokenizer = LlamaConfig.from_json(folder), load_tokenizer(folder)
    adapter = None if config.adapter is None else load_adapter(config.adapter, llama)
    scale, trained = (1.0, None) if adapter is None else (adapter.alpha / adapter.rank, adapter.trained)
    if config.instruct:
        tokens = prompt_ids([Example(text, "", "", "") for text in config.prompt], tokenizer, config.prompt_style)
    else:
        tokens = text_ids(config.prompt, tokenizer)
    base = load_base(folder, llama, *held_as(config))
    model = Llama(llama, scale, config.precision, eight_bit=config.eight_bit_products, trained=trained)
    lora, name = {} if adapter is None else adapter.lora, f"--model {config.model}"
    generated = generate(model, base, lora, tokens, config.max_new_tokens, name=name)
    rows = [
        {
            "prompt": text,
            "response": tokenizer.decode(new_tokens, skip_special_tokens=True),
            "prompt_tokens": len(prompt_tokens),
            "new_tokens": len(new_tokens),
        }
        for text, prompt_tokens, new_tokens in zip(config.prompt, tokens, generated, strict=True)
    ]
    _cli.write_folder(config, rows, time.perf_counter() - start)
    _cli.print_table(f"{config.model}{f' with {config.adapter}' if config.adapter else ''}", rows)
    print(f"{config.out}: config.json, results.json")


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
