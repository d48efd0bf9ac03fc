"""Every format holds the same model: equal leaves, equal errors, bounded memory, and straight onto a mesh."""

import contextlib
import dataclasses
import json
from itertools import product

import jax
import msgpack
import numpy as np
import pytest
from flax import serialization
from llama_files import SMALL, small_tensors
from weight_files import (
    FAMILIES,
    FORMS,
    IN_GGUF,
    LLAMA3,
    assert_same,
    flax_tree,
    save_flax,
    shapes_of,
    stacked,
    weights_of,
    write_gguf_model,
    write_in,
)

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints import flax_msgpack
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.checkpoints.gguf import open_gguf
from fedmezo_jax.llama.checkpoints.gguf_config import read_gguf_config
from fedmezo_jax.llama.config import LlamaConfig


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("attention_bias", "mlp_bias"), list(product((False, True), repeat=2)))
def test_every_format_holds_the_same_model(tmp_path, form, attention_bias, mlp_bias):
    for heads, tied in product((1, 2, 4), (False, True)):
        raw = shapes_of(heads, tied, attention_bias, mlp_bias)
        tensors = weights_of(raw)
        folder = write_in(form, tmp_path / f"{heads}{tied}", raw, tensors)
        assert_same(load_base(folder, LlamaConfig.from_json(folder)), stacked(tensors))


@pytest.mark.parametrize(
    ("form", "family"), [case for case in product(FORMS, FAMILIES) if case[0] != "gguf" or case[1] in IN_GGUF]
)
def test_every_format_holds_every_family(tmp_path, form, family):
    raw = SMALL | {"architectures": None} | FAMILIES[family]
    tensors = weights_of(raw)
    folder = write_in(form, tmp_path, raw, tensors)
    assert_same(load_base(folder, LlamaConfig.from_json(folder)), stacked(tensors))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "gguf"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_every_format_s_types_are_cast(tmp_path, form, stored):
    tensors = small_tensors()
    folder = write_in(form, tmp_path, SMALL, tensors, dtype=stored)
    for wanted in ("float32", "bfloat16"):
        base = load_base(folder, LlamaConfig.from_json(SMALL), wanted)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {wanted}
        assert_same(jax.tree.map(np.float32, base), stacked(tensors))


@pytest.mark.parametrize("form", FORMS)
def test_misfits_are_told_at_once_in_every_format(tmp_path, form):
    tensors = small_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(12, np.float32)
    tensors["model.layers.1.mlp.up_proj.bias"] = np.zeros(12, np.float32)
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.o_proj.weight"] = np.zeros((16, 8), np.float32)
    raw = SMALL | {"hidden_act": "gelu"}
    write_in(form, tmp_path, raw, tensors)
    with pytest.raises(UserError) as caught:
        load_base(tmp_path, LlamaConfig.from_json(SMALL))
    message = str(caught.value)
    bias = "mlp/up_proj/bias" if "flax" in form else "mlp.up_proj.bias"
    for part in (
        str(tmp_path),
        "missing: model.norm.weight",
        bias.replace("mlp", "model/layers/0/mlp" if "flax" in form else "model.layers.0.mlp"),
        "is [16, 8] and not [8, 16]",
    ):
        assert part in message
    assert "\n" not in message


def test_config_and_weights_are_told_together(tmp_path):
    from fedmezo_jax.llama.checkpoints.weights import check_folder

    tensors = small_tensors()
    del tensors["model.norm.weight"]
    write_in("safetensors", tmp_path, SMALL | {"attn_logit_softcapping": 30.0, "pretraining_tp": 2}, tensors)
    with pytest.raises(UserError) as caught:
        check_folder(tmp_path)
    for part in ("config.json: pretraining_tp is 2", "attn_logit_softcapping", "missing: model.norm.weight"):
        assert part in str(caught.value)


def test_safetensors_win_over_other_formats(tmp_path):
    write_in("flax", tmp_path, SMALL, small_tensors(seed=1))
    write_in("safetensors", tmp_path, SMALL, small_tensors(seed=2))
    assert_same(load_base(tmp_path, LlamaConfig.from_json(SMALL)), stacked(small_tensors(seed=2)))


# Flax


def test_damaged_msgpack_is_one_clear_error(tmp_path):
    write_in("flax", tmp_path, SMALL, small_tensors())
    file = tmp_path / "flax_model.msgpack"
    whole = file.read_bytes()
    config = LlamaConfig.from_json(SMALL)
    at = whole.index(b"float32")
    for damaged in (
        b"",
        whole[:1],
        whole[:100],
        whole[:-1],
        whole + b"\0",
        b"\x80\x04\x95" + whole,  # how a pickle begins
        b"\xc1" + whole,
        b"\x93\x01\x02\x03",
        b"\x81\xa1a" * 100000,
        whole[:at] + b"float64" + whole[at + 7 :],
        whole[:at] + b"object0" + whole[at + 7 :],
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged or cut short|of another type than") as caught:
            load_base(tmp_path, config)
        assert "flax_model.msgpack" in str(caught.value)
    draw = np.random.default_rng(0)
    for _ in range(300):  # wherever a bit flips, the file is read or refused, and never anything else
        broken = bytearray(whole)
        broken[draw.integers(len(whole))] ^= 1 << draw.integers(8)
        file.write_bytes(broken)
        with contextlib.suppress(UserError):
            load_base(tmp_path, config)
    file.write_bytes(whole)
    load_base(tmp_path, config)


def test_an_array_with_fewer_bytes_than_its_shape_needs_is_refused(tmp_path):
    """Otherwise its end would be whatever lay in memory."""

    def pack(array):
        short = array.shape == (12, 8)
        return msgpack.ExtType(1, msgpack.packb((array.shape, "float32", array.tobytes()[: -4 if short else None])))

    tree = flax_tree(small_tensors())
    assert tree["model"]["layers"]["1"]["mlp"]["down_proj"]["kernel"].shape == (12, 8)
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(tree, default=pack))
    with pytest.raises(UserError, match=r"damaged or cut short \(an array of shape \[12, 8\] in float32 has 380 bytes"):
        load_base(tmp_path, LlamaConfig.from_json(SMALL))


def test_an_array_above_a_gibibyte_lies_in_chunks(tmp_path, monkeypatch):
    """``flax.serialization`` cuts at 2**30 bytes; here at 100."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    write_in("flax", tmp_path, SMALL, small_tensors())
    file = tmp_path / "flax_model.msgpack"
    assert b"__msgpack_chunked_array__" in file.read_bytes()
    assert_same(load_base(tmp_path, LlamaConfig.from_json(SMALL)), stacked(small_tensors()))
    whole = file.read_bytes()
    for broken in (
        whole.replace(b"\xa11\xc7", b"\xa19\xc7", 1),
        whole.replace(b"\xa5shape\x82\xa10", b"\xa5shape\x82\xa17", 1),
    ):
        assert broken != whole
        file.write_bytes(broken)
        with pytest.raises(UserError, match="is damaged"):
            load_base(tmp_path, LlamaConfig.from_json(SMALL))


def test_every_size_of_msgpack_header_is_read(tmp_path):
    """Long names, wide maps and small arrays take other header bytes than a LLaMA's."""
    for count, width in ((1, 3), (16, 40), (70000, 300)):
        tree = {f"{i:0{width}}": np.zeros((), np.float32) for i in range(min(count, 70000))}
        if count == 70000:
            tree = {f"{i}": 1 for i in range(count)} | {
                "x" * 300: 1,
                "y" * 70000: None,
                "z": {"a": True, "b": 2**40, "c": 200, "d": 2**17},
            }
        save = msgpack.packb(serialization.to_state_dict(tree), default=serialization._msgpack_ext_pack)
        (tmp_path / "file").write_bytes(save)
        found = flax_msgpack.read_flax_header(tmp_path / "file", LlamaConfig.from_json(SMALL))
        assert {key.split("/")[0] for key in found} == tree.keys()


def test_a_tied_flax_model_may_hold_its_head(tmp_path):
    raw, tensors = SMALL | {"tie_word_embeddings": True}, small_tensors(tied=True)
    embedding = tensors["model.embed_tokens.weight"]
    write_in("flax", tmp_path, raw, tensors)
    for head, fits in ((embedding, True), (embedding + 1, False)):
        save_flax(tensors | {"lm_head.weight": head}, tmp_path / "flax_model.msgpack")
        if fits:
            assert "lm_head" not in load_base(tmp_path, LlamaConfig.from_json(raw))
        else:
            with pytest.raises(UserError, match=r"lm_head.weight in flax_model.msgpack differs"):
                load_base(tmp_path, LlamaConfig.from_json(raw))


def test_a_shard_of_msgpack_that_is_absent_or_damaged_is_named(tmp_path):
    write_in("sharded flax", tmp_path, SMALL, small_tensors())
    second = tmp_path / "flax_model-00002-of-00003.msgpack"
    whole = second.read_bytes()
    second.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"flax_model-00002-of-00003.msgpack: is damaged"):
        load_base(tmp_path, LlamaConfig.from_json(SMALL))
    second.unlink()
    with pytest.raises(UserError, match=r"names files that are not there: flax_model-00002-of-00003.msgpack"):
        load_base(tmp_path, LlamaConfig.from_json(SMALL))


def test_flax_files_are_what_flax_itself_restores(tmp_path):
    """The writer of these tests is sound: Flax's own reader gives the tree back."""
    save_flax(small_tensors(), tmp_path / "file")
    restored = serialization.msgpack_restore((tmp_path / "file").read_bytes())
    assert_same(restored, flax_tree(small_tensors()))


# Orbax


def test_orbax_round_trip_is_exact(tmp_path):
    config = LlamaConfig.from_json(SMALL)
    base = load_base(write_in("safetensors", tmp_path / "a", SMALL, small_tensors()), config, "bfloat16")
    save_base(tmp_path / "b", config, base, dtype="bfloat16", form="orbax")
    assert LlamaConfig.from_json(tmp_path / "b") == config
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_base(tmp_path / "b", config, "bfloat16")
    assert_same(again, base)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(again)} == {"bfloat16"}
    with pytest.raises(UserError, match="holds an Orbax checkpoint already"):
        save_base(tmp_path / "b", config, base, dtype="bfloat16", form="orbax")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_damaged_orbax_checkpoints_are_one_clear_error(tmp_path):
    config = LlamaConfig.from_json(SMALL)
    write_in("orbax", tmp_path, SMALL, small_tensors())
    largest = max((tmp_path / "orbax" / "d").iterdir(), key=lambda file: file.stat().st_size)
    for file in (tmp_path / "orbax" / "_METADATA", tmp_path / "orbax" / "manifest.ocdbt", largest):
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[: len(whole) // 2] + b"?????" + whole[len(whole) // 2 + 5 :]):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=r"orbax: .*(cannot|can) be read"):
                load_base(tmp_path, config)
        file.write_bytes(whole)
    load_base(tmp_path, config)


# GGUF


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 4.0}, YARN, LLAMA3], ids=str)
def test_gguf_metadata_give_the_config(tmp_path, rope):
    for heads, tied, attention_bias, mlp_bias in product((1, 2, 4), *3 * [(False, True)]):
        raw = shapes_of(heads, tied, attention_bias, mlp_bias) | {"rope_scaling": rope, "rope_theta": 500.0}
        raw |= {"max_position_embeddings": 77, "bos_token_id": 3, "eos_token_id": 4, "head_dim": 16}
        file = write_gguf_model(tmp_path / "model.gguf", raw, weights_of(raw))
        assert read_gguf_config(open_gguf(file)) == LlamaConfig.from_json(raw)


@pytest.mark.parametrize("family", IN_GGUF)
def test_gguf_metadata_give_the_config_of_every_family(tmp_path, family):
    """Mistral's is LLaMA's but for the name, as in llama.cpp; SmolLM3's fourth layer has no rotary positions."""
    for tied, rope in product((False, True), (None, YARN)):
        raw = SMALL | {"architectures": None, "tie_word_embeddings": tied, "rope_scaling": rope} | FAMILIES[family]
        raw |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 77}
        found = read_gguf_config(open_gguf(write_gguf_model(tmp_path / "model.gguf", raw, weights_of(raw))))
        expected = LlamaConfig.from_json(raw)
        assert found == (dataclasses.replace(expected, family="llama") if family == "mistral" else expected)
        assert found.layers_without_rope == ((3,) if family == "smollm3" else ())


def test_a_gguf_file_of_another_architecture_is_refused_beside_any_config(tmp_path):
    write_in("gguf", tmp_path, SMALL, small_tensors())
    load_base(tmp_path, LlamaConfig.from_json(SMALL))
    file = tmp_path / "model.gguf"
    file.write_bytes(file.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(UserError, match=r"model.gguf: holds a model of architecture 'gemma', only llama, qwen2"):
        load_base(tmp_path, LlamaConfig.from_json(SMALL))


def test_shards_written_are_those_that_transformers_reads(tmp_path, monkeypatch):
    from fedmezo_jax.llama.checkpoints import base_model

    config = LlamaConfig.from_json(SMALL)
    base = load_base(write_in("safetensors", tmp_path / "a", SMALL, small_tensors()), config)
    monkeypatch.setattr(base_model, "_SHARD_BYTES", 1000)
    save_base(tmp_path / "b", config, base)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in small_tensors().values())
    assert index["weight_map"].keys() == small_tensors().keys()
    assert len(set(index["weight_map"].values())) > 3
    assert not (tmp_path / "b" / "model.safetensors").exists()
    assert_same(load_base(tmp_path / "b", config), base)
