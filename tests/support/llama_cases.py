"""The tiny random models of ``make_goldens``, loaded, with LoRA trees and rows for them."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import make_goldens
import numpy as np
from safetensors.numpy import load_file, save_file

from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import TARGETS, lora_shapes


@cache
def load(case, dtype="float32"):
    """Config and base of a case."""
    with TemporaryDirectory() as scratch:
        folder = write_case(Path(scratch) / "model", case)
        config = LlamaConfig.from_json(folder)
        return config, load_base(folder, config, dtype)


def write_case(folder, case):
    """The model folder of a case: its weights are drawn under Hugging Face's names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_goldens.raw_config(case)))
    save_file(make_goldens.tensors(case), folder / "model.safetensors")
    return folder


@cache
def golden(case):
    """Hugging Face's numbers as stored, by level."""
    stored = load_file(make_goldens.GOLDENS if case in make_goldens.CASES else make_goldens.FAMILY_GOLDENS)
    return {name.rpartition("/")[2]: value for name, value in stored.items() if name.rpartition("/")[0] == case}


def random_lora(config, targets=TARGETS, rank=4, seed=3):
    """A LoRA tree as after some training: B is not zero."""
    draw = np.random.RandomState(seed)
    return {
        name: {half: np.float32(0.2 * draw.standard_normal(shape)) for half, shape in halves.items()}
        for name, halves in lora_shapes(config, rank, targets).items()
    }


def random_rows(*lead, length=16, labels=9):
    """Rows whose labels lie anywhere, 1 to ``labels`` in each, with padding that would show if it counted."""
    draw, shape = np.random.RandomState(5), (*lead, labels)
    counts = draw.randint(1, labels + 1, lead)[..., None]
    return TokenBatch(
        draw.randint(0, 61, (*lead, length)).astype(np.int32),
        draw.randint(0, length, shape).astype(np.int32),
        draw.randint(0, 61, shape).astype(np.int32),
        (np.arange(labels) < counts).astype(np.float32),
    )
