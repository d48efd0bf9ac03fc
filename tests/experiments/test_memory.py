"""The memory experiment: what it reports, and what it is for: a step in the memory of a forward pass."""

import json
import sys

import pytest
from llama_files import SMALL

from experiments import _cli, memory
from fedmezo_jax.errors import UserError
from fedmezo_jax.planning import hardware

MANY_LAYERS = SMALL | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": False,
    "mlp_bias": False,
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MANY_LAYERS))
    return str(tmp_path / "config.json")


def plans(**options):
    config = memory.Config(device="cpu", length=16, rank=4, **options)
    return {(row["what"], row["precision"]): row for row in memory.measure(config, hardware.host())}


@pytest.mark.parametrize("precision", ["bfloat16", "paired", "float32"])
def test_no_program_copies_the_base(model, precision):
    """Its 1.6 million weights take 3 or 6 MB; compilers like to convert or to reorder them all, outside of the loop."""
    found = plans(model=model, precision=precision)
    assert found["forward", "float32" if precision == "float32" else "bfloat16"]["temp_bytes"] < 600_000
    assert found["fedmezo", precision]["temp_bytes"] < 1_000_000


@pytest.mark.parametrize("precision", ["paired", "float32"])
@pytest.mark.parametrize("base", ["int8", "int4"])
def test_no_program_dequantises_the_base(model, base, precision):
    """A step's temporaries hold one kernel at a time, and the arguments eight bits or four and a half of a weight."""
    floats = plans(model=model, precision=precision)
    weights = MANY_LAYERS["num_hidden_layers"] * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    bits = (32 if precision == "float32" else 16) - (8.5 if base == "int8" else 4.5)
    for key, row in plans(model=model, precision=precision, base=base).items():
        if "backprop" not in key[0]:
            assert row["temp_bytes"] < 600_000
            assert floats[key]["peak_bytes"] - row["peak_bytes"] > 0.98 * weights * bits / 8


def test_rows_tell_programs_apart(model):
    found = plans(model=model)
    # By default the step is shown as runs compute it, paired, and in plain bfloat16.
    forward, paired, plain, tangents, backprop, checkpointed = found.values()
    assert list(found) == [
        ("forward", "bfloat16"),
        ("fedmezo", "paired"),
        ("fedmezo", "bfloat16"),
        ("forward_gradient", "bfloat16"),
        ("backprop", "bfloat16"),
        ("backprop_checkpointed", "bfloat16"),
    ]
    assert forward["over_forward"] == 1
    assert backprop["over_forward"] > 1  # temporaries are in the peak
    assert backprop["temp_bytes"] > checkpointed["temp_bytes"] > paired["temp_bytes"]
    assert checkpointed["temp_bytes"] > plain["temp_bytes"]
    assert tangents["temp_bytes"] > plain["temp_bytes"]  # four tangents have activations of their own
    assert all(row["fits"] for row in found.values())


def test_nothing_is_compared_with_a_forward_pass_that_does_not_fit(monkeypatch):
    """TPUs' compilers give no plan for a program that is too large."""
    monkeypatch.setattr(memory, "programs", lambda *_: [(what, "bfloat16", None, ()) for what in ("forward", "step")])
    monkeypatch.setattr(memory, "lower", lambda what, *_: what)
    monkeypatch.setattr(hardware, "compile_for", lambda _, lowered: None if lowered == "forward" else lowered)
    monkeypatch.setattr(hardware, "plan_of", lambda *_: hardware.Plan(7, 3))
    monkeypatch.setattr(hardware, "eight_bit_products", lambda _: 0)
    forward, step = memory.measure(memory.Config(), hardware.host())
    assert (forward["peak_bytes"], forward["fits"], forward["over_forward"]) == (None, False, None)
    assert (step["peak_bytes"], step["over_forward"]) == (7, None)


def test_each_precision_s_row_is_of_that_precision(model):
    """A pair in flight takes more than one loss after the other."""
    both = plans(model=model)
    alone = plans(model=model, precision="bfloat16")
    assert list(alone) == [key for key in both if key != ("fedmezo", "paired")]
    assert both["fedmezo", "bfloat16"] == alone["fedmezo", "bfloat16"]
    assert both["fedmezo", "paired"]["temp_bytes"] > alone["fedmezo", "bfloat16"]["temp_bytes"]


def test_a_sweep_writes_its_table_and_its_picture(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setitem(memory.SWEEPS, "length", ("length", (8, 16)))
    arguments = ["--model", model, "--device", "cpu", "--rank", "4", "--sweep", "length", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["memory", *arguments])
    _cli.run(memory.main, memory.Config, memory.__doc__)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [8] * 6 + [16] * 6
    assert rows[7]["peak_bytes"] > rows[1]["peak_bytes"]
    assert (out / "growth.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"device": "cpu", "topology": "v5e:2x2"}, "--topology and --device"),
        ({"length": 0}, "--length must be at least 1"),
        ({"clients_per_device": 0}, "--clients-per-device must be at least 1"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options, complaint):
    with pytest.raises(UserError, match=complaint):
        memory.Config(**options)


def test_a_model_that_is_not_known_is_named():
    with pytest.raises(UserError, match=r"unknown model 'llama-4b': give llama-3b, .* or the path of a config.json"):
        plans(model="llama-4b")
