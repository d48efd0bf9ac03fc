"""Base weights in and out: every tensor in its place, every misfit refused by name, memory bounded."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_files import LINEAR, SMALL, small_tensors, write_model
from safetensors.numpy import load_file, save_file

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints import base_model
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.checkpoints.layout import base_shapes
from fedmezo_jax.llama.config import LlamaConfig

BOTH = [(tied, bias) for tied in (False, True) for bias in (False, True)]


def small_config(tied=False, bias=False):
    return LlamaConfig.from_json(
        SMALL | {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias},
    )


@pytest.mark.parametrize(("tied", "bias"), BOTH)
def test_every_tensor_is_in_its_place(tmp_path, tied, bias):
    tensors = small_tensors(tied, bias)
    base = load_base(write_model(tmp_path, tensors), small_config(tied, bias))
    expected = {
        "embed_tokens": {"embedding": tensors["model.embed_tokens.weight"]},
        "norm": {"scale": tensors["model.norm.weight"]},
        "layers": {"self_attn": {}, "mlp": {}},
    }
    if not tied:
        expected["lm_head"] = {"kernel": tensors["lm_head.weight"].T}

    def stack(name):
        return np.stack([tensors[f"model.layers.{layer}.{name}"] for layer in range(2)])

    for norm in ("input_layernorm", "post_attention_layernorm"):
        expected["layers"][norm] = {"scale": stack(f"{norm}.weight")}
    for linear in LINEAR:
        block, name = linear.split(".")
        expected["layers"][block][name] = {"kernel": stack(f"{linear}.weight").swapaxes(1, 2)}
        if bias:
            expected["layers"][block][name]["bias"] = stack(f"{linear}.bias")
    jax.tree.map(np.testing.assert_array_equal, base, expected)
    assert jax.tree.structure(base) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.shape, base) == base_shapes(small_config(tied, bias))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_stored_types_are_cast_to_the_wanted_one(tmp_path, stored, wanted):
    """The weights are multiples of 1/64 below 2, exact in every type."""
    tensors = small_tensors()
    base = load_base(write_model(tmp_path, tensors, dtype=stored), small_config(), wanted)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {wanted}
    np.testing.assert_array_equal(
        np.float32(base["layers"]["mlp"]["up_proj"]["kernel"][1]), tensors["model.layers.1.mlp.up_proj.weight"].T
    )


def shard(folder, tensors, parts=3):
    """Spread a model over files so that the tensors of one layer lie in several."""
    (folder / "config.json").write_text(json.dumps(SMALL))
    names = sorted(tensors)
    weight_map = {name: f"model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_hold_the_same_model(tmp_path):
    tensors = small_tensors()
    (tmp_path / "many").mkdir()
    shard(tmp_path / "many", tensors)
    one = load_base(write_model(tmp_path / "one", tensors), small_config())
    jax.tree.map(np.testing.assert_array_equal, load_base(tmp_path / "many", small_config()), one)


def test_all_misfits_are_told_at_once_with_the_file(tmp_path):
    tensors = small_tensors()
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    tensors["model.layers.1.self_attn.o_proj.weight"] = np.zeros((16, 8), np.float32)
    tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((12, 8), np.int8)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_base(tmp_path, small_config())
    message = str(caught.value)
    for part in (
        str(tmp_path),
        "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;",
        "unexpected: model.layers.0.self_attn.q_proj.bias in model.safetensors;",
        "model.layers.1.self_attn.o_proj.weight in model.safetensors is [16, 8] and not [8, 16]",
        "model.layers.0.mlp.gate_proj.weight in model.safetensors is I8",
    ):
        assert part in message
    assert "\n" not in message


def test_long_lists_of_misfits_are_cut_and_counted(tmp_path):
    write_model(tmp_path, {"model.norm.weight": np.zeros(8, np.float32)})
    with pytest.raises(UserError, match=r"missing: (\S+, ){7}\S+ and 12 more"):
        load_base(tmp_path, small_config())


def test_rotary_buffers_are_ignored(tmp_path):
    tensors = small_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    load_base(write_model(tmp_path, tensors), small_config())


def test_a_tied_model_may_hold_its_head_twice_but_not_another_head(tmp_path):
    tensors = small_tensors(tied=True)
    embedding = tensors["model.embed_tokens.weight"]
    write_model(tmp_path, tensors | {"lm_head.weight": embedding})
    assert "lm_head" not in load_base(tmp_path, small_config(tied=True))
    for other in (embedding + 1, embedding[:5]):
        write_model(tmp_path, tensors | {"lm_head.weight": other})
        with pytest.raises(UserError, match=r"lm_head.weight in model.safetensors differs .* tie_word_embeddings"):
            load_base(tmp_path, small_config(tied=True))


def test_damaged_files_are_one_clear_error(tmp_path):
    file = write_model(tmp_path, small_tensors()) / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-7], whole[:50], b"", whole[:8] + b"\xff" * 40 + whole[48:], b"\xff" * 8 + whole[8:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            load_base(tmp_path, small_config())
        assert f"{file}: is damaged or cut short" in str(caught.value)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tensors = small_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight is not finite in float32"):
        load_base(write_model(tmp_path, tensors), small_config())
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = 1e18
    write_model(tmp_path, tensors)
    load_base(tmp_path, small_config())
    with pytest.raises(UserError, match="not finite in float16"):
        load_base(tmp_path, small_config(), "float16")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "x.pt"]
)
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"not opened")
    with pytest.raises(UserError, match=rf"{name} is a pickle.*never opened.*save_pretrained"):
        load_base(tmp_path, small_config())


def test_a_folder_without_weights_says_what_it_should_hold(tmp_path):
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load_base(tmp_path, small_config())


def test_faults_of_an_index(tmp_path):
    tensors = small_tensors()
    shard(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    second = tmp_path / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()

    second.unlink()
    with pytest.raises(
        UserError, match=r"index.json: names files that are not there: model-00002-of-00003.safetensors"
    ):
        load_base(tmp_path, small_config())
    second.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors: is damaged"):
        load_base(tmp_path, small_config())
    save_file(load_file(tmp_path / "model-00001-of-00003.safetensors"), second)
    with pytest.raises(UserError, match=r"missing: .* is in both model-00001-of-00003.safetensors and model-00002"):
        load_base(tmp_path, small_config())
    second.write_bytes(whole)
    load_base(tmp_path, small_config())
    for broken, named in (
        ({"weight_map": weight_map | {"x": "../model.safetensors"}}, "outside its folder"),
        ({"weight_map": {}}, "no weight_map"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=named):
            load_base(tmp_path, small_config())
    index.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_base(tmp_path, small_config())


MEMORY = """
import sys
from pathlib import Path
import jax
import numpy as np
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig

def mebibytes(field):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024

jax.block_until_ready(jax.device_put(np.zeros(4)))
config = LlamaConfig.from_json(sys.argv[1])
before = mebibytes("VmRSS")
base = jax.block_until_ready(load_base(sys.argv[1], config))
print(mebibytes("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(base)) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc/self/status to read")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_peak_memory_is_the_model_and_little_more(tmp_path, stored):
    """The promise: 1.2 times the parameters and one stored tensor, mapped file pages included."""
    wide = SMALL | {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    wide |= {"head_dim": 128}
    shapes = {"self_attn.q_proj": (512, 512), "self_attn.o_proj": (512, 512)}
    shapes |= {"self_attn.k_proj": (256, 512), "self_attn.v_proj": (256, 512)}
    shapes |= {"mlp.gate_proj": (2048, 512), "mlp.up_proj": (2048, 512), "mlp.down_proj": (512, 2048)}
    shapes |= {"input_layernorm": (512,), "post_attention_layernorm": (512,)}
    tensors = {
        f"model.layers.{layer}.{name}.weight": np.ones(shape, np.float32)
        for layer in range(12)
        for name, shape in shapes.items()
    }
    tensors |= {name: np.ones((4000, 512), np.float32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = np.ones(512, np.float32)
    write_model(tmp_path, tensors, config=wide, dtype=stored)
    largest = max(tensor.size for tensor in tensors.values()) * np.dtype(stored).itemsize / 2**20
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, model = map(float, done.stdout.split())
    assert model > 150
    assert peak <= 1.2 * model + largest


@pytest.mark.parametrize(("tied", "bias"), BOTH)
def test_saving_and_loading_give_the_base_back(tmp_path, tied, bias):
    tensors, config = small_tensors(tied, bias), small_config(tied, bias)
    base = load_base(write_model(tmp_path / "first", tensors), config)
    save_base(tmp_path / "second", config, base)
    stored = load_file(tmp_path / "second" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(stored[name], tensor)
    assert LlamaConfig.from_json(tmp_path / "second") == config
    save_base(tmp_path / "half", config, base, dtype="bfloat16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype.name for tensor in half.values()} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, load_base(tmp_path / "half", config), base)


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    config = small_config()
    base = load_base(write_model(tmp_path / "model", small_tensors()), config)

    def full_disk(file, tensors):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(base_model, "write_tensors", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_base(tmp_path / "new", config, base)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_over_a_model_keeps_the_folder_s_other_files(tmp_path):
    config = small_config()
    folder = write_model(tmp_path / "model", small_tensors(seed=0))
    (folder / "README.md").write_text("mine")
    newer = load_base(write_model(tmp_path / "newer", small_tensors(seed=1)), config)
    save_base(folder, config, newer)
    jax.tree.map(np.testing.assert_array_equal, load_base(folder, config), newer)
    assert (folder / "README.md").read_text() == "mine"
