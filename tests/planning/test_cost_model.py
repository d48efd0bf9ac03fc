"""A plan's numbers: operations by hand, meshes that divide, and what the compiler says of a round on this machine."""

import json
import sys

import jax
import pytest

from experiments import _cli
from experiments import plan as command
from experiments.benchmarks import weak_scaling
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.shapes import SHAPES
from fedmezo_jax.planning import cost_model, hardware

SMALL = LlamaConfig(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ROUND = cost_model.RoundSpec(SMALL, 4, 3, 1, 16, 2, ("q_proj",), "float32", False)


def test_operations_by_hand():
    # A layer: q and o 8×8, k and v 8×4, gate, up and down 8×12; the adapter of q has (8 + 8) × 2 entries.
    weights = 2 * 64 + 2 * 32 + 3 * 96 + 32
    # Attention: token t of 16 meets t tokens in 8 entries, once for the scores and once for the mixing.
    layers = 2 * (2 * 16 * weights + 2 * 2 * sum(range(1, 17)) * 8)
    head = 2 * 8 * 8 * 50  # at 8 label positions
    assert cost_model.operations(ROUND) == 2 * 3 * 4 * (layers + head)


def test_operations_and_weights_of_a_family_with_wide_heads_norms_and_biases():
    """Qwen3's heads are wider than hidden_size / heads; Qwen2's biases and Qwen3's norms are weights of a layer."""
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True}
    for family, vectors in (("qwen2", 24 + 12 + 12), ("qwen3", 2 * 6), ("mistral", 0)):
        planned = ROUND._replace(config=LlamaConfig(**sizes, **heads, family=family))
        dense = 2 * 8 * 24 + 2 * 8 * 12 + 3 * 8 * 12
        assert cost_model.weight_bytes(planned) == 4 * (50 * 8 + 8 + 2 * (dense + 2 * 8 + vectors))
        adapter = (8 + 24) * 2
        layers = 2 * (2 * 16 * (dense + adapter) + 2 * 2 * sum(range(1, 17)) * 24)
        assert cost_model.operations(planned) == 2 * 3 * 4 * (layers + 2 * 8 * 8 * 50)


def test_layers_below_the_first_trained_one_cost_nothing():
    """The upper layer's weights, operations and adapter, the final norm, and the untied head without its table."""
    planned = ROUND._replace(trained=(1,))
    weights = 2 * 64 + 2 * 32 + 3 * 96
    assert cost_model.weight_bytes(planned) == 4 * (weights + 2 * 8 + 8 + 8 * 50)
    layer = 2 * 16 * (weights + 32) + 2 * 2 * sum(range(1, 17)) * 8
    assert cost_model.operations(planned) == 2 * 3 * 4 * (layer + 2 * 8 * 8 * 50)
    # A layer without an adapter above one that has one is run, and has no adapter's products.
    planned = ROUND._replace(trained=(0,))
    assert cost_model.operations(planned) == cost_model.operations(ROUND) - 2 * 3 * 4 * 2 * 16 * 32


def test_a_round_from_hidden_states_is_compiled_with_the_weights_above_alone():
    whole, above = (
        cost_model.compile_round(ROUND._replace(trained=trained), hardware.host(), (1, 1), 4).peak
        for trained in (None, (1,))
    )
    assert whole is not None
    assert above is not None
    saved = cost_model.weight_bytes(ROUND) - cost_model.weight_bytes(ROUND._replace(trained=(1,)))
    hidden = 4 * 3 * 16 * 8 * 4 - 4 * 3 * 16 * 4  # instead of tokens
    adapter = 4 * 2 * (8 + 8)
    assert whole - above == pytest.approx(saved - hidden + adapter, abs=saved / 2)


def test_a_big_model_s_operations_are_two_for_each_weight_and_token():
    config = SHAPES["llama-7b"]
    planned = cost_model.RoundSpec(config, 1, 1, 1, 128, 1, (), "paired", True)
    weights = cost_model.weight_bytes(planned) / 2
    assert weights == pytest.approx(6.74e9, rel=0.001)
    assert cost_model.operations(planned) == pytest.approx(2 * 128 * 2 * weights, rel=0.05)


def test_meshes_divide_devices_and_heads():
    assert cost_model.meshes(8, SMALL) == [(8, 1), (4, 2)]
    assert cost_model.meshes(8, SHAPES["qwen2.5-0.5b"]) == [(8, 1), (4, 2)]  # two key/value heads
    assert cost_model.meshes(8, SHAPES["llama-70b"]) == [(8, 1), (4, 2), (2, 4), (1, 8)]


def test_what_the_compiler_says_holds_the_weights_and_sends_nothing_on_one_device():
    found = cost_model.compile_round(ROUND, hardware.host(), (1, 1), 4)
    assert found.peak is not None
    assert found.peak > cost_model.weight_bytes(ROUND)
    assert (found.within, found.between) == (0, 0)


def test_a_compiler_whose_text_cannot_be_read_leaves_the_traffic_unknown(monkeypatch):
    def unreadable(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    found = cost_model.compile_round(ROUND, hardware.host(), (1, 1), 4)
    assert found.peak is not None
    assert found.received is None


def test_the_roofline_is_the_slowest_of_its_parts():
    chip = cost_model.Chip(operations=1e9, memory=1e6, links=1e3, source="")
    compiled = cost_model.Compiled(0, 5000, 0, 0)
    arithmetic = cost_model.operations(ROUND) / 1e9  # all four clients on one chip
    reads = 2 * 3 * cost_model.weight_bytes(ROUND) / 1e6  # all four at once
    assert cost_model.roofline(ROUND, chip, (1, 1), 4, compiled) == pytest.approx(max(arithmetic, reads) + 5)
    assert cost_model.roofline(ROUND, chip, (1, 1), 1, compiled) == pytest.approx(max(arithmetic, 4 * reads) + 5)
    assert cost_model.roofline(ROUND, chip, (4, 1), 1, compiled) == pytest.approx(max(arithmetic / 4, reads) + 5)


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["plan", *map(str, arguments)])
    try:
        _cli.run(module.main, module.Config, module.__doc__)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def here(monkeypatch, tmp_path):
    """This machine, by the name of a TPU slice; and a small model."""
    monkeypatch.setattr(hardware, "describe", lambda name: hardware.host())
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "llama", "vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "hidden_act": "silu"}
            | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
            | {"max_position_embeddings": 64, "tie_word_embeddings": False}
        )
    )
    return tmp_path / "config.json"


def test_the_plan_command_writes_its_rows(here, tmp_path, monkeypatch, capsys):
    given = ("--model", here, "--topology", "v5e:1x1", "--length", 16, "--rank", 2, "--clients", 4)
    assert run(monkeypatch, command, *given, "--out", tmp_path / "out") == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["mesh"] == "clients=1,model=1"
    assert row["clients_at_once"] == 4
    assert row["most_clients_per_chip"] == command.MOST  # of so small a model
    assert row["fits"]
    assert row["best"]
    assert row["collective_bytes_per_round"] == 0
    assert row["roofline_seconds_per_round"] > 0
    assert "best: --mesh clients=1,model=1" in capsys.readouterr().out
    assert run(monkeypatch, command, *given, "--mesh", "clients=1,model=3", "--out", tmp_path / "no") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_the_scaling_command_draws(here, tmp_path, monkeypatch):
    given = ("--model", here, "--devices", "1", "--length", 16, "--rank", 2, "--out", tmp_path / "out")
    assert run(monkeypatch, weak_scaling, *given) == 0
    assert (tmp_path / "out" / "weak_scaling.png").read_bytes()[:4] == b"\x89PNG"
    paired, plain = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert (paired["precision"], plain["precision"]) == ("paired", "bfloat16")
    planned = cost_model.RoundSpec(SMALL, 1, 30, 1, 16, 2, ("q_proj", "v_proj"), "paired", False)
    for row in (paired, plain):
        expected = cost_model.compile_round(planned._replace(precision=row["precision"]), hardware.host(), (1, 1), 1)
        assert row["peak_bytes_per_device"] == expected.peak
    assert paired["peak_bytes_per_device"] != plain["peak_bytes_per_device"]
    assert run(monkeypatch, weak_scaling, *given, "--devices", "some") == 2


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match="--clients must be at least 1"):
        command.Config(clients=0)
    with pytest.raises(UserError, match="lm_head"):
        command.Config(targets="lm_head")
