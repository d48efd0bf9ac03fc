"""The decoder in Flax Linen: frozen base weights and a LoRA tree come in side by side and are never merged.

It is LLaMA's; what other families add to it (``families.py``) is absent from a LLaMA's program. Layers are stacked on a
leading axis and run under ``scan``. Shapes in this file: B batch, S tokens, D hidden size, F MLP size, V vocabulary, N
query heads, K key/value heads, h head width, L layers, r LoRA rank.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, ClassVar, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fedmezo_jax.core.mezo import Perturbation, shift_row
from fedmezo_jax.data.packing import Layout
from fedmezo_jax.llama import head, tangents
from fedmezo_jax.llama.attention import causal_attention, layer_rope, layer_window, rotary_table, rotate
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.precision import Precision, Products, frozen_product, keep_in_loop, product, unfused
from fedmezo_jax.llama.quantised import Quantised

Base: TypeAlias = dict[str, Any]
Lora: TypeAlias = dict[str, dict[str, jax.Array]]
"""``{"q_proj": {"A": [L, in, r], "B": [L, r, out]}, …}``, float32; ``{}`` is the base alone."""

_INIT = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · scale over the last axis (arXiv 1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises ``[..., D]`` in float32; see :func:`unfused`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        mean_square = unfused(jnp.mean(x * x, axis=-1, keepdims=True))
        return x * jax.lax.rsqrt(mean_square + self.epsilon) * scale.astype(x.dtype)


class Dense(nn.Module):
    """A frozen projection with an optional low-rank adapter: x·W + b + (α/r)·(x·A)·B (LoRA, arXiv 2106.09685).

    Under ``vmap`` over clients W has no batch axis, so all clients share one large product; W + A·B would copy W for
    each.
    """

    features: int
    bias: bool
    lora_scale: float
    products: Products

    @nn.compact
    def __call__(self, x: jax.Array, adapter: dict[str, jax.Array] | None = None) -> jax.Array:
        """Maps ``[..., in]`` to ``[..., features]``; ``adapter`` holds A ``[in, r]`` and B ``[r, features]``."""
        kernel = self.get_variable("params", "kernel")
        if not isinstance(kernel, Quantised):
            kernel = self.param("kernel", _INIT, (x.shape[-1], self.features))
        y = frozen_product(x, kernel, self.products)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        if adapter is not None:
            y = y + self.lora_scale * product(product(x, adapter["A"]), adapter["B"])
        return y


class Projections(nn.Module):
    """What all forms of attention share: the four projections, and norms of q and k where the family has them."""

    config: LlamaConfig
    lora_scale: float
    products: Products

    def heads(self, name: str, count: int, x: jax.Array, lora: Lora) -> jax.Array:
        """``[B, S, count, h]``, unrotated, of q_proj, k_proj or v_proj."""
        projected = self.project(name, count * self.config.head_dim, x, lora)
        projected = projected.reshape(*x.shape[:2], count, self.config.head_dim)
        if self.config.qk_norm and name != "v_proj":
            return RMSNorm(self.config.rms_norm_eps, name=name.replace("proj", "norm"))(projected)
        return projected

    def project(self, name: str, features: int, x: jax.Array, lora: Lora) -> jax.Array:
        """Maps ``[..., in]`` to ``[..., features]``."""
        bias = self.config.has_bias(name)
        return Dense(features, bias, self.lora_scale, self.products, name=name)(x, lora.get(name))


class SelfAttention(Projections):
    """Causal attention with rotary positions and grouped key/value heads (GQA, arXiv 2305.13245)."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        lora: Lora,
        rope: tuple[jax.Array, jax.Array],
        window: jax.Array | int | None = None,
        layout: Layout | None = None,
    ) -> jax.Array:
        """Attends over ``[B, S, D]``. Padding belongs on the right, where causality alone keeps it unseen.

        With a layout, over the ``[B, S]`` examples that are packed in ``[1, T, D]``.
        """
        c = self.config

        def heads(name, count):
            projected = self.heads(name, count, x, lora)
            return projected if layout is None else layout.spread(projected)

        query = rotate(heads("q_proj", c.num_attention_heads), rope)
        key = rotate(heads("k_proj", c.num_key_value_heads), rope)
        mixed = causal_attention(query, key, heads("v_proj", c.num_key_value_heads), window)
        mixed = mixed if layout is None else layout.gather(mixed)
        return self.project("o_proj", c.hidden_size, mixed.reshape(*x.shape[:2], -1), lora)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    config: LlamaConfig
    lora_scale: float
    products: Products

    @nn.compact
    def __call__(self, x: jax.Array, lora: Lora) -> jax.Array:
        """Maps ``[B, S, D]`` to itself through width F."""
        c = self.config

        def project(name, x, features):
            return Dense(features, c.mlp_bias, self.lora_scale, self.products, name=name)(x, lora.get(name))

        gated = nn.silu(project("gate_proj", x, c.intermediate_size)) * project("up_proj", x, c.intermediate_size)
        return project("down_proj", gated, c.hidden_size)


class Block(nn.Module):
    """One decoder layer, x + attention(norm(x)) and then x + mlp(norm(x))."""

    config: LlamaConfig
    lora_scale: float
    products: Products

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        lora: Lora,
        layer: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        perturbation: Perturbation | None,
        window: jax.Array | int | None = None,
        layout: Layout | None = None,
    ) -> tuple[jax.Array, None]:
        """Maps ``[B, S, D]`` to itself; ``lora`` is this layer's share (no L axis), moved here if a perturbation is
        given. ``layer`` is the share's index in the whole LoRA tree; ``rope`` and ``window`` are this layer's, and
        ``layout`` is that of packed examples.

        Drawing the layer's z inside the scan is what keeps a step in the memory of a forward pass.
        """
        if perturbation is not None:
            lora = shift_row(lora, perturbation, layer)
        c = self.config
        attention = SelfAttention(c, self.lora_scale, self.products, name="self_attn")
        mlp = Mlp(c, self.lora_scale, self.products, name="mlp")
        x = x + attention(RMSNorm(c.rms_norm_eps, name="input_layernorm")(x), lora, rope, window, layout)
        x = x + mlp(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x), lora)
        return x, None


class Llama(nn.Module):
    """The decoder.

    Attributes:
        config: sizes and constants.
        lora_scale: α/r.
        precision: of the products with frozen weights; ``paired`` only under ``vmap`` over a pair.
        least_rows: products with frozen weights are padded to this many rows, see :func:`precision.least_rows`.
        eight_bit: multiply kernels in int8 or fp8 by activations in eight bits (:class:`precision.Products`).
        trained: indices of the layers that have an adapter, ascending; None for all. A LoRA tree's leading axis has
            one entry for each of them.
        checkpointed: compute a layer's activations a second time when back-propagating, instead of keeping them.
    """

    config: LlamaConfig
    lora_scale: float = 1.0
    precision: Precision = "float32"
    least_rows: int = 1
    eight_bit: bool = False
    trained: tuple[int, ...] | None = None
    checkpointed: bool = False
    block: ClassVar[type[nn.Module]] = Block

    def setup(self):  # noqa: D102
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        layers = nn.scan(
            self.block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
        )
        self.layers = layers(c, self.lora_scale, self._products)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Dense(c.vocab_size, False, 0.0, self._products)

    @property
    def trained_layers(self) -> tuple[int, ...]:
        """``trained``, with all layers for None."""
        return tuple(range(self.config.num_hidden_layers)) if self.trained is None else self.trained

    @property
    def _products(self) -> Products:
        return Products(self.precision, self.least_rows, self.eight_bit)

    def hidden(
        self, tokens: jax.Array, lora: Lora, perturbation: Perturbation | None = None, layout: Layout | None = None
    ) -> jax.Array:
        """Residual stream after the last layer, ``[B, S, D]`` float32, for ``[B, S]`` int32 tokens.

        With a perturbation, at LoRA parameters ``lora + scale·z``. With a layout, of examples packed in ``[1, T]``.
        """
        if self.is_initializing():
            x, rope = self.embed_tokens(tokens).astype(jnp.float32), rotary_table(self.config, tokens.shape[1])
            return self.layers(x, lora, jnp.arange(self.config.num_hidden_layers), rope, perturbation)[0]
        return self.suffix(self.prefix(tokens, layout), lora, perturbation, layout)

    def prefix(self, tokens: jax.Array, layout: Layout | None = None) -> jax.Array:
        """Residual stream below the first trained layer, ``[B, S, D]`` float32: the same whatever the LoRA is."""
        return self._run(self.embed_tokens(tokens).astype(jnp.float32), 0, self.trained_layers[0], layout=layout)

    def frozen(self, x: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
        """Residual stream after the layers ``start`` to ``start + count − 1``, from that before them.

        They have no adapter, and are the first ``count`` of those in the base: so the same program runs any of them.
        Both numbers are traced. A loop whose length the compiler knew to be 1 would be fused otherwise, and round
        otherwise, than that of :meth:`prefix`.
        """
        rope, stacked = rotary_table(self.config, x.shape[1]), self.variables["params"]["layers"]
        block = Block(self.config, self.lora_scale, self._products, parent=None)

        def run_layer(i, x):
            own_rope = layer_rope(self.config, rope, start + i)
            window = layer_window(self.config, start + i, x.shape[1])
            return block.apply({"params": _sliced(stacked, i)}, x, {}, start + i, own_rope, None, window)[0]

        return jax.lax.fori_loop(0, count, run_layer, x)

    def suffix(
        self, x: jax.Array, lora: Lora, perturbation: Perturbation | None = None, layout: Layout | None = None
    ) -> jax.Array:
        """Residual stream after the last layer, from that of :meth:`prefix`.

        Of the base's layers only those from the first trained one on are used, and the others may be missing from it.
        """
        trained = self.trained_layers
        start, stop = trained[0], self.config.num_hidden_layers
        while start < stop:
            adapted = start in trained
            end = next((i for i in range(start, stop) if (i in trained) != adapted), stop)
            if adapted:
                row = trained.index(start)
                share = jax.tree.map(itemgetter(slice(row, row + end - start)), lora)
                x = self._run(x, start, end, share, row, perturbation, layout)
            else:
                x = self._run(x, start, end, layout=layout)
            start = end
        return x

    def _run(
        self,
        x: jax.Array,
        start: int,
        stop: int,
        lora: Lora | None = None,
        row: int = 0,
        perturbation: Perturbation | None = None,
        layout: Layout | None = None,
    ) -> jax.Array:
        """Layers ``start`` to ``stop − 1``; ``lora`` is theirs, from entry ``row`` of the whole LoRA tree on."""
        if start == stop:
            return x
        length = x.shape[1] if layout is None else layout.place.shape[1]
        rope = rotary_table(self.config, length)
        # The scan of setup, but slicing the weights itself: see keep_in_loop.
        stacked = self.variables["params"]["layers"]
        missing = self.config.num_hidden_layers - jax.tree.leaves(stacked)[0].shape[0]
        block = Block(self.config, self.lora_scale, self._products, parent=None)

        def apply(x, lora, frozen, perturbation=None):
            stacked, layer, rope, layout = frozen
            weights = jax.tree.map(lambda leaf: checkpoint_name(leaf, "weights"), _sliced(stacked, layer - missing))
            own_rope, window = layer_rope(self.config, rope, layer), layer_window(self.config, layer, length)
            at = layer - start + row
            return block.apply({"params": weights}, x, lora, at, own_rope, perturbation, window, layout)[0]

        def first_layer(_, lora, x_and_frozen):
            x, frozen = x_and_frozen
            return apply(x, lora, frozen)

        def run_layer(x, layer_and_lora, is_first=False):
            layer, lora = layer_and_lora
            frozen = stacked, layer, rope, layout
            if perturbation is not None and perturbation.tangent and x.size >= tangents.LEAST_ROWS * x.shape[-1]:
                moving = perturbation, layer - start + row
                if is_first:
                    return tangents.one_by_one(first_layer)((), lora, (x, frozen), *moving), None
                return tangents.one_by_one(apply)(x, lora, frozen, *moving), None
            return apply(x, lora, frozen, perturbation), None

        layers = jnp.arange(start, stop), lora or {}
        if perturbation is not None and perturbation.tangent and row == 0:
            # What enters the first trained layer has no tangent, and so has nothing in it before its first adapter. In
            # the loop over layers all of it would have one.
            x, _ = run_layer(x, jax.tree.map(itemgetter(0), layers), is_first=True)
            if stop - start == 1:
                return x
            layers = jax.tree.map(itemgetter(slice(1, None)), layers)
        policy = None if self.checkpointed else jax.checkpoint_policies.save_anything_except_these_names("weights")
        run_layer = jax.checkpoint(run_layer, prevent_cse=False, policy=policy)
        return jax.lax.scan(run_layer, x, layers)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and head: ``[..., D]`` to ``[..., V]``, float32."""
        x = self.norm(hidden)
        if self.config.tie_word_embeddings:
            return frozen_product(x, self.embed_tokens.embedding.T, self._products)
        return self.lm_head(x)

    def label_losses(self, hidden: jax.Array, labels: jax.Array) -> jax.Array:
        """See :func:`head.label_losses`: ``[R]`` from residual streams ``[R, D]`` and labels ``[R]``."""
        return head.label_losses(*self._at_head(hidden, labels))[: len(hidden)]

    def label_scores(self, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See :func:`head.label_scores`: both ``[R]`` from residual streams ``[R, D]`` and labels ``[R]``."""
        losses, is_best = head.label_scores(*self._at_head(hidden, labels))
        return losses[: len(hidden)], is_best[: len(hidden)]

    def _at_head(self, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, bool, Precision]:
        """What the head's functions take, with as many rows as its products need."""
        missing = max(0, self.least_rows - len(hidden))
        x = self.norm(jnp.pad(hidden, [(0, missing), (0, 0)]))
        tied = self.config.tie_word_embeddings
        table = self.embed_tokens.embedding if tied else self.variables["params"]["lm_head"]["kernel"]
        return x, table, jnp.pad(labels, (0, missing)), tied, self.precision

    def __call__(self, tokens: jax.Array, lora: Lora) -> jax.Array:
        """Logits ``[B, S, V]`` float32 of every position."""
        return self.logits(self.hidden(tokens, lora))


def _sliced(stacked: Base, index: jax.Array) -> Base:
    """A layer's weights, sliced in the loop."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(*keep_in_loop(leaf, index), 0, False), stacked)


class Embedding(nn.Module):
    """A table ``[V, D]`` of token vectors, readable from outside because a tied head uses it too."""

    features: int
    width: int

    def setup(self):  # noqa: D102
        self.embedding = self.param("embedding", _INIT, (self.features, self.width))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Looks up ``[...]`` int32 tokens, giving ``[..., D]``."""
        return self.embedding[tokens]
