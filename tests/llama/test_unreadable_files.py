"""Files that the system will not give, or that ask for too much: one line names them and blames no sound file."""

import json
import os
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import small_weights, write_gguf
from llama_files import SMALL, small_tensors
from test_llama_gguf_tokenizer import write_byte_level
from test_llama_sentencepiece import LLAMA, train
from weight_files import write_in

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama import folder as folder_module
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.checkpoints.gguf import open_gguf
from fedmezo_jax.llama.checkpoints.gguf_folder import convert_gguf
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.folder import read_json_object
from fedmezo_jax.llama.registry import load_tokenizer, resolve

CONFIG = LlamaConfig.from_json(SMALL)
NOBODY = 65534
# A merge that is shorter than the prefix of subwords: the tokenizers library panics.
PANIC = json.dumps(
    {
        "version": "1.0",
        "model": {
            "type": "BPE",
            "continuing_subword_prefix": "a long prefix",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": [["a", "b"]],
        },
    }
)


@pytest.fixture
def public():
    """A folder that any user of the machine may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def forbidden(path):
    """Nobody may read or write ``path``; not root either, whom the mode alone does not stop."""
    mode, root = path.stat().st_mode, os.geteuid() == 0
    path.chmod(0)
    try:
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("safetensors", "model.safetensors"),
        ("sharded safetensors", "model-00002-of-00003.safetensors"),
        ("sharded safetensors", "model.safetensors.index.json"),
        ("flax", "flax_model.msgpack"),
        ("gguf", "model.gguf"),
    ],
)
def test_weights_that_may_not_be_read_are_not_called_damaged(public, form, name):
    write_in(form, public, SMALL, small_tensors())
    load_base(public, CONFIG)
    with forbidden(public / name):
        message = refusal(lambda: load_base(public, CONFIG))
    assert f"{public / name}: cannot be read (Permission denied); check its permissions" in message
    assert "damaged" not in message
    assert "fetch" not in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_tokenizer_s_file_that_may_not_be_read_is_named(public, name):
    if name == "tokenizer.model":
        folder = public
        train(folder, **LLAMA)
    else:
        convert_gguf(write_gguf(public / "model.gguf", small_weights()), folder := public / "out")
    load_tokenizer(folder)
    with forbidden(folder / name):
        message = refusal(lambda: LlamaConfig.from_json(folder) if name == "config.json" else load_tokenizer(folder))
    assert message.startswith(f"{folder / name}: cannot be read (Permission denied)")


def test_a_folder_that_may_not_be_entered_is_named(public):
    folder = write_in("safetensors", public / "model", SMALL, small_tensors())
    (folder / "tokenizer.json").write_text("{}")
    resolve(str(folder))
    with forbidden(folder):
        assert refusal(lambda: resolve(str(folder))).startswith(f"{folder}: cannot be read (Permission denied)")
    with forbidden(public):
        assert refusal(lambda: resolve(str(folder))).startswith(f"{folder}: cannot be read (Permission denied)")


@pytest.mark.parametrize("kind", ["forbidden", "a file"])
def test_a_cache_that_cannot_be_written_names_the_variable(public, monkeypatch, kind):
    file = write_gguf(public / "model.gguf", small_weights())
    cache = public / "cache"
    monkeypatch.setenv("FEDMEZO_CACHE", str(cache))
    resolve(str(file))
    file = write_gguf(public / "model.gguf", small_weights(seed=1))
    if kind == "a file":
        cache.rename(public / "old")
        cache.write_text("")
        message = refusal(lambda: resolve(str(file)))
    else:
        with forbidden(cache):
            message = refusal(lambda: resolve(str(file)))
    assert message.startswith(f"{cache}: the model cache cannot be written")
    assert "set FEDMEZO_CACHE to another folder" in message


def test_a_device_or_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert "config.json: is no ordinary file" in refusal(lambda: LlamaConfig.from_json(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    assert "config.json: is no ordinary file" in refusal(lambda: LlamaConfig.from_json(tmp_path))


@pytest.mark.parametrize("depth", [101, 990, 100_000])
def test_json_nested_too_deeply_is_one_clear_error(tmp_path, depth):
    file = tmp_path / "config.json"
    file.write_text('{"x": ' + "[" * 99 + "]" * 99 + "}")
    assert read_json_object(file)
    file.write_text('{"x": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}")
    assert refusal(lambda: read_json_object(file)) == f"{file}: is nested deeper than 100 levels; fetch it again"


def test_json_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_JSON_BYTES", 1 << 20)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"x": "y" * ((1 << 20) - 9)}))
    assert file.stat().st_size == 1 << 20
    assert read_json_object(file)
    file.write_bytes(file.read_bytes() + b" ")
    assert "config.json: is larger than 1 MiB" in refusal(lambda: read_json_object(file))


def test_a_token_id_that_would_exhaust_the_memory_is_refused(tmp_path):
    convert_gguf(write_gguf(tmp_path / "model.gguf", small_weights()), tmp_path / "out")
    file = tmp_path / "out" / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"]["vocab"]["zz"] = 2**31
    file.write_text(json.dumps(document))
    message = refusal(lambda: load_tokenizer(tmp_path / "out"))
    assert message.startswith(f"{file}: its vocabulary has the id 2147483648 for 'zz'")


@pytest.mark.parametrize(
    ("changed", "blamed"),
    [
        ({"name": "tokenizer_config.json", "text": "{"}, "tokenizer_config.json: is not valid JSON"),
        ({"name": "special_tokens_map.json", "text": "[]"}, "special_tokens_map.json: holds a JSON list"),
        ({"name": "tokenizer_config.json", "text": '{"eos_token": 7}'}, "out: tokenizer_config.json does not fit"),
        ({"name": "tokenizer_config.json", "text": '{"model_max_length": "x"}'}, "out: tokenizer_config.json does not"),
        ({"name": "tokenizer.json", "text": PANIC}, "tokenizer.json: is no tokenizer that can be read"),
        ({"name": "tokenizer.json", "text": '{"model": 1}'}, "tokenizer.json: is no tokenizer that can be read"),
    ],
)
def test_the_tokenizer_s_file_at_fault_is_blamed(tmp_path, changed, blamed):
    convert_gguf(write_gguf(tmp_path / "model.gguf", small_weights()), tmp_path / "out")
    load_tokenizer(tmp_path / "out")
    (tmp_path / "out" / changed["name"]).write_text(changed["text"])
    assert blamed in refusal(lambda: load_tokenizer(tmp_path / "out"))


def test_a_length_beyond_the_end_of_a_msgpack_file_takes_no_memory(tmp_path):
    write_in("flax", tmp_path, SMALL, small_tensors())
    load_base(tmp_path, CONFIG)
    for header in (b"\xdb", b"\xc6", b"\xdd", b"\xdf"):  # a text, bytes, a list and a map of 2**32 - 1
        (tmp_path / "flax_model.msgpack").write_bytes(b"\x81\xa1x" + header + b"\xff" * 4 + b"\xa1y")
        tracemalloc.start()
        message = refusal(lambda: load_base(tmp_path, CONFIG))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "flax_model.msgpack: is damaged" in message
        assert peak < 10 << 20


@pytest.mark.parametrize("kind", [gguf.GGUFValueType.UINT8, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY])
def test_a_length_beyond_the_end_of_a_gguf_file_is_refused(tmp_path, kind):
    array = int(gguf.GGUFValueType.ARRAY).to_bytes(4, "little") + int(kind).to_bytes(4, "little")
    field = (1).to_bytes(8, "little") + b"x" + array + (2**60).to_bytes(8, "little")
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (tmp_path / "model.gguf").write_bytes(header + field + bytes(64))
    assert "is no readable GGUF file" in refusal(lambda: open_gguf(tmp_path / "model.gguf"))


def test_gguf_merges_of_a_token_that_is_not_there_are_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"model.gguf: its tokenizer's metadata do not fit together .*out of vocab"):
        write_byte_level(tmp_path, "llama-bpe", token_merges=["Ġ nowhere"])


def test_a_tensor_that_a_gguf_file_lacks_is_told_of_that_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMEZO_CACHE", str(tmp_path / "cache"))
    weights = small_weights()
    del weights["blk.1.ffn_up.weight"]
    file = write_gguf(tmp_path / "model.gguf", weights)
    message = refusal(lambda: resolve(str(file)))
    assert message.startswith(f"{file}: does not fit its metadata: missing: model.layers.1.mlp.up_proj.weight")
    assert "cache" not in message
    assert not (tmp_path / "cache").exists()


def test_a_gguf_scale_that_is_not_finite_is_an_error_and_no_warning(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", small_weights(), kind="Q8_0")
    data = bytearray(file.read_bytes())
    stored = open_gguf(file).tensors["model.layers.1.mlp.up_proj.weight"]
    data[stored.offset : stored.offset + 2] = np.float16(np.inf).tobytes()
    file.write_bytes(data)
    assert "not finite" in refusal(lambda: convert_gguf(file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
