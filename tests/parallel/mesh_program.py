"""Run by test_sharding in a process with eight virtual devices: prints what each mesh makes of one round, as JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fedmezo_jax.core import client, federated, mezo, personalization
from fedmezo_jax.data.examples import TokenBatch
from fedmezo_jax.llama.checkpoints.layout import leaves
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import init_lora
from fedmezo_jax.llama.loss import pair_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.parallel import sharding
from fedmezo_jax.planning import collectives

CLIENTS, STEPS, BATCH, LENGTH, LABELS = 6, 3, 2, 16, 8
MESHES = ["clients=8,model=1", "clients=4,model=2", "clients=2,model=4", "clients=1,model=8"]


def program(tied: bool, directions_shared: bool, meshes: list[str]):
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    draw = np.random.default_rng(0)
    weights = {
        path: (1 + 0.1 * draw.standard_normal(shape) if path[-1] == "scale" else 0.3 * draw.standard_normal(shape))
        for path, shape in leaves(config).items()
    }
    shape = (CLIENTS, STEPS, BATCH, LABELS)
    rows = TokenBatch(
        draw.integers(0, 200, (*shape[:3], LENGTH)).astype(np.int32),
        draw.integers(0, LENGTH - 1, shape).astype(np.int32),
        draw.integers(0, 200, shape).astype(np.int32),
        np.ones(shape, np.float32),
    )
    key = jax.random.key(0, impl="threefry2x32")
    start = jax.tree.map(
        lambda leaf: leaf + 0.05, init_lora(jax.random.fold_in(key, 9), config, 4, ("q_proj", "v_proj"))
    )
    found = {}
    for text in ["one device", *meshes]:
        mesh = None if text == "one device" else sharding.parse_mesh(text, jax.devices())
        sharding.check_mesh(mesh, config)
        place = sharding.base_sharding(mesh)
        base = traverse_util.unflatten_dict(
            {
                path: jax.device_put(weight.astype(np.float32), place(path, weight) if place else None)
                for path, weight in weights.items()
            }
        )
        lora = sharding.replicate(mesh, start)
        work = client.mezo_client(mezo.MezoConfig(perturbation_scale=0.05))
        init, step = federated.federated(work, personalization.RateConfig(1e-6), None, 2, directions_shared, mesh)
        state = init(lora, CLIENTS)
        asked = []

        def make(at, asked=asked):
            asked.append(at.tolist())
            return jax.tree.map(lambda table: table[at], rows)

        batches = sharding.shard_clients(mesh, CLIENTS, make)
        cohort = federated.Cohort(np.arange(CLIENTS, dtype=np.int32), np.ones(CLIENTS, np.float32), batches)
        loss = pair_loss_of(Llama(config, 20.0), base)
        compiled = jax.jit(step.work).lower(state, loss, cohort, key, None, None).compile()
        report = compiled(state, loss, cohort, key, None, None)
        state = step.apply(state, cohort.ids, cohort.weights, report, key)
        z = jax.jit(lambda lora: mezo.shift(jax.tree.map(jnp.zeros_like, lora), mezo.Perturbation(key, 1.0)))(lora)
        sent = []
        if mesh is not None:
            wide = mesh.shape[sharding.MODEL]
            sent = [
                {
                    "kind": one.kind,
                    "bytes": one.bytes * one.times,
                    "between_clients": not one.groups
                    or any(len({at // wide for at in group}) > 1 for group in one.groups),
                }
                for one in collectives.collectives(compiled.as_text())
            ]
        kernel = base["layers"]["mlp"]["up_proj"]["kernel"]
        found[text] = {
            "projected_gradients": np.asarray(report.projected_gradients).tolist(),
            "lora": [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(state.params)],
            "z": [np.asarray(leaf).view(np.uint32).tolist() for leaf in jax.tree.leaves(z)],
            "sent": sent,
            "asked": asked,
            "kernel_part": list(kernel.addressable_shards[0].data.shape),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(program(sys.argv[1] == "tied", sys.argv[2] == "shared", sys.argv[3:])))
