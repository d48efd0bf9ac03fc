"""No field of a family's ``config.json`` is without its effect: it changes the logits as in transformers, or the shapes
that the weights must have, or is refused by name; and the fields are those that transformers writes."""

import json

import jax
import make_goldens
import numpy as np
import pytest
import transformers
from llama_cases import load
from safetensors.numpy import save_file

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.families import FAMILIES
from fedmezo_jax.llama.model import Llama

CASES = {
    "mistral": "mistral, window",
    "ministral": "ministral, window in one layer",
    "qwen2": "qwen2, window above",
    "qwen3": "qwen3",
    "smollm3": "smollm3, window",
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"
LOGITS = {  # change -> another model from the same weights
    "rms_norm_eps": {"rms_norm_eps": 0.3},
    "rope_theta": {"rope_theta": 300.0},
    "rope_parameters": {"rope_parameters": {"rope_theta": 300.0, **LINEAR}, "rope_theta": None},
    "sliding_window": {"sliding_window": 3},
    "layer_types": {"layer_types": [FULL, SLIDING, SLIDING], "use_sliding_window": True, "sliding_window": 4},
    "use_sliding_window": {"use_sliding_window": False},
    "max_window_layers": {"max_window_layers": 2},
    "no_rope_layers": {"no_rope_layers": [1, 0, 1]},
    "no_rope_layer_interval": {"no_rope_layers": None, "no_rope_layer_interval": 2},
}
SHAPES = {  # change -> the weights no longer fit
    "model_type": {},  # that of another case
    "vocab_size": {"vocab_size": 60},
    "hidden_size": {"hidden_size": 36},
    "intermediate_size": {"intermediate_size": 40},
    "num_hidden_layers": {"num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 1], "layer_types": None},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_key_value_heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 12},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
}
NEUTRAL = {  # change -> the same config but for the field
    "max_position_embeddings": {"max_position_embeddings": 77},
    "bos_token_id": {"bos_token_id": 7},
    "eos_token_id": {"eos_token_id": [7, 8]},
}
REFUSED = {  # change -> no model
    "hidden_act": {"hidden_act": "gelu"},
    "architectures": {"architectures": ["GemmaForCausalLM"]},
    "is_encoder_decoder": {"is_encoder_decoder": True},
}
# How the model was made, stored or labelled; dropout, which no forward pass has; padding, which no token attends to.
WITHOUT_EFFECT = set(
    """
    transformers_version output_hidden_states return_dict dtype chunk_size_feed_forward id2label label2id problem_type
    initializer_range use_cache pad_token_id attention_dropout _name_or_path output_attentions
    """.split()  # noqa: SIM905
)


def own_fields(family):
    """Of the transformers class's ``config.json``."""
    written = transformers.AutoConfig.for_model(family).to_dict().keys() - WITHOUT_EFFECT
    extra = {"rope_theta"} | ({"max_window_layers"} & {*FAMILIES[family].pattern_fields})
    return written | extra | {"head_dim"}  # every class takes a head_dim


def pairs(table):
    """(family, field) for the families whose config.json has the field."""
    return [(family, field) for family in CASES for field in table if field in own_fields(family)]


def of(family, **changed):
    """The family's config.json with fields changed that it has."""
    raw = make_goldens.raw_config(CASES[family])
    known = own_fields(family) | raw.keys() | {"model_type"}
    return raw | {field: value for field, value in changed.items() if field in known}


def logits(family, **changed):
    config = LlamaConfig.from_json(of(family, **changed))
    tokens = make_goldens.inputs(CASES[family])["tokens"]
    with jax.disable_jit():
        return Llama(config).apply({"params": load(CASES[family])[1]}, tokens, {})


@pytest.mark.parametrize("family", CASES)
def test_every_field_that_transformers_has_is_tried(family):
    assert CASES.keys() == FAMILIES.keys() - {"llama"}  # LLaMA's are tried in test_llama_parity
    assert own_fields(family) <= LOGITS.keys() | SHAPES.keys() | NEUTRAL.keys() | REFUSED.keys()


@pytest.mark.torch
@pytest.mark.parametrize(("family", "field"), pairs(LOGITS))
def test_a_field_of_the_computation_changes_the_logits_as_in_transformers(family, field):
    import torch

    if family == "qwen3" and field == "sliding_window":
        before, changed = {"use_sliding_window": True, "max_window_layers": 1}, {"sliding_window": 3}
    elif family == "qwen3" and field == "max_window_layers":
        before, changed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, LOGITS[field]
    elif family == "qwen3" and field == "use_sliding_window":
        before, changed = {"sliding_window": 4, "max_window_layers": 0}, {"use_sliding_window": True}
    else:
        before, changed = {}, LOGITS[field]
    found = logits(family, **before | changed)
    assert np.abs(found - logits(family, **before)).max() > 1e-2
    model = make_goldens.family_model(CASES[family], **of(family, **before | changed))
    with torch.no_grad():
        expected = model(torch.from_numpy(make_goldens.inputs(CASES[family])["tokens"]).long()).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "field"), pairs(SHAPES))
def test_a_field_of_the_shapes_is_held_against_the_weights(tmp_path, family, field):
    save_file(make_goldens.tensors(CASES[family]), tmp_path / "model.safetensors")
    raw = of(family, **SHAPES[field])
    if field == "model_type":
        raw = make_goldens.raw_config("mistral" if family == "qwen3" else "qwen3")
    elif field == "num_key_value_heads" and family == "qwen2":  # it has 4 already
        raw |= {"num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = LlamaConfig.from_json(tmp_path)
    with pytest.raises(UserError, match=r"the weights do not fit config.json"):
        load_base(tmp_path, config)


@pytest.mark.parametrize(("family", "field"), pairs(NEUTRAL))
def test_other_fields_change_no_bit(family, field):
    np.testing.assert_array_equal(logits(family, **NEUTRAL[field]), logits(family))


@pytest.mark.parametrize("family", CASES)
def test_what_the_family_does_not_have_is_refused_by_name(family):
    raw = make_goldens.raw_config(CASES[family])
    LlamaConfig.from_json(raw)
    alien = {
        "attention_bias": True,
        "mlp_bias": True,
        "attn_logit_softcapping": 30.0,
        "partial_rotary_factor": 0.5,
        "quantization_config": {"bits": 4},
        "use_sliding_window": True,
        "layer_types": [FULL] * 3,
        "no_rope_layers": [1, 0, 1],
        "use_mrope": True,
    }
    alien = {field: value for field, value in alien.items() if field not in own_fields(family)}
    for changed in (*({field: value} for field, value in alien.items()), *REFUSED.values()):
        with pytest.raises(UserError) as caught:
            LlamaConfig.from_json(raw | changed)
        assert next(iter(changed)) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changed", "named"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window must be a whole number of tokens"),
        ("mistral", {"sliding_window": True}, "sliding_window"),
        ("ministral", {"layer_types": [FULL]}, "layer_types must be a list of 3 entries"),
        ("ministral", {"layer_types": ["chunked_attention"] * 3}, "layer_types must be a list of 3 entries"),
        ("ministral", {"sliding_window": None}, "names sliding_attention, which needs sliding_window"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window must be true or false"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers must be a number of layers"),
        ("qwen3", {"layer_types": [SLIDING] * 3}, "needs use_sliding_window and sliding_window"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must be a list of 3 flags"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers must be a list of 3 flags"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval must be a number"),
        ("qwen3", {"model_type": ["qwen3"]}, "model_type is"),
    ],
    ids=str,
)
def test_a_pattern_that_means_nothing_is_refused(family, changed, named):
    with pytest.raises(UserError) as caught:
        LlamaConfig.from_json(make_goldens.raw_config(CASES[family]) | changed)
    assert named in str(caught.value)


def test_heads_of_other_families_need_not_divide_the_hidden_size():
    raw = make_goldens.raw_config("qwen3") | {"hidden_size": 30}
    assert LlamaConfig.from_json(raw).head_dim == 8
    with pytest.raises(UserError, match="hidden_size 30 is not a multiple of 4 heads"):
        LlamaConfig.from_json(raw | {"head_dim": None})
