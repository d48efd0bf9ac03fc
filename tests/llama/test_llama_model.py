"""The decoder against Hugging Face's at every level, LoRA against a merge by hand, and one product for all clients."""

from functools import cache, partial

import flax.linen as nn
import jax
import make_goldens
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from llama_cases import golden, load, random_lora, random_rows
from make_goldens import CASES

from fedmezo_jax.core import client, federated, mezo, personalization
from fedmezo_jax.llama import model as model_module
from fedmezo_jax.llama.attention import rotary_table, rotate
from fedmezo_jax.llama.checkpoints.base_model import load_base
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.lora import TARGETS
from fedmezo_jax.llama.loss import pair_loss_of
from fedmezo_jax.llama.model import Block, Llama, RMSNorm, SelfAttention
from fedmezo_jax.llama.precision import Products
from fedmezo_jax.llama.registry import cache_folder, load_tokenizer

PLAIN = "2 key/value heads, untied"


@cache
def computed(case):
    """Our numbers for ``make_goldens.reference``, but for the loss."""
    config, base = load(case)
    parts = (config, 1.0, Products("float32"))

    @jax.jit
    def levels(base, given):
        logits = Llama(config).apply({"params": base}, given["tokens"], {})
        if config.tie_word_embeddings:
            return {"logits": logits}  # all below the head is as in the untied case
        layer = jax.tree.map(lambda leaf: leaf[1], base["layers"])
        rope, stream = rotary_table(config, 12), given["stream"]
        norm, attention = RMSNorm(config.rms_norm_eps), SelfAttention(*parts)
        return {
            "norm": norm.apply({"params": layer["input_layernorm"]}, stream),
            "rotated": rotate(given["queries"], rope),
            "attention": attention.apply({"params": layer["self_attn"]}, stream, {}, rope),
            "block": Block(*parts).apply({"params": layer}, stream, {}, 1, rope, None)[0],
            "logits": logits,
        }

    return levels(base, make_goldens.inputs(case))


def assert_same(found, expected):
    for level, value in found.items():
        assert np.shape(value) == np.shape(expected[level])
        np.testing.assert_allclose(value, expected[level], rtol=0, atol=1e-5, err_msg=level)


@pytest.mark.parametrize("case", CASES)
def test_every_level_equals_hugging_face_s_as_stored(case):
    assert_same(computed(case), golden(case))


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_every_level_equals_hugging_face_s(case):
    expected = make_goldens.reference(case)
    assert_same(computed(case), expected)
    assert_same(golden(case), expected)


@pytest.mark.torch
def test_smollm2_equals_hugging_face_s():
    import torch

    folder = cache_folder() / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip("smollm2-135m is not in the cache: a run with --model smollm2-135m puts it there")
    from transformers import LlamaForCausalLM

    text = "Janet has 3 apples and buys 4 more; she gives 2 to Tom. The capital of France is"
    tokens = np.array([load_tokenizer(folder)(text)["input_ids"]], np.int32)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(folder)(torch.from_numpy(tokens).long()).logits.numpy()
    config = LlamaConfig.from_json(folder)
    found = logits(Llama(config), load_base(folder, config), tokens, {})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert load_tokenizer(folder).decode(int(found[0, -1].argmax())) == " Paris"


@partial(jax.jit, static_argnums=0)
def logits(model, base, tokens, lora):
    return model.apply({"params": base}, tokens, lora)


# LoRA


@pytest.mark.parametrize("given", [TARGETS, ("k_proj", "down_proj")], ids="+".join)
def test_lora_equals_a_merge_by_hand(given):
    """Each target alone (the other B are zero, as at the start), and all at once."""
    config, base = load("mlp biases, wide heads")
    model, full, tokens = Llama(config, 1.75), random_lora(config, given), make_goldens.inputs(PLAIN)["tokens"]
    plain = logits(model, base, tokens, {})
    for targets in (*((target,) for target in given), given):
        lora = {name: halves | {"B": halves["B"] * (name in targets)} for name, halves in full.items()}
        merged = jax.tree.map(np.asarray, base)
        for target in targets:
            block = merged["layers"]["self_attn" if target in TARGETS[:4] else "mlp"]
            delta = np.asarray(lora[target]["A"], np.float64) @ np.asarray(lora[target]["B"], np.float64)
            block[target] = block[target] | {"kernel": np.float32(block[target]["kernel"] + 1.75 * delta)}
        found = logits(model, base, tokens, lora)
        np.testing.assert_allclose(found, logits(model, merged, tokens, {}), rtol=0, atol=1e-5)
        assert np.abs(found - plain).max() > 0.1


def test_a_lora_whose_b_is_zero_changes_no_bit():
    config, base = load(PLAIN)
    lora = {name: halves | {"B": 0 * halves["B"]} for name, halves in random_lora(config, ("v_proj",)).items()}
    tokens = make_goldens.inputs(PLAIN)["tokens"]
    plain, adapted = (logits(Llama(config), base, tokens, lora) for lora in ({}, lora))
    np.testing.assert_array_equal(plain, adapted)


@pytest.mark.parametrize("length", [1, 7])
def test_what_follows_a_token_does_not_change_its_logits(length):
    config, base = load(PLAIN)
    model, tokens = Llama(config), make_goldens.inputs(PLAIN)["tokens"]
    padded = np.where(np.arange(12) < length, tokens, 0)
    whole, early = logits(model, base, tokens, {}), logits(model, base, padded, {})
    np.testing.assert_array_equal(whole[:, :length], early[:, :length])
    assert np.abs(whole[:, length:] - early[:, length:]).max() > 0.1
    cut = logits(model, base, tokens[:, :length], {})
    np.testing.assert_allclose(whole[:, :length], cut, rtol=0, atol=1e-5)


# One product for all clients

CLIENTS, STEPS, ROWS = 5, 2, 3


def kernel_shapes(base):
    """The [in, out] shapes of the frozen matrices, the tied or untied head among them."""
    flat = jax.tree_util.tree_leaves_with_path(base)
    kernels = [leaf.shape[-2:] for path, leaf in flat if path[-1].key == "kernel"]
    return {*kernels, base["embed_tokens"]["embedding"].shape}


def equations(jaxpr):
    """All equations of a jaxpr, those inside scans and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def frozen_operands(jaxpr, shapes):
    """For each product with an operand of a frozen matrix's shape, however turned: the batch axes of that operand."""
    shapes = {tuple(sorted(shape)) for shape in shapes}
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            for operand, batch in zip(equation.invars, equation.params["dimension_numbers"][1], strict=True):
                rest = [size for axis, size in enumerate(operand.aval.shape) if axis not in batch]
                if tuple(sorted(rest)) in shapes:
                    yield tuple(operand.aval.shape[axis] for axis in batch)


def round_jaxpr(config, base, precision):
    """What all clients do in a FedMeZO round, unlowered."""
    model = Llama(config, 2.0, precision)
    rates, work = personalization.RateConfig(1e-3, "frozen", 0.5), client.mezo_client(mezo.MezoConfig(1e-3))
    init, round = federated.federated(work, rates)
    lora, rows = random_lora(config, rank=6), random_rows(CLIENTS, STEPS, ROWS, length=17, labels=7)
    cohort = federated.Cohort(np.arange(CLIENTS), np.ones(CLIENTS, np.float32), rows)
    key = jax.random.key(0, impl="threefry2x32")
    return jax.make_jaxpr(round.work)(init(lora, CLIENTS), pair_loss_of(model, base), cohort, key).jaxpr


@pytest.mark.parametrize(("case", "precision"), [(PLAIN, "float32"), ("1 key/value heads, tied", "paired")])
def test_all_clients_share_one_product_with_each_frozen_matrix(case, precision):
    config, base = load(case)
    found = list(frozen_operands(round_jaxpr(config, base, precision), kernel_shapes(base)))
    pairs = 1 if precision == "paired" else 2  # the losses at θ+μz and at θ−μz, or both in one
    assert found == [()] * (8 * pairs)  # seven projections (their scan's body counts once) and the head


class MergedDense(nn.Module):
    """What ``Dense`` must not do: W + (α/r)·A·B first, which makes a copy of W for each client."""

    features: int
    bias: bool
    lora_scale: float
    products: Products

    @nn.compact
    def __call__(self, x, adapter=None):
        kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], self.features))
        return x @ (kernel if adapter is None else kernel + self.lora_scale * adapter["A"] @ adapter["B"])


def test_a_merge_inside_the_step_would_be_seen(monkeypatch):
    config, base = load(PLAIN)
    monkeypatch.setattr(model_module, "Dense", MergedDense)
    found = list(frozen_operands(round_jaxpr(config, base, "float32"), kernel_shapes(base)))
    assert found.count((CLIENTS,)) >= 14
