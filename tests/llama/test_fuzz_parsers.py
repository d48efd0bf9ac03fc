"""Whatever a model's or an adapter's file holds, it is read or refused in one line: no other exception comes out."""

import json

import numpy as np
import pytest
from fuzzing import fuzz, mutated_bytes, mutated_json
from gguf_files import small_weights, write_gguf
from llama_files import LINEAR, SMALL, small_tensors
from test_llama_gguf_tokenizer import PIECES
from test_llama_sentencepiece import LLAMA, train
from weight_files import LLAMA3, shapes_of, weights_of, write_gguf_model, write_in

from fedmezo_jax.llama.checkpoints.adapter import load_adapter, save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.checkpoints.gguf_folder import convert_gguf
from fedmezo_jax.llama.checkpoints.weights import check_folder
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.registry import load_tokenizer

CONFIG = LlamaConfig.from_json(SMALL)
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"


def use_tokenizer(folder):
    """What a run does with a tokenizer."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("the <s>cat 20").input_ids
    tokenizer.decode(ids, skip_special_tokens=True)
    tokenizer.convert_ids_to_tokens(ids)
    return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template


def tokenizer_folder(folder):
    """A folder with ``tokenizer.json`` and its settings."""
    convert_gguf(write_gguf(folder / "model.gguf", small_weights()), folder / "out")
    settings = folder / "out" / "tokenizer_config.json"
    special = {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}
    more = {"chat_template": TEMPLATE, "added_tokens_decoder": {"0": special}, "add_bos_token": False}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | more))
    return folder / "out"


def config(folder):
    rope = {"rope_type": "linear", "factor": 2.0}
    write_in("safetensors", folder, SMALL | {"rope_scaling": rope, "eos_token_id": [2, 3]}, small_tensors())
    return folder / "config.json", lambda: check_folder(folder), mutated_json


def weights(form, name, mutate):
    def case(folder):
        write_in(form, folder, SMALL, small_tensors())
        return folder / name, lambda: load_base(folder, CONFIG), mutate

    return case


def safetensors_header(folder):
    """The JSON of the header, under its right length."""
    write_in("safetensors", folder, SMALL, small_tensors())

    def mutate(whole, draw):
        size = int.from_bytes(whole[:8], "little")
        header = mutated_json(whole[8 : 8 + size], draw)
        return len(header).to_bytes(8, "little") + header + whole[8 + size :]

    return folder / "model.safetensors", lambda: load_base(folder, CONFIG), mutate


def gguf(folder):
    file, count = write_gguf(folder / "model.gguf", small_weights(), kind="Q8_0"), iter(range(10**9))
    return file, lambda: convert_gguf(file, folder / f"out{next(count)}"), mutated_bytes


def gguf_of_llama3(folder):
    """With rotary factors, and a tokenizer of sentencepiece's kind."""
    raw = shapes_of(2, True, True, False) | {"vocab_size": len(PIECES), "rope_scaling": LLAMA3, "head_dim": 16}

    def metadata(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece for piece, _, _ in PIECES])
        writer.add_token_scores([score for _, score, _ in PIECES])
        writer.add_token_types([kind for _, _, kind in PIECES])

    file = write_gguf_model(folder / "model.gguf", raw, weights_of(raw), metadata=metadata)
    count = iter(range(10**9))
    return file, lambda: convert_gguf(file, folder / f"out{next(count)}"), mutated_bytes


def tokenizer_json(folder):
    folder = tokenizer_folder(folder)
    return folder / "tokenizer.json", lambda: use_tokenizer(folder), mutated_json


def tokenizer_config(folder):
    folder = tokenizer_folder(folder)
    return folder / "tokenizer_config.json", lambda: use_tokenizer(folder), mutated_json


def tokenizer_model(folder):
    train(folder, **LLAMA)
    return folder / "tokenizer.model", lambda: use_tokenizer(folder), mutated_bytes


def tokenizer_model_settings(folder):
    train(folder, **LLAMA)
    settings = {"add_bos_token": True, "eos_token": {"content": "</s>"}, "pad_token": "<unk>", "chat_template": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer_config.json", lambda: use_tokenizer(folder), mutated_json


def adapter_config(folder):
    leaf = {"A": np.ones((2, LINEAR["self_attn.q_proj"][1], 2)), "B": np.ones((2, 2, 16))}
    save_adapter(folder, {"q_proj": leaf}, rank=2, alpha=4, targets=["q_proj"], base_name="x")
    return folder / "adapter_config.json", lambda: load_adapter(folder, CONFIG), mutated_json


CASES = {
    "config.json": config,
    "tokenizer.json": tokenizer_json,
    "tokenizer_config.json": tokenizer_config,
    "tokenizer.model": tokenizer_model,
    "tokenizer_config.json of tokenizer.model": tokenizer_model_settings,
    "gguf": gguf,
    "gguf of LLaMA 3.1": gguf_of_llama3,
    "shard index": weights("sharded safetensors", "model.safetensors.index.json", mutated_json),
    "safetensors": weights("safetensors", "model.safetensors", mutated_bytes),
    "safetensors header": safetensors_header,
    "flax msgpack": weights("flax", "flax_model.msgpack", mutated_bytes),
    "adapter_config.json": adapter_config,
}


@pytest.mark.parametrize("name", CASES)
def test_mutations_are_read_or_refused_in_one_line(tmp_path, name):
    ends = fuzz(*CASES[name](tmp_path), count=200)
    assert ends.keys() <= {"accepted", "refused"}
    assert ends["refused"] > 20
