"""The tensors of a model: names and shapes in Hugging Face's files, and positions in the base pytree."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
from flax import traverse_util

from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.quantised import KernelType, Quantised, quantised_shape

EMBEDDING = ("embed_tokens", "embedding")
"""Path of the table of token vectors."""


class Slot(NamedTuple):
    """Where a stored tensor belongs in the base pytree.

    Attributes:
        path: path of the leaf; a leaf named "kernel" is the stored weight transposed.
        layer: index on the leaf's leading layer axis; None for a leaf without this axis.
        shape: shape as stored.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def projections(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Returns the (in, out) widths of the seven linear maps of a layer, in canonical order."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
    }


def block_of(projection: str) -> str:
    """Returns the block of a layer that contains a projection: ``self_attn`` or ``mlp``."""
    return "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


def layout(config: LlamaConfig) -> dict[str, Slot]:
    """Returns every tensor of Hugging Face's ``…ForCausalLM`` by name; a tied head is left out."""
    hidden, vocab = config.hidden_size, config.vocab_size
    slots = {
        "model.embed_tokens.weight": Slot(EMBEDDING, None, (vocab, hidden)),
        "model.norm.weight": Slot(("norm", "scale"), None, (hidden,)),
    }
    if not config.tie_word_embeddings:
        slots["lm_head.weight"] = Slot(("lm_head", "kernel"), None, (vocab, hidden))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            slots[f"{prefix}.{norm}.weight"] = Slot(("layers", norm, "scale"), layer, (hidden,))
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            path = ("layers", "self_attn", norm, "scale")
            slots[f"{prefix}.self_attn.{norm}.weight"] = Slot(path, layer, (config.head_dim,))
        for name, (width_in, width_out) in projections(config).items():
            block = block_of(name)
            path = ("layers", block, name)
            slots[f"{prefix}.{block}.{name}.weight"] = Slot((*path, "kernel"), layer, (width_out, width_in))
            if config.has_bias(name):
                slots[f"{prefix}.{block}.{name}.bias"] = Slot((*path, "bias"), layer, (width_out,))
    return slots


def leaves(config: LlamaConfig, first: int = 0) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of each leaf of the base pytree by path; layers are stacked, kernels are [in, out].

    Args:
        config: the model's config.
        first: a layer. With one above 0, only the leaves that run hidden states from there on: this layer and those
            above it, the final norm and the head.
    """
    shapes = {}
    for slot in layout(config).values():
        shape = slot.shape[::-1] if slot.path[-1] == "kernel" else slot.shape
        shapes[slot.path] = shape if slot.layer is None else (config.num_hidden_layers - first, *shape)
    if first and not config.tie_word_embeddings:
        del shapes[EMBEDDING]
    return shapes


def held_leaves(
    config: LlamaConfig,
    dtype: Any,
    kernels: KernelType | Literal["as-stored"] | Mapping[tuple[str, ...], KernelType] | None = None,
    first: int = 0,
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct | Quantised]:
    """Returns each of :func:`leaves` as it is held: ``dtype``, or for quantised kernels their parts.

    ``kernels`` is the :data:`KernelType` of all kernels, or of each by its path; None leaves them in ``dtype``. Only
    the projections of the layers are quantised. Embeddings, norms, biases and the head, which makes the losses, keep
    ``dtype``.
    """
    return {
        path: quantised_shape(shape, kernels[path] if isinstance(kernels, Mapping) else kernels)
        if kernels and path[0] == "layers" and path[-1] == "kernel"
        else jax.ShapeDtypeStruct(shape, dtype)
        for path, shape in leaves(config, first).items()
    }


def base_shapes(config: LlamaConfig, first: int = 0) -> dict[str, Any]:
    """Returns the base pytree with each leaf's shape (a tuple of ints) instead of the leaf; see :func:`leaves`."""
    return traverse_util.unflatten_dict(leaves(config, first))
