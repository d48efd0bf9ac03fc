"""Kernels in eight and four bits: their errors, and that a model on them is the float model of the same weights."""

import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from llama_cases import random_lora, random_rows
from llama_files import SMALL
from weight_files import assert_same, random_blocks, weights_of, write_gguf_model, write_in

from fedmezo_jax.core import mezo
from fedmezo_jax.core.tree_hash import tree_hash
from fedmezo_jax.data.examples import HiddenBatch
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.base_model import load_base, save_base
from fedmezo_jax.llama.checkpoints.stored_base import StoredBase
from fedmezo_jax.llama.checks import largest_weight
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.generate import generate
from fedmezo_jax.llama.loss import loss_of, pair_loss_of, point_loss_of
from fedmezo_jax.llama.model import Llama
from fedmezo_jax.llama.precision import Products, frozen_product
from fedmezo_jax.llama.prefix import trained_part
from fedmezo_jax.llama.quantised import OwnType, Quantised, StoredType, dequantised, quantise, quantised_shape
from fedmezo_jax.llama.registry import TINY

KERNELS = get_args(OwnType)
WIDE = SMALL | {
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"attention_bias": True, "mlp_bias": False, "tie_word_embeddings": False},
}
TARGETS = ("q_proj", "down_proj")


def is_quantised(leaf):
    return isinstance(leaf, Quantised)


def unpacked(kernel):
    """The weights that a kernel of our own stands for and the scale of each, float32 ``[L, in, out]``."""
    values, scale = np.asarray(kernel.values), np.asarray(kernel.scale, np.float32)
    if kernel.kind in ("int8", "fp8"):
        values, scale = values.swapaxes(1, 2), scale.swapaxes(1, 2)
    if values.dtype == np.uint8:
        layers, half, outputs = values.shape
        integers = np.zeros((layers, 2 * half, outputs), np.float32)
        for row in range(half):
            block, j = divmod(row, 16)
            integers[:, 32 * block + j] = (values[:, row] % 16).astype(np.float32) - 8
            integers[:, 32 * block + j + 16] = (values[:, row] // 16).astype(np.float32) - 8
    else:
        integers = values.astype(np.float32)
    scale = np.repeat(scale, integers.shape[1] // scale.shape[1], axis=1)
    return integers * scale, scale


def float_weights(base):
    """The base with floats for quantised kernels."""
    return jax.tree.map(lambda leaf: unpacked(leaf)[0] if is_quantised(leaf) else leaf, base, is_leaf=is_quantised)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    tensors = weights_of(WIDE)
    draw = np.random.default_rng(1)
    tensors = {name: tensor / 4 if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    up = tensors["model.layers.1.mlp.up_proj.weight"] = draw.standard_normal((96, 64)).astype(np.float32)
    up[3] = 0  # an output without weights
    up[4, :32], up[5, 7], up[6] = 0, 1e3, 1e-30  # a block without weights, a weight that rules its block, tiny ones
    return write_in("safetensors", folder, WIDE, tensors)


@pytest.fixture(scope="module", params=KERNELS)
def case(request, folder):
    """The kind, the config, and the base with and without it."""
    config = LlamaConfig.from_json(folder)
    return request.param, config, load_base(folder, config, "float32", request.param), load_base(folder, config)


def test_each_weight_is_off_by_half_its_scale_at_most(case):
    kind, _, base, original = case
    leaves = traverse_util.flatten_dict(base)
    quantised = {path for path, leaf in leaves.items() if is_quantised(leaf)}
    assert quantised == {path for path in leaves if path[-1] == "kernel" and path[0] == "layers"}
    assert len(quantised) == 7
    for path, stored in traverse_util.flatten_dict(original).items():
        if path not in quantised:
            np.testing.assert_array_equal(leaves[path], stored)
            continue
        weights, scale = unpacked(leaves[path])
        bound = np.maximum(np.abs(stored) / 16, scale / 512) if kind == "fp8" else scale / 2
        assert np.all(np.abs(weights - stored) <= bound * np.float32(1.00004))
        largest = np.abs(stored).reshape(len(stored), -1, 32 if kind == "int4" else stored.shape[1], stored.shape[2])
        levels = {"int8": 127, "fp8": 448, "int4": 7}[kind]
        bound = np.max(largest, axis=2).repeat(largest.shape[2], axis=1) / levels
        assert np.all(scale <= bound * (1 + (1 / 16 if kind == "int4" else 1e-6)))
        if kind == "int4":
            np.testing.assert_array_equal(weights.astype(jnp.bfloat16).astype(np.float32), weights)
    up = unpacked(base["layers"]["mlp"]["up_proj"]["kernel"])[0][1]
    assert not up[:, 3].any()
    assert not up[:32, 4].any()
    assert up[7, 5] == pytest.approx(1e3, rel=0.07)


def test_kernels_take_eight_bits_or_four_and_a_half(case):
    kind, _, base, _ = case
    kernel = base["layers"]["mlp"]["down_proj"]["kernel"]
    count, outputs = 2 * 96 * 64, 2 * 64
    expected = count * 4.5 / 8 if kind == "int4" else count + 4 * outputs
    assert kernel.values.nbytes + kernel.scale.nbytes == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_are_those_of_the_float_model_of_the_same_weights(case, precision):
    kind, config, base, original = case
    model, lora, tokens = Llama(config, 1.5, precision), random_lora(config, TARGETS), random_rows(3).tokens % 30
    logits = jax.jit(model.apply)
    found = logits({"params": base}, tokens, lora)
    expected = logits({"params": float_weights(base)}, tokens, lora)
    # Weights of int8 are rounded where the float model multiplies in bfloat16, and not here.
    rounding = 2e-5 if precision == "float32" or kind == "int4" else 0.05
    size = float(jnp.std(expected))
    np.testing.assert_allclose(found, expected, atol=rounding * size, rtol=0)
    assert np.abs(found - logits({"params": original}, tokens, lora)).max() > 1e-3 * size


def test_generation_runs_on_them(case):
    _, config, base, _ = case
    prompts = [[3, 4, 5], [6]]
    found = generate(Llama(config), base, {}, prompts, 4)
    assert found == generate(Llama(config), float_weights(base), {}, prompts, 4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_generation_has_eight_bit_products_where_the_model_has(kind, folder):
    """Some of the likeliest tokens of the random model are others then."""
    config = LlamaConfig.from_json(folder)
    base, prompts = load_base(folder, config, "float32", kind), np.random.default_rng(0).integers(0, 11, (300, 3))
    likeliest = {}
    for eight_bit in (False, True):
        model = Llama(config, eight_bit=eight_bit)
        likeliest[eight_bit] = np.argmax(jax.jit(model.apply)({"params": base}, prompts, {})[:, -1], axis=-1)
        found = generate(model, base, {}, prompts.tolist(), 1)
        assert [tokens[0] if tokens else config.eos_token_id[0] for tokens in found] == likeliest[eight_bit].tolist()
    assert (likeliest[False] != likeliest[True]).any()


def test_steps_from_hidden_states_are_those_from_tokens(case):
    _, config, base, _ = case
    model, rows = Llama(config, trained=(1,)), random_rows(2)
    rows = rows._replace(tokens=rows.tokens % 30, labels=rows.labels % 30)
    lora = jax.tree.map(lambda leaf: leaf[1:], random_lora(config, TARGETS))
    hidden = model.apply({"params": base}, rows.tokens, method="prefix")
    part = trained_part(model, base)
    assert {len(leaf) for leaf in jax.tree.leaves(part["layers"])} == {1}
    found = jax.jit(loss_of(model, part))(lora, HiddenBatch(hidden, *rows[1:]))
    np.testing.assert_allclose(found, jax.jit(loss_of(model, base))(lora, rows), rtol=1e-6)


@pytest.mark.parametrize("kind", KERNELS)
def test_projected_gradients_are_those_of_the_quantised_model(kind):
    """The reference is the exact directional derivative in float32 on the float weights of the same value."""
    config = LlamaConfig.from_json(TINY)
    draw, scale = np.random.RandomState(0), 1e-3
    rows = random_rows(2, length=24)
    rows = rows._replace(tokens=draw.randint(0, config.vocab_size, rows.tokens.shape).astype(np.int32))
    lora = jax.tree.map(jnp.asarray, random_lora(config, ("q_proj", "v_proj")))
    lora = jax.tree.map(lambda leaf: leaf / 10, lora)

    def derivative(base):
        loss = loss_of(Llama(config), base)

        @jax.jit
        def slope(key):
            z = mezo.shift(jax.tree.map(jnp.zeros_like, lora), mezo.Perturbation(key, 1.0))
            return jax.jvp(lambda lora: loss(lora, rows), (lora,), (z,))[1]

        return np.array([slope(key) for key in keys])

    def two_point(precision, base):
        loss = pair_loss_of(Llama(config, precision=precision), base)

        @jax.jit
        def slope(key):
            plus, minus = loss(lora, rows, mezo.Perturbation(key, jnp.float32(scale)))
            return (plus - minus) / (2 * scale)

        return np.array([slope(key) for key in keys])

    def tangent(base):
        loss = point_loss_of(Llama(config, precision="bfloat16"), base)

        @jax.jit
        def slope(key):
            def at(scale):
                return loss(lora, rows, mezo.Perturbation(key, scale))

            return jax.jvp(at, (jnp.float32(0),), (jnp.float32(1),))[1]

        return np.array([slope(key) for key in keys])

    def error(found, expected):
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    keys = jax.random.split(jax.random.key(1), 8)
    base = load_base(TINY, config, "float32", kind)
    exact = derivative(float_weights(base))
    assert error(two_point("float32", base), exact) < 0.01
    assert error(two_point("paired", base), exact) < 0.05
    assert error(tangent(base), exact) < 0.05


@pytest.fixture(params=["int8", "fp8"])
def eight_bit(request):
    """A kernel in eight bits, activations of very different sizes, and how numpy rounds to the type."""
    kind, draw = request.param, np.random.default_rng(0)
    weights = draw.standard_normal((64, 48)).astype(np.float32)
    kernel = jax.tree.map(lambda part: np.empty(part.shape, part.dtype), quantised_shape((48, 64), kind))
    quantise(weights, kernel)
    x = draw.standard_normal((5, 48)).astype(np.float32) * np.array([[1], [1e3], [0], [1e-4], [1]], np.float32)
    x[4, 7] = 100  # one activation that rules its row
    if kind == "int8":
        return x, kernel, 127, lambda numbers: np.rint(numbers).astype(np.int64)
    return x, kernel, 448, lambda numbers: numbers.astype(jnp.float8_e4m3fn).astype(np.float64)


def test_eight_bit_products_round_each_row_at_its_own_scale(eight_bit):
    """By numpy, whose integers are exact: the result is of rounded activations and of the weights as they are held."""
    x, kernel, largest, rounded = eight_bit
    scale = np.max(np.abs(x), axis=1, keepdims=True) / np.float32(largest)
    numbers = rounded(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0))
    values = np.asarray(kernel.values).astype(numbers.dtype)
    expected = (numbers @ values.T) * scale.astype(float) * np.asarray(kernel.scale, float).T
    found = np.asarray(frozen_product(x, jax.device_put(kernel), Products("float32", eight_bit=True)))
    assert np.all(np.abs(found - expected) <= 2e-6 * np.abs(expected).max(axis=1, keepdims=True))
    assert not found[2].any()
    exact = x.astype(float) @ np.asarray(dequantised(kernel), float)
    assert np.abs(found - exact)[4].max() > 1e-3 * np.abs(exact[4]).max()  # it does round


def test_the_tangent_of_an_eight_bit_product_is_that_of_the_product_without_rounding(eight_bit):
    x, kernel = eight_bit[:2]
    kernel, moved = jax.device_put(kernel), np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    products = Products("float32", eight_bit=True)
    primal, tangent = jax.jvp(lambda x: frozen_product(x, kernel, products), (x,), (moved,))
    np.testing.assert_array_equal(primal, frozen_product(x, kernel, products))
    expected = moved.astype(float) @ np.asarray(dequantised(kernel), float)
    np.testing.assert_allclose(tangent, expected, rtol=1e-4, atol=1e-5)
    _, pull = jax.vjp(lambda x: frozen_product(x, kernel, products), x)
    cotangent = np.ones((5, 64), np.float32)
    np.testing.assert_allclose(pull(cotangent)[0], cotangent @ np.asarray(dequantised(kernel)).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_every_projection_is_an_eight_bit_product_where_it_is_asked_for(kind, eight_bit, folder):
    config = LlamaConfig.from_json(folder)
    model = Llama(config, precision="bfloat16", eight_bit=eight_bit)
    loss, rows = loss_of(model, load_base(folder, config, "bfloat16", kind)), random_rows(2)
    text = jax.jit(loss).lower(random_lora(config, TARGETS), rows).as_text()
    number, total = {"int8": ("i8", "i32"), "fp8": ("f8E4M3FN", "f32")}[kind]
    pattern = rf"dot_general.*\(tensor<[\dx]+x{number}>, tensor<[\dx]+x{number}>\) -> tensor<[\dx]+x{total}>"
    assert len(re.findall(pattern, text)) == (7 if eight_bit else 0)


def test_a_saved_base_is_dequantised(case, tmp_path):
    _, config, base, _ = case
    save_base(tmp_path / "saved", config, base)
    assert_same(load_base(tmp_path / "saved", config), jax.tree.map(jnp.asarray, float_weights(base)))


def test_the_largest_weight_is_found_among_quantised_ones(case):
    _, config, base, _ = case
    name, size = largest_weight(config, base)
    assert name == "model.layers.1.mlp.up_proj.weight"
    assert size == pytest.approx(1e3, rel=0.07)


def test_widths_that_blocks_do_not_divide_are_refused(tmp_path):
    raw = WIDE | {"intermediate_size": 48}
    folder = write_in("safetensors", tmp_path, raw, weights_of(raw))
    config = LlamaConfig.from_json(folder)
    load_base(folder, config, "float32", "int8")
    with pytest.raises(UserError, match="blocks of 32 weights, which do not divide a width of 48: give int8"):
        load_base(folder, config, "float32", "int4")


@pytest.mark.parametrize("kind", KERNELS)
def test_a_weight_that_is_not_finite_is_named(kind, tmp_path):
    tensors = weights_of(WIDE)
    tensors["model.layers.1.self_attn.v_proj.weight"][2, 3] = np.inf
    folder = write_in("safetensors", tmp_path, WIDE, tensors)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj\.weight is not finite"):
        load_base(folder, LlamaConfig.from_json(folder), "float32", kind)


def gguf_folder(tmp_path, raw, kind):
    """A model in one file, with blocks of random bytes where the gguf package cannot write the type.

    In Q4_K_M the second layer's v_proj and the first one's down_proj are Q6_K.
    """
    write_in("safetensors", tmp_path, raw, {})
    (tmp_path / "model.safetensors").unlink()
    tensors, blocks = weights_of(raw), {}
    if "K" in kind:
        for name in [name for name, tensor in tensors.items() if name.startswith("model.layers") and tensor.ndim == 2]:
            rows, inputs = tensors[name].shape
            finer = kind == "Q4_K_M" and ("1.self_attn.v_proj" in name or "0.mlp.down_proj" in name)
            own = Kind["Q6_K" if finer else kind.removesuffix("_M")]
            blocks[name] = own, random_blocks(own, rows, inputs // 256, size=1e-4)
    write_gguf_model(tmp_path / "model.gguf", raw, tensors, kind="F32" if blocks else kind, blocks=blocks)
    return LlamaConfig.from_json(tmp_path)


IN_BLOCKS = WIDE | {"attention_bias": False, "vocab_size": 64}
IN_SUPER_BLOCKS = IN_BLOCKS | {
    **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32},
    **{"num_key_value_heads": 4, "vocab_size": 32},
}


@pytest.mark.parametrize("kind", get_args(StoredType))
def test_blocks_of_a_gguf_file_stay_as_they_are(kind, tmp_path):
    """Their values are those of the gguf package's own dequantisation, in the order of rows that the decoder needs."""
    config = gguf_folder(tmp_path, IN_SUPER_BLOCKS if kind.endswith("K") else IN_BLOCKS, kind)
    base, floats = load_base(tmp_path, config, "float32", "as-stored"), load_base(tmp_path, config)
    assert sum(map(is_quantised, jax.tree.leaves(base, is_leaf=is_quantised))) == 7
    found = jax.tree.map(lambda leaf: dequantised(leaf) if is_quantised(leaf) else leaf, base, is_leaf=is_quantised)
    assert_same(found, floats)
    kernels = [leaf for leaf in jax.tree.leaves(base["layers"], is_leaf=is_quantised) if is_quantised(leaf)]
    block, block_bytes = GGML_QUANT_SIZES[Kind[kind]]
    weights = sum(
        leaf.size for path, leaf in traverse_util.flatten_dict(floats["layers"]).items() if path[-1] == "kernel"
    )
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kernels)) == weights // block * block_bytes
    tokens = random_rows(2).tokens % 30
    logits = jax.jit(Llama(config).apply)
    expected = logits({"params": floats}, tokens, {})
    size = float(jnp.std(expected))
    np.testing.assert_allclose(logits({"params": base}, tokens, {}), expected, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "paired"])
def test_layers_of_one_projection_may_be_of_several_types(precision, tmp_path):
    """As in files called Q4_K_M. Weights are those of the gguf package, and steps those on them as floats."""
    config = gguf_folder(tmp_path, IN_SUPER_BLOCKS, "Q4_K_M")
    base, floats = load_base(tmp_path, config, "float32", "as-stored"), load_base(tmp_path, config)
    several = {
        path for path, leaf in traverse_util.flatten_dict(base).items() if getattr(leaf, "which", None) is not None
    }
    assert {path[-2] for path in several} == {"v_proj", "down_proj"}
    found = jax.tree.map(lambda leaf: dequantised(leaf) if is_quantised(leaf) else leaf, base, is_leaf=is_quantised)
    assert_same(found, floats)
    mlp = base["layers"]["mlp"]
    assert jax.tree.map(lambda part: part.shape, mlp["down_proj"]["kernel"].values) == (2, 512 * 6 // 8, 256)
    assert not mlp["down_proj"]["kernel"].values[1, 512 * 4 // 8 :].any()  # behind those of Q4_K
    rows, lora = random_rows(2), random_lora(config, TARGETS)
    rows = rows._replace(tokens=rows.tokens % 30, labels=rows.labels % 30)
    model, z = Llama(config, precision=precision), mezo.Perturbation(jax.random.key(0), jnp.float32(1e-2))
    losses = [jax.jit(pair_loss_of(model, weights))(lora, rows, z) for weights in (base, floats)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    if precision != "paired":
        slopes = [jax.jit(jax.grad(loss_of(model, weights)))(lora, rows) for weights in (base, floats)]
        jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, rtol=1e-3, atol=1e-5), *slopes)
        assert generate(model, base, {}, [[3, 4, 5], [6]], 4) == generate(model, floats, {}, [[3, 4, 5], [6]], 4)
    save_base(tmp_path / "saved", config, base)
    assert_same(load_base(tmp_path / "saved", config), floats)


@pytest.mark.parametrize("kind", [*get_args(StoredType), "Q4_K_M"])
def test_the_hash_of_what_is_stored_is_that_of_what_is_held(kind, tmp_path):
    """Whichever layers are held: the others are read for it alone."""
    config = gguf_folder(tmp_path, IN_SUPER_BLOCKS if "K" in kind else IN_BLOCKS, kind)
    stored = StoredBase(tmp_path, config, "float32", "as-stored")
    whole = stored.load()
    for first in (0, 1, 2):
        part, found = stored.load_from(first)
        assert found == tree_hash(whole)
        expected = jax.tree.map(lambda leaf, first=first: leaf[first:], whole["layers"])
        if first < 2:
            assert_same(part["layers"], expected)


@pytest.mark.parametrize(("kind", "complaint"), [("F16", "is F16"), ("Q4_1", "is Q4_1"), ("safetensors", "is F32")])
def test_only_blocks_that_are_kept_are_taken_as_stored(kind, complaint, tmp_path):
    raw = WIDE | {"attention_bias": False, "vocab_size": 64}
    write_in("safetensors", tmp_path, raw, weights_of(raw))
    if kind != "safetensors":
        (tmp_path / "model.safetensors").unlink()
        write_gguf_model(tmp_path / "model.gguf", raw, weights_of(raw), kind=kind)
    with pytest.raises(
        UserError, match=f"as-stored keeps Q8_0, Q4_0, Q4_K, Q6_K, and .*{complaint}: give int8 or int4"
    ):
        load_base(tmp_path, LlamaConfig.from_json(tmp_path), "float32", "as-stored")
