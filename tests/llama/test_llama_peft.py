"""PEFT's adapters come in with PEFT's logits, and PEFT opens ours."""

import math

import jax
import numpy as np
import pytest
from llama_files import SMALL
from safetensors.numpy import load_file, save_file
from test_llama_adapter import CONFIG, random_lora

from fedmezo_jax.llama.checkpoints.adapter import load_adapter, save_adapter
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.lora import TARGETS
from fedmezo_jax.llama.model import Llama

# PEFT still asks transformers by the older name
peft_test = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def torch_base():
    import torch
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(TorchConfig(**SMALL))


def peft_layers(model, target):
    block = "self_attn" if target in TARGETS[:4] else "mlp"
    return [getattr(getattr(layer, block), target) for layer in model.base_model.model.model.layers]


PEFT_OPTIONS = {
    "list": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "expression": {"r": 2, "lora_alpha": 6, "target_modules": r".*\.(self_attn|mlp)\.(k|o|gate|down)_proj"},
    "all": {"r": 5, "lora_alpha": 7, "target_modules": "all-linear"},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "target_modules": ["up_proj", "o_proj"], "use_rslora": True},
    "some layers": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "one layer, all projections": {"r": 2, "lora_alpha": 6, "target_modules": list(TARGETS), "layers_to_transform": 0},
    "with dropout": {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj"], "lora_dropout": 0.5},
}


@pytest.mark.torch
@peft_test
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_peft_s_adapters_give_peft_s_logits(tmp_path, options, stored):
    import peft
    import torch

    base = torch_base()
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**PEFT_OPTIONS[options], init_lora_weights=False)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, stored)).float() * 4
    model.save_pretrained(tmp_path / "adapter")
    if stored == "bfloat16":
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: tensor.astype(np.dtype("bfloat16")) for name, tensor in load_file(file).items()}, file)
    adapter = load_adapter(tmp_path / "adapter", CONFIG)
    tokens = np.array([[1, 5, 3, 10, 0, 7, 7, 2]])
    with torch.no_grad():
        theirs, plain = model(torch.from_numpy(tokens)).logits.numpy(), None
        with model.disable_adapter():
            plain = model(torch.from_numpy(tokens)).logits.numpy()
    llama = Llama(CONFIG, adapter.alpha / adapter.rank, trained=adapter.trained)
    base = load_base(tmp_path / "base", CONFIG)
    ours = jax.jit(llama.apply)({"params": base}, tokens, adapter.lora)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert np.abs(theirs - plain).max() > 1e-2
    # and out again, exactly, and in at PEFT once more
    settings = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets, "trained": adapter.trained}
    settings["base_name"] = "x"
    save_adapter(tmp_path / "again", adapter.lora, **settings)
    back = load_adapter(tmp_path / "again", CONFIG)
    jax.tree.map(np.testing.assert_array_equal, back.lora, adapter.lora)
    assert back[1:] == adapter[1:]
    again = peft.PeftModel.from_pretrained(torch_base(), tmp_path / "again")
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.from_numpy(tokens)).logits.numpy(), theirs, rtol=0, atol=1e-5)


@pytest.mark.torch
@peft_test
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_peft_s_adapters_come_in(tmp_path, rank_stabilised):
    import peft

    options = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, use_rslora=rank_stabilised
    )
    model = peft.get_peft_model(torch_base(), options)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, CONFIG)
    assert adapter.targets == TARGETS
    for target in TARGETS:
        for i, layer in enumerate(peft_layers(model, target)):
            ours = {half: np.asarray(adapter.lora[target][half][i]) for half in "AB"}
            np.testing.assert_array_equal(ours["A"], layer.lora_A["default"].weight.detach().numpy().T)
            np.testing.assert_array_equal(ours["B"], layer.lora_B["default"].weight.detach().numpy().T)
            assert math.isclose(adapter.alpha / adapter.rank, layer.scaling["default"], rel_tol=1e-15)


@pytest.mark.torch
@peft_test
def test_peft_opens_our_adapters(tmp_path):
    import peft
    import torch

    lora = random_lora(4, ("q_proj", "down_proj"))
    save_adapter(tmp_path, lora, rank=4, alpha=6, targets=("q_proj", "down_proj"), base_name="x/y")
    model = peft.PeftModel.from_pretrained(torch_base(), tmp_path)
    for target in lora:
        for i, layer in enumerate(peft_layers(model, target)):
            for half in "AB":
                theirs = getattr(layer, f"lora_{half}")["default"].weight
                assert theirs.dtype == torch.float32
                np.testing.assert_array_equal(theirs.detach().numpy().T, lora[target][half][i])
            assert layer.scaling["default"] == 1.5
            x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
            delta = (x.numpy() @ lora[target]["A"][i]) @ lora[target]["B"][i] * 1.5
            ours = layer.base_layer(x).detach().numpy() + delta
            np.testing.assert_allclose(layer(x).detach().numpy(), ours, rtol=1e-5, atol=1e-5)
    assert not any("k_proj.lora" in name or "up_proj.lora" in name for name in model.state_dict())
