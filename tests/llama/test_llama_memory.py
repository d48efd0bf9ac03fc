"""Weights go straight onto their devices, and take little more room on the host than they have there."""

import subprocess
import sys
from pathlib import Path

import pytest
from llama_files import SMALL, small_tensors
from weight_files import FORMS, weights_of, write_gguf_model, write_in

MESH = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
config = LlamaConfig.from_json(sys.argv[1])
asked = []

def sharding(path, leaf):
    asked.append((path, jax.tree.leaves(leaf)[0].shape))
    split = path[0] == "layers" and path[-1] == "kernel"
    spec = lambda part: P(None, None, "model") if split and part.shape[2] > 1 else P()
    return jax.tree.map(lambda part: NamedSharding(mesh, spec(part)), leaf)

for folder in sys.argv[1:]:
    plain = load_base(folder, config, "bfloat16")
    base = load_base(folder, config, "bfloat16", sharding=sharding)
    jax.tree.map(np.testing.assert_array_equal, base, plain)
    kernel = base["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, None, "model"), kernel.sharding
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(2, 8, 6)] * 4
    halves = {shard.device.id: np.asarray(shard.data) for shard in kernel.addressable_shards}
    whole = plain["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(np.concatenate([halves[0], halves[1]], -1), whole)
    quantised = load_base(folder, config, "bfloat16", "int8", sharding)
    jax.tree.map(np.testing.assert_array_equal, quantised, load_base(folder, config, "bfloat16", "int8"))
    assert quantised["layers"]["mlp"]["up_proj"]["kernel"].values.sharding.spec == P(None, None, "model")
    assert len(base["norm"]["scale"].addressable_shards) == 4
    assert len(plain["norm"]["scale"].addressable_shards) == 1
assert (("layers", "mlp", "up_proj", "kernel"), (2, 8, 12)) in asked
print("sharded")
"""


def run_python(program, *arguments, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {"PATH": "", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_leaves_go_straight_onto_their_sharding(tmp_path):
    folders = [write_in(form, tmp_path / form, SMALL, small_tensors()) for form in FORMS]
    assert run_python(MESH, *folders, devices=4) == "sharded\n"


PEAK = """
import sys
from pathlib import Path
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from fedmezo_jax.llama.checkpoints.stored_base import StoredBase
from fedmezo_jax.llama.config import LlamaConfig

def mebibytes(field):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024

small, folder, dtype, kernels, sharded, hashed = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()), "model")
where = (lambda path, leaf: NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "model"))) if sharded == "True" else None

def load(folder):
    stored = StoredBase(folder, LlamaConfig.from_json(folder), dtype, kernels or None, where)
    return jax.block_until_ready(stored.load_from(0)[0] if hashed == "True" else stored.load())

load(small)  # of the same format, so that imports and thread pools do not count
before = mebibytes("VmRSS")
base = load(folder)
print(mebibytes("VmHWM") - before, *(f(leaf.nbytes for leaf in jax.tree.leaves(base)) / 2**20 for f in (sum, max)))
"""
WIDE = SMALL | {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "attention_bias": False,
    "mlp_bias": False,
}
NARROW = WIDE | {"vocab_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "hidden_size": 64, "head_dim": 32}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc/self/status to read")
@pytest.mark.parametrize(
    ("form", "kind", "kernels", "sharded"),
    [
        ("flax", "float32", "", False),
        ("orbax", "float32", "", False),
        ("gguf", "Q8_0", "", False),
        ("gguf", "F16", "", False),
        ("safetensors", "bfloat16", "", True),
        ("safetensors", "float32", "int8", False),
        ("gguf", "Q8_0", "int4", False),
        ("gguf", "Q8_0", "as-stored", False),
    ],
)
@pytest.mark.parametrize("hashed", [False, True], ids=["loaded", "hashed"])
def test_peak_memory_is_the_model_and_little_more(tmp_path, form, kind, kernels, sharded, hashed):
    """The promise: the weights as they are held and one tensor, where they are quantised, and else 1.2 times as much. A
    sharded model lies in host memory here as well, so a leaf may be there twice."""
    for name, raw in (("wide", WIDE), ("narrow", NARROW)):
        tensors = weights_of(raw)
        if form == "gguf":
            write_in("safetensors", tmp_path / name, raw, {})
            (tmp_path / name / "model.safetensors").unlink()
            write_gguf_model(tmp_path / name / "model.gguf", raw, tensors, kind=kind)
        else:
            write_in(form, tmp_path / name, raw, tensors, dtype=kind)
    largest = max(tensor.nbytes for tensor in weights_of(WIDE).values()) / 2**20
    printed = run_python(PEAK, tmp_path / "narrow", tmp_path / "wide", "float32", kernels, sharded, hashed, devices=2)
    peak, model, leaf = map(float, printed.split())
    assert model > {"": 150, "int8": 45, "int4": 30, "as-stored": 45}[kernels]
    assert peak <= (model + 7 if kernels else 1.2 * model) + (leaf if sharded else largest)
