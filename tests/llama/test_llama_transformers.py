"""Folders of transformers come in, and transformers opens ours."""

import numpy as np
import pytest
from llama_files import SMALL, small_tensors, write_model
from test_llama_checkpoint import BOTH, small_config

from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.config import LlamaConfig


def torch_model(**changed):
    import torch
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(TorchConfig(**(SMALL | changed)))


@pytest.mark.torch
@pytest.mark.parametrize(("tied", "bias"), BOTH)
def test_transformers_models_come_in(tmp_path, tied, bias):
    model = torch_model(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    config = LlamaConfig.from_json(tmp_path)
    base = load_base(tmp_path, config)
    layer = model.model.layers[1]
    for ours, theirs in (
        (base["embed_tokens"]["embedding"], model.model.embed_tokens.weight),
        (base["layers"]["self_attn"]["o_proj"]["kernel"][1], layer.self_attn.o_proj.weight.T),
        (base["layers"]["mlp"]["down_proj"]["kernel"][1], layer.mlp.down_proj.weight.T),
    ):
        np.testing.assert_array_equal(ours, theirs.detach().numpy())
    assert ("lm_head" in base) == (not tied)
    assert ("bias" in base["layers"]["mlp"]["up_proj"]) == bias


@pytest.mark.torch
@pytest.mark.parametrize(("tied", "bias"), BOTH)
def test_transformers_opens_what_is_saved(tmp_path, tied, bias):
    import torch
    from transformers import LlamaForCausalLM

    tensors, config = small_tensors(tied, bias), small_config(tied, bias)
    save_base(tmp_path / "saved", config, load_base(write_model(tmp_path / "model", tensors), config))
    model, report = LlamaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    state = model.state_dict()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(state[name].numpy(), tensor)
