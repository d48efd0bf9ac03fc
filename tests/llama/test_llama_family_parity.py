"""Every family computes what Hugging Face's classes compute: logits, greedy tokens, losses and adapters."""

import json
from functools import cache, partial

import jax
import make_goldens
import numpy as np
import pytest
from llama_cases import golden, load, random_lora, random_rows
from make_goldens import FAMILY_CASES
from safetensors.numpy import save_file

from fedmezo_jax.core import mezo
from fedmezo_jax.data.examples import HiddenBatch
from fedmezo_jax.llama.checkpoints.adapter import load_adapter, save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.generate import generate
from fedmezo_jax.llama.lora import TARGETS
from fedmezo_jax.llama.loss import loss_of, pair_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.prefix import trained_part

LAYERED = [case for case in FAMILY_CASES if case.startswith(("ministral", "smollm3")) or "window" in case]
"""The cases in which layers differ from each other, or have a window."""


@partial(jax.jit, static_argnums=0)
def logits(model, base, tokens, lora):
    return model.apply({"params": base}, tokens, lora)


@cache
def own_logits(case):
    config, base = load(case)
    return logits(Llama(config), base, make_goldens.inputs(case)["tokens"], {})


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_logits_equal_hugging_face_s_as_stored(case):
    np.testing.assert_allclose(own_logits(case), golden(case)["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if "dynamic" not in case])
def test_greedy_tokens_equal_hugging_face_s_as_stored(case):
    config, base = load(case)
    found = generate(Llama(config), base, {}, make_goldens.PROMPTS, make_goldens.NEW_TOKENS, ends=[])
    assert found == golden(case)["greedy"].tolist()


@pytest.mark.torch
@pytest.mark.parametrize("case", FAMILY_CASES)
def test_hugging_face_says_what_is_stored(case):
    for level, value in make_goldens.family_reference(case).items():
        np.testing.assert_allclose(value, golden(case)[level], rtol=0, atol=1e-5)


def test_the_cases_tell_apart_what_they_vary():
    """A window, unrotated layers and a scaling each change the logits of these models by more than rounding."""
    for case, plain in {
        "llama, yarn": {"rope_scaling": None},
        "llama, dynamic": {"max_position_embeddings": 12},
        "mistral, window": {"sliding_window": None},
        "ministral, window in one layer": {"layer_types": ["full_attention"] * 3},
        "qwen2, window above": {"max_window_layers": 2},
        "qwen3, yarn": {"rope_scaling": None},
        "smollm3": {"no_rope_layers": [1, 1, 1]},
        "smollm3, window": {"use_sliding_window": False},
    }.items():
        config = LlamaConfig.from_json(make_goldens.raw_config(case) | plain)
        found = logits(Llama(config), load(case)[1], make_goldens.inputs(case)["tokens"], {})
        assert np.abs(found - own_logits(case)).max() > 1e-2, case


@pytest.mark.parametrize("case", LAYERED)
def test_layers_keep_their_kind_where_the_first_ones_are_cut_off(case):
    """From hidden states of the first two layers, with the weights of the third alone, the loss of the whole model."""
    config, base = load(case)
    model, rows = Llama(config, 1.75, trained=(2,)), random_rows(3)
    lora = jax.tree.map(lambda leaf: leaf[2:], random_lora(config, ("q_proj", "down_proj")))
    below = jax.jit(lambda base, tokens: model.apply({"params": base}, tokens, method="prefix"))(base, rows.tokens)
    rest = trained_part(model, base)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(rest["layers"])} == {1}
    found = jax.jit(loss_of(model, rest))(lora, HiddenBatch(below, *rows[1:]))
    whole = jax.tree.map(lambda leaf: np.concatenate([0 * leaf, 0 * leaf, leaf]), lora)
    np.testing.assert_allclose(found, jax.jit(loss_of(Llama(config, 1.75), base))(whole, rows), rtol=1e-6)


@pytest.mark.parametrize("case", ["smollm3, window", "qwen3, tied, wide heads, biases", "qwen2, window above"])
def test_a_pair_of_losses_is_the_two_losses(case):
    config, base = load(case)
    model, rows, lora = Llama(config, 1.75), random_rows(2), random_lora(config)
    direction = mezo.Perturbation(jax.random.key(5, impl="threefry2x32"), 1e-2)
    pair = jax.jit(pair_loss_of(model, base))(lora, rows, direction)
    single = jax.jit(loss_of(model, base))
    expected = [single(mezo.shift(lora, moved), rows) for moved in (direction, -direction)]
    np.testing.assert_allclose(pair, expected, rtol=1e-6)
    assert abs(pair[0] - pair[1]) > 1e-3


def test_a_batch_of_prompts_beyond_a_window_gives_each_what_it_would_get_alone():
    config, base = load("smollm3, window")
    lora = random_lora(config)
    together = generate(Llama(config, 1.5), base, lora, make_goldens.PROMPTS, 8, ends=[])
    for prompt, found in zip(make_goldens.PROMPTS, together, strict=True):
        tokens = list(prompt)
        for token in found:
            padded = np.array([[*tokens, *[0] * (20 - len(tokens))]])
            assert int(logits(Llama(config, 1.5), base, padded, lora)[0, len(tokens) - 1].argmax()) == token
            tokens.append(token)


def test_dynamic_scaling_does_nothing_within_the_context():
    case = "llama, dynamic"
    raw = make_goldens.raw_config(case) | {"max_position_embeddings": 64}
    tokens = make_goldens.inputs(case)["tokens"]
    found, plain = (
        logits(Llama(LlamaConfig.from_json(raw | changed)), load(case)[1], tokens, {})
        for changed in ({}, {"rope_scaling": None})
    )
    np.testing.assert_array_equal(found, plain)
    config = LlamaConfig.from_json(raw)
    prompt = list(range(40))  # with the new tokens the cache has more slots than the context has tokens
    found = generate(Llama(config), load(case)[1], {}, [prompt], 24, ends=[])
    unscaled = LlamaConfig.from_json(raw | {"rope_scaling": None})
    assert found == generate(Llama(unscaled), load(case)[1], {}, [prompt], 24, ends=[])


# Files

ONE_OF_EACH = ["mistral, window", "ministral, window in one layer", "qwen2", "qwen3", "smollm3"]


def write(folder, case):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(make_goldens.raw_config(case)))
    save_file(make_goldens.tensors(case), folder / "model.safetensors")
    return folder


@pytest.mark.torch
@pytest.mark.parametrize("case", FAMILY_CASES)
def test_transformers_opens_what_is_saved_and_the_other_way_round(tmp_path, case):
    import torch
    from transformers import AutoModelForCausalLM

    config, base = load(case)
    save_base(tmp_path / "ours", config, base)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        theirs = model(torch.from_numpy(make_goldens.inputs(case)["tokens"]).long()).logits.numpy()
    np.testing.assert_allclose(theirs, golden(case)["logits"], rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "theirs")
    back = LlamaConfig.from_json(tmp_path / "theirs")
    assert back == config
    jax.tree.map(np.testing.assert_array_equal, load_base(tmp_path / "theirs", back), base)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_peft_s_adapters_come_in_and_go_out(tmp_path, case, layers):
    import peft
    import torch

    options = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(TARGETS), layers_to_transform=layers, init_lora_weights=False
    )
    model = peft.get_peft_model(make_goldens.family_model(case), options).eval()
    model.save_pretrained(tmp_path / "theirs")
    config, base = load(case)
    adapter = load_adapter(tmp_path / "theirs", config)
    tokens = make_goldens.inputs(case)["tokens"]
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    llama = Llama(config, adapter.alpha / adapter.rank, trained=adapter.trained)
    np.testing.assert_allclose(logits(llama, base, tokens, adapter.lora), theirs, rtol=0, atol=1e-5)
    assert np.abs(theirs - golden(case)["logits"]).max() > 1e-2
    settings = {"rank": 3, "alpha": 5, "targets": TARGETS, "base_name": "x", "trained": adapter.trained}
    save_adapter(tmp_path / "ours", adapter.lora, **settings)
    again = peft.PeftModel.from_pretrained(make_goldens.family_model(case), tmp_path / "ours")
    with torch.no_grad():
        found = again(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-5)
