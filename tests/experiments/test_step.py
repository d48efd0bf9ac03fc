"""The benchmarks run, and count operations as they should."""

import json
import sys

import pytest
from test_memory import MANY_LAYERS

from experiments import _cli
from experiments.benchmarks import scale, step
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.config import LlamaConfig

SMALL = MANY_LAYERS | {"num_hidden_layers": 2}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path / "config.json")


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    _cli.run(module.main, module.Config, module.__doc__)


def test_the_benchmark_writes_a_row_for_each_setting_and_precision(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    settings = ["--settings", "3x1x16x4,2x2x8x2", "--repeats", "2", "--no-peer"]
    run(step, monkeypatch, "--model", model, *settings, "--out", str(out))
    rows = json.loads((out / "results.json").read_text())["rows"]
    cases = [tuple(row[name] for name in ("clients", "batch", "length", "rank", "dtype")) for row in rows]
    assert cases == [(*s, dtype) for s in ((3, 1, 16, 4), (2, 2, 8, 2)) for dtype in ("float32", "paired")]
    for row in rows:
        tokens = 2 * row["clients"] * row["batch"] * row["length"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
        assert 0 < row["share_of_peak"] < 2
        assert row["speedup_over_peer"] is None


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
def test_the_peer_runs_the_same_setting(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(step, monkeypatch, "--model", model, "--settings", "2x1x8x2", "--repeats", "1", "--out", str(out))
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["speedup_over_peer"] > 0 for row in rows] == [True, True]
    assert rows[0]["speedup_over_peer_bfloat16"] > 0


def test_without_pytorch_the_peer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch peft, or --no-peer"):
        step.peer_steps(LlamaConfig.from_json(SMALL), 1, 1, 8, 2, ["q_proj"], "float32")


def test_operations_are_those_of_the_products():
    """A forward of 3 clients of 16 tokens: 64 wide, MLP of 128, 4 query and 2 key/value heads of 16, 64 tokens."""
    llama, setting = LlamaConfig.from_json(SMALL), step.Setting(3, 1, 16, 4)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128  # q and o, k and v, gate and up and down
    frozen = 2 * (3 * 16 * 2 * layer + 3 * 8 * 64 * 64)  # 2 layers; the head at 8 positions a row
    assert step._operations(llama, setting, ()) == frozen
    adapters = 2 * 3 * 16 * 2 * (4 * (64 + 64) + 4 * (64 + 32))
    pairs = 3 * (16 * 17 // 2)  # of a query and a key it may see
    attention = 2 * 2 * pairs * 2 * 4 * 16  # scores and mixtures, in 2 layers, of 4 heads
    assert step._operations(llama, setting, ["q_proj", "v_proj"]) == frozen + adapters + attention


@pytest.mark.parametrize("text", ["8x1x128", "8x1x128x0", "8x1xax8", ""])
def test_a_setting_must_have_four_numbers(text):
    with pytest.raises(UserError, match="clients x batch x tokens x rank"):
        step.parse_setting(text)


def test_clients_in_blocks_take_no_more_memory(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    brief = ("--block", "4", "--seconds", "0.01", "--beside", "1")
    run(scale, monkeypatch, "--model", model, "--clients", "4,32", *brief, "--out", str(out))
    few, many = json.loads((out / "results.json").read_text())["rows"]
    assert many["temp_bytes"] < 1.2 * few["temp_bytes"]
    assert min(few["over_smallest"], many["over_smallest"]) > 0
