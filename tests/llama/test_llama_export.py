"""A model written anew: merged with its adapter, from any format, in any dtype; transformers opens it."""

import json
import sys

import jax
import numpy as np
import pytest
from llama_files import SMALL, small_tensors
from safetensors.numpy import load_file
from weight_files import FORMS, LLAMA3, assert_same, stacked, write_in

from experiments import _cli
from experiments import merge as command
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.adapter import Adapter, save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.checkpoints.export import export
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import TARGETS, lora_shapes
from fedmezo_jax.llama.model import Llama

RAW = SMALL | {"rope_scaling": LLAMA3, "max_position_embeddings": 64, "eos_token_id": [2, 3]}
TOKENS = np.array([[1, 5, 3, 10, 0, 7, 7, 2]])


def random_adapter(config, targets=TARGETS, rank=3, alpha=4.5, trained=None):
    draw, lora = np.random.default_rng(0), lora_shapes(config, rank, targets, trained)
    lora = {
        name: {half: (0.3 * draw.normal(size=shape)).astype(np.float32) for half, shape in halves.items()}
        for name, halves in lora.items()
    }
    return Adapter(lora, rank, alpha, tuple(targets), trained)


def logits(folder, adapter=None):
    config = LlamaConfig.from_json(folder)
    scale, lora, trained = 1.0, {}, None
    if adapter is not None:
        scale, lora, trained = adapter.alpha / adapter.rank, adapter.lora, adapter.trained
    return jax.jit(Llama(config, scale, trained=trained).apply)({"params": load_base(folder, config)}, TOKENS, lora)


@pytest.mark.parametrize("trained", [None, (1,), (0,)])
@pytest.mark.parametrize("targets", [TARGETS, ("o_proj",), ("k_proj", "down_proj")], ids="+".join)
def test_a_merged_model_has_the_adapter_s_logits(tmp_path, targets, trained):
    config = LlamaConfig.from_json(RAW)
    model = write_in("safetensors", tmp_path / "model", RAW, small_tensors())
    adapter = random_adapter(config, targets, trained=trained)
    export(model, tmp_path / "merged", adapter)
    assert LlamaConfig.from_json(tmp_path / "merged") == config
    expected = logits(model, adapter)
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - logits(model)).max() > 0.1


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_transformers_opens_a_merged_model_with_the_logits_of_peft(tmp_path):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model, config = write_in("safetensors", tmp_path / "model", RAW, small_tensors()), LlamaConfig.from_json(RAW)
    adapter = random_adapter(config)
    export(model, tmp_path / "merged", adapter)
    save_adapter(tmp_path / "adapter", adapter.lora, rank=3, alpha=4.5, targets=TARGETS, base_name="x")
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found = merged(torch.from_numpy(TOKENS)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
        np.testing.assert_allclose(found, theirs(torch.from_numpy(TOKENS)).logits.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, logits(model, adapter), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_any_format_is_written_as_safetensors_and_orbax(tmp_path, form):
    raw = RAW | {"eos_token_id": 2}  # a GGUF file has room for one
    model = write_in(form, tmp_path / "model", raw, small_tensors())
    for written in ("safetensors", "orbax"):
        export(model, tmp_path / written, form=written)
        config = LlamaConfig.from_json(tmp_path / written)
        assert config == LlamaConfig.from_json(model)
        assert_same(load_base(tmp_path / written, config), stacked(small_tensors()))
    stored = load_file(tmp_path / "safetensors" / "model.safetensors")
    for name, tensor in small_tensors().items():
        np.testing.assert_array_equal(stored[name], tensor)


def test_weights_are_stored_in_the_chosen_type(tmp_path):
    model = write_in("safetensors", tmp_path / "model", RAW, small_tensors())
    for dtype in ("bfloat16", "float16"):
        export(model, tmp_path / dtype, dtype=dtype)
        assert {tensor.dtype.name for tensor in load_file(tmp_path / dtype / "model.safetensors").values()} == {dtype}
        assert json.loads((tmp_path / dtype / "config.json").read_text())["torch_dtype"] == dtype
    tensors = small_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    huge = write_in("safetensors", tmp_path / "huge", RAW, tensors)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight is not finite in float16"):
        export(huge, tmp_path / "no", dtype="float16")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_the_file_s_fault(tmp_path, bad):
    tensors = small_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = bad
    model = write_in("safetensors", tmp_path / "model", RAW, tensors)
    for adapter in (None, random_adapter(LlamaConfig.from_json(RAW))):
        with pytest.raises(UserError) as caught:
            export(model, tmp_path / "no", adapter)
        assert str(caught.value) == (
            f"{model / 'model.safetensors'}: model.layers.1.mlp.up_proj.weight holds weights that are not finite; "
            "fetch the file again"
        )
        assert not (tmp_path / "no").exists()


def test_an_adapter_that_makes_a_weight_overflow_is_named(tmp_path):
    model, config = write_in("safetensors", tmp_path / "model", RAW, small_tensors()), LlamaConfig.from_json(RAW)
    adapter = random_adapter(config, ("o_proj",))
    huge = adapter._replace(lora=jax.tree.map(lambda leaf: leaf * np.float32(1e30), adapter.lora))
    with pytest.raises(UserError, match=r"the adapter makes model.layers.0.self_attn.o_proj.weight overflow"):
        export(model, tmp_path / "no", huge)
    assert not (tmp_path / "no").exists()


def test_tokenizer_files_come_along_and_an_empty_folder_may_be_there(tmp_path):
    model = write_in("safetensors", tmp_path / "model", RAW, small_tensors())
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "pytorch_model.bin"):
        (model / name).write_text(name)
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out")
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    with pytest.raises(UserError, match=r"out holds files: give a new or empty folder"):
        export(model, tmp_path / "out")


@pytest.fixture
def model(tmp_path):
    folder = write_in("safetensors", tmp_path / "model", RAW, small_tensors())
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run(monkeypatch, *arguments):
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, arguments)])
    try:
        _cli.run(command.main, command.Config, command.__doc__)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_command_merges(model, tmp_path, monkeypatch, capsys):
    adapter = random_adapter(LlamaConfig.from_json(RAW))
    save_adapter(tmp_path / "adapter", adapter.lora, rank=3, alpha=4.5, targets=TARGETS, base_name="x")
    given = ("--model", model, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert run(monkeypatch, *given) == 0
    assert "model.safetensors" in capsys.readouterr().out
    np.testing.assert_allclose(logits(tmp_path / "merged"), logits(model, adapter), rtol=1e-5, atol=1e-5)
    assert run(monkeypatch, *given) == 2
    assert "give a new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--adapter", "nowhere"], "nowhere/adapter_config.json: cannot be read"),
        (["--model", "nowhere"], "unknown model 'nowhere'"),
        (["--dtype", "int8"], "dtype"),
        (["--form", "pickle"], "form"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, tmp_path, monkeypatch, capsys, arguments, named):
    first = [] if "--model" in arguments else ["--model", model]
    assert run(monkeypatch, *first, "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
