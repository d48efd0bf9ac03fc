"""On every mesh a round gives the numbers of one device, and sends between groups of clients no more than scalars."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from mesh_program import BATCH, CLIENTS, LABELS, LENGTH, MESHES, STEPS

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import held_leaves
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.families import FAMILIES
from fedmezo_jax.parallel import sharding

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*arguments):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
    }
    command = [sys.executable, str(HERE / "mesh_program.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return run("tied", "per-client", *MESHES)


def check_numbers(alone, spread):
    assert spread["z"] == alone["z"]
    expected = np.array(alone["projected_gradients"])
    # Against their usual size: where the two losses happen to be close, their rounding is all there is.
    np.testing.assert_allclose(
        spread["projected_gradients"], expected, atol=1e-5 * np.sqrt(np.mean(expected**2)), rtol=0
    )
    for ours, theirs in zip(spread["lora"], alone["lora"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_numbers_of_one_device(found, mesh):
    check_numbers(found["one device"], found[mesh])


def test_so_it_does_with_shared_directions_and_a_head_of_its_own():
    mesh = "clients=4,model=2"
    found = run("untied", "shared", mesh)
    check_numbers(found["one device"], found[mesh])


@pytest.mark.parametrize("mesh", MESHES)
def test_groups_of_clients_tell_each_other_scalars_alone(found, mesh):
    sent = found[mesh]["sent"]
    between = sum(one["bytes"] for one in sent if one["between_clients"])
    groups = int(mesh.split(",")[0].removeprefix("clients="))
    held = -(-CLIENTS // groups) * groups
    # A loss and a projected gradient of each step and client, 4 bytes each.
    assert between == (2 * 4 * held * STEPS if groups > 1 else 0)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_base_is_split_and_never_gathered(found, mesh):
    parts = int(mesh.split("=")[-1])
    assert found[mesh]["kernel_part"] == [3, 64, 96 // parts]
    gathered = [one for one in found[mesh]["sent"] if one["kind"] not in ("all-reduce", "all-gather")]
    assert gathered == []
    largest = max((one["bytes"] for one in found[mesh]["sent"] if one["kind"] == "all-gather"), default=0)
    assert largest <= 4 * 8 * STEPS  # not even one row of a LoRA matrix
    # Within a group activations are summed: of a block's tokens after each of two products in a layer, and once after
    # the embedding; the head's sums are of label positions.
    if parts > 1:
        sums = [one["bytes"] for one in found[mesh]["sent"] if one["kind"] == "all-reduce"]
        tokens = 4 * 64 * LENGTH * BATCH
        each = math.ceil(CLIENTS * parts / 8)  # clients of one group, who run in blocks of at most two
        expected = 2 * STEPS * 2 * math.ceil(each / 2) * (2 * 3 * tokens + tokens + 3 * 4 * LABELS * BATCH)
        assert 0.9 * expected <= sum(sums) <= 1.1 * expected


def test_each_group_s_rows_are_made_for_it_alone(found):
    asked = found["clients=4,model=2"]["asked"][1:]
    assert sorted(map(tuple, asked)) == [(0, 0), (0, 1), (2, 3), (4, 5)]  # six clients, filled up with copies


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("clients=3,model=2", "is for 6 devices, and there are 8"),
        ("clients=0,model=8", "give it as clients=4,model=2"),
        ("8x1", "give it as clients=4,model=2"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        sharding.parse_mesh(text, jax.devices() * 8)


def test_all_devices_go_to_the_clients_unless_said_otherwise():
    assert sharding.parse_mesh(None, jax.devices()[:1]) is None
    assert sharding.parse_mesh("clients=1,model=1", jax.devices()[:1]) is None


def test_a_model_axis_that_does_not_divide_the_heads_is_refused():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=60,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )

    class FourWays:
        shape = {"clients": 1, "model": 4}  # noqa: RUF012

    with pytest.raises(UserError, match="model=4 does not divide the model's 6 attention heads and 2 key/value heads"):
        sharding.check_mesh(FourWays(), config)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_every_family_has_its_axes(family):
    """A norm of heads is on every device whole; what belongs to heads is split with them."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    biases = dict.fromkeys(FAMILIES[family].flags, True)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, family=family, **biases)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("clients", "model"))
    sharding_of = sharding.base_sharding(mesh)
    specs = {path[-2:]: sharding_of(path, leaf).spec for path, leaf in held_leaves(config, "float32").items()}
    assert specs["q_proj", "kernel"] == PartitionSpec(None, None, "model")
    assert specs.get(("q_norm", "scale"), PartitionSpec(None, None)) == PartitionSpec(None, None)
    assert specs.get(("q_proj", "bias"), PartitionSpec(None, "model")) == PartitionSpec(None, "model")


@pytest.mark.parametrize(
    ("kind", "by_output", "by_input"),
    [
        ("int4", [(None, None, "model")] * 2, [(None, "model", None)] * 2),
        *((kind, [(None, "model", None)] * 2, [(None, None, "model"), (None, None, None)]) for kind in ("int8", "fp8")),
    ],
)
def test_quantised_kernels_are_split_along_the_axis_of_the_floats(kind, by_output, by_input):
    """q_proj by its outputs, which are heads, and o_proj by its inputs; a scale of whole outputs has no inputs."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )

    sharding_of = sharding.base_sharding(AbstractMesh((1, 2), ("clients", "model")))  # pyright: ignore[reportArgumentType]
    held = held_leaves(config, "float32", kind)

    def specs(name):
        path = ("layers", "self_attn", name, "kernel")
        return [tuple(part.spec) for part in jax.tree.leaves(sharding_of(path, held[path]))]

    assert specs("q_proj") == by_output
    assert specs("o_proj") == by_input
