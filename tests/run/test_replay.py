"""A run made again from its ledger: the same bits, without data; and directions that every machine draws alike."""

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run

from experiments import _cli
from experiments import replay as command
from fedmezo_jax.core import mezo
from fedmezo_jax.llama.checkpoints.adapter import load_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.run import ledger, run_checkpoints, run_folder
from fedmezo_jax.run.ledger_header import config_hash
from fedmezo_jax.run.loop import train
from fedmezo_jax.run.prepare import prepare
from fedmezo_jax.run.replay import largest_difference, reconstruct

ROOT = Path(__file__).parents[2]
RUNS = {
    "everything": {
        **{"participation": 0.6, "weighting": "samples", "server_optimizer": "momentum", "personalize": "model-diff"},
        **{"directions": 2, "weight_decay": 0.1, "dropout": 0.3, "clients": 5, "aggregation": "norm-clip"},
    },
    "shared": {
        **{"directions_shared": True, "distribution": "rademacher", "on_divergence": "rollback"},
        **{"aggregation": "geometric-median"},
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with small_run.place(tmp_path_factory, "replay") as folder:
        yield folder


configuration = small_run.configuration


@pytest.fixture(scope="module", params=RUNS)
def run(request, place):
    """A finished run, and θ after each of its rounds."""
    config, folder = configuration(place, **RUNS[request.param]), place / request.param
    folder.mkdir()
    run_folder.write_json(folder / "config.json", asdict(config))
    setup, seen, save = prepare(config), [], run_checkpoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_checkpoints,
            "save",
            lambda m, f, progress, chain: (
                seen.append(jax.device_get(progress.state.params)),
                save(m, f, progress, chain),
            ),
        )
        train(setup, folder, checkpoint_every=1, eval_every=9)
    return folder, config, setup, seen


def test_any_round_is_rebuilt_bit_for_bit(run):
    folder, config, setup, seen = run
    for t, expected in enumerate([setup.params, *seen]):
        reconstructed, done = reconstruct(folder / "run.ledger", config, setup.params, t)
        assert done == t
        assert largest_difference(jax.device_get(expected), reconstructed) is None
    assert largest_difference(seen[0], seen[-1]) > 1e-5


def invoke(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["replay", *map(str, argv)])
    try:
        _cli.run(command.main, command.Config, command.__doc__)
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_command_says_whether_it_is_the_same_adapter(run, place, tmp_path, monkeypatch, capsys):
    folder, config, setup, seen = run
    data = Path(config.data).rename(place / "away.jsonl")  # no data are needed
    try:
        assert invoke(monkeypatch, folder / "run.ledger", "--out", tmp_path / "a") == 0
    finally:
        data.rename(config.data)
    assert "bit for bit" in capsys.readouterr().out
    for file in (folder / "adapter").iterdir():
        assert (tmp_path / "a" / "adapter" / file.name).read_bytes() == file.read_bytes()
    assert invoke(monkeypatch, folder / "run.ledger", "--round", 2, "--out", tmp_path / "b") == 0
    assert "not compared" in capsys.readouterr().out
    adapter = load_adapter(tmp_path / "b" / "adapter", setup.task.model.config)
    assert largest_difference(jax.device_get(adapter.lora), seen[1]) is None
    assert invoke(monkeypatch, folder / "run.ledger", "--round", 9, "--out", tmp_path / "c") == 2
    assert "ends after round 4" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_another_adapter_other_weights_and_a_damaged_ledger_are_told(run, place, tmp_path, monkeypatch, capsys):
    folder, config, *_ = run
    changed = shutil.copytree(folder, tmp_path / "changed")
    weights = changed / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the exponent's lowest bit of the last number
    weights.write_bytes(content)
    assert invoke(monkeypatch, changed / "run.ledger", "--out", tmp_path / "a") == 3
    assert "differs from the run's by at most" in capsys.readouterr().out

    llama = LlamaConfig.from_json(config.model)
    base = load_base(config.model, llama)
    base["norm"]["scale"] = base["norm"]["scale"] + np.float32(1e-6)
    other = shutil.copytree(config.model, tmp_path / "other")
    save_base(other, llama, base)
    assert invoke(monkeypatch, folder / "run.ledger", "--model", other, "--out", tmp_path / "b") == 2
    assert "weights are not those" in capsys.readouterr().err

    book = changed / "run.ledger"
    content = bytearray(book.read_bytes())
    content[-200] ^= 1
    book.write_bytes(content)
    assert invoke(monkeypatch, book, "--out", tmp_path / "c") == 2
    assert "record of round" in capsys.readouterr().err
    assert book.read_bytes() == content
    book.write_bytes((folder / "run.ledger").read_bytes()[:-5])
    assert invoke(monkeypatch, book, "--round", 3, "--out", tmp_path / "d") == 0
    assert "cut short" in capsys.readouterr().out
    assert list(ledger.entries(book))[-1].round == 2


def test_a_base_model_is_fetched_only_when_asked_for(run, place, tmp_path, monkeypatch, capsys):
    folder, *_ = run
    header = ledger.read_header(folder / "run.ledger")
    header["config"]["model"] = "owner/name"
    header["config_hash"] = config_hash(header["config"])
    file = tmp_path / "run.ledger"
    book = ledger.create(file, header)
    for entry in ledger.entries(folder / "run.ledger"):
        book.append(entry)
    sent = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: sent.append(address) or 1 / 0)
    assert invoke(monkeypatch, file, "--out", tmp_path / "out") == 2
    assert "give --model owner/name" in capsys.readouterr().err
    assert sent == []
    assert not (tmp_path / "out").exists()
    assert invoke(monkeypatch, file, "--model", "owner/name", "--out", tmp_path / "out") == 2  # no hub answers here
    assert "cannot be fetched from the hub" in capsys.readouterr().err
    assert sent


def test_a_ledger_that_ends_early_is_said_to(run, place, tmp_path, monkeypatch, capsys):
    folder, *_ = run
    *_, before, _last = ledger.records(folder / "run.ledger")
    shorter = tmp_path / "run.ledger"
    shorter.write_bytes((folder / "run.ledger").read_bytes()[: before.end])
    assert invoke(monkeypatch, shorter, "--out", tmp_path / "out") == 0
    assert "the ledger ends after round 3 of 4" in capsys.readouterr().out


def test_a_different_adapter_has_an_infinite_difference():
    one = {"v_proj": {"A": np.ones((2, 3), np.float32)}}
    for other in (
        {"v_proj": {"A": np.ones((3, 2))}},
        {"q_proj": one["v_proj"]},
        {"v_proj": {"A": np.full((2, 3), np.nan)}},
    ):
        assert largest_difference(one, other) == np.inf


def test_a_rank_beyond_reason_is_refused_before_room_is_made(run, tmp_path, monkeypatch, capsys):
    folder, *_ = run
    header = ledger.read_header(folder / "run.ledger")
    header["config"]["lora_rank"] = 10**12
    header["config_hash"] = config_hash(header["config"])
    ledger.create(tmp_path / "run.ledger", header)
    assert invoke(monkeypatch, tmp_path / "run.ledger", "--out", tmp_path / "out") == 2
    assert "lora_rank 1000000000000 means" in capsys.readouterr().err


# Rademacher directions


def threefry(key, counter):
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011, Sec. 3.3), on pairs of uint32."""
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    keys = [np.uint32(key[0]), np.uint32(key[1]), np.uint32(key[0] ^ key[1] ^ 0x1BD11BDA)]
    x, y = (counter[0] + keys[0]).astype(np.uint32), (counter[1] + keys[1]).astype(np.uint32)
    for block in range(5):
        for turn in rotations[block % 2]:
            x = (x + y).astype(np.uint32)
            y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
        x = (x + keys[(block + 1) % 3]).astype(np.uint32)
        y = (y + keys[(block + 2) % 3] + np.uint32(block + 1)).astype(np.uint32)
    return x, y


def test_rademacher_directions_are_the_generators_top_bits():
    """Computed here from the generator's definition alone, in whole numbers: no backend can draw others."""
    key = jax.random.key(12345, impl="threefry2x32")
    words = np.asarray(jax.random.key_data(key))
    with np.errstate(over="ignore"):
        high, low = threefry(words, (np.zeros(1000, np.uint32), np.arange(1000, dtype=np.uint32)))
    expected = np.where((high ^ low) >> np.uint32(31), 1, -1)
    np.testing.assert_array_equal(mezo.draw(key, (10, 100), "rademacher").ravel(), expected)


def test_rademacher_directions_and_steps_hold_no_operation_that_can_round():
    """Drawing z has whole numbers and a choice of ±1; a step then rounds once, where every IEEE machine does."""
    draw = jax.jit(lambda key: mezo.draw(key, (8,), "rademacher"))
    text = draw.lower(jax.random.key(0, impl="threefry2x32")).as_text()
    made = re.findall(r"(stablehlo\.\w+).*tensor<8xf32>$", text, re.MULTILINE)
    assert {"stablehlo.select"} <= set(made) <= {f"stablehlo.{op}" for op in ("select", "broadcast_in_dim", "convert")}
    assert "stablehlo.xor" in text
    c, theta = np.float32(0.1), np.float32(0.3)
    for sign in (1, -1):  # fused or not, θ ± c is the same
        exact = np.float64(theta) + sign * np.float64(c)
        assert np.float32(exact) == theta + np.float32(sign) * c


PRINT = """
import sys, jax, jax.numpy as jnp, numpy as np
from fedmezo_jax.core import client, mezo
theta = {"A": np.linspace(-1, 1, 6000, dtype=np.float32).reshape(3, 2000)}
steps = np.linspace(-1e-2, 1e-2, 50, dtype=np.float32).reshape(50, 1)
for law in ("rademacher", "gaussian"):
    work = client.mezo_client(mezo.MezoConfig(distribution=law))
    done = jax.jit(work.reconstruct)(theta, jax.random.key(3, impl="threefry2x32"), steps, 0.0)
    print(np.asarray(done["A"]).tobytes().hex())
"""


def test_rademacher_steps_are_the_same_for_other_instructions():
    """The same program compiled for another processor: without fused multiply-adds, vectors a quarter as wide."""
    printed = []
    for isa in ("SSE4_2", "AVX512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "AVX2"):
        environment = os.environ | {"XLA_FLAGS": f"--xla_cpu_max_isa={isa}", "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run([sys.executable, "-c", PRINT], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.split())
    (rademacher, gaussian), (rademacher_too, gaussian_too) = printed
    assert rademacher == rademacher_too
    assert gaussian != gaussian_too  # or this would show nothing
    close = [np.frombuffer(bytes.fromhex(text), np.float32) for text in (gaussian, gaussian_too)]
    np.testing.assert_allclose(*close, atol=1e-6)
