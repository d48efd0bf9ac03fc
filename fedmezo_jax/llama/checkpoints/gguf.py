"""Reads GGUF, llama.cpp's file format, with Hugging Face's names and row order."""

import math
from collections.abc import Iterator, Mapping
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.safetensors import Entry
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.folder import opened, shorten
from fedmezo_jax.llama.quantised import KernelType, Quantised

ROPE_FREQS = "rope_freqs.weight"
"""LLaMA 3.1's divisors of the rotary frequencies, stored as a tensor; not a weight."""

INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False, "smollm3": True}
"""The architectures that are read, and whether the rows of q and k lie in the order of interleaved rotary pairs.

They are the families of the same name; llama is Mistral's too.
"""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PARTS: dict[KernelType, tuple[str, ...]] = {
    "Q8_0": ("scale", "values"),
    "Q4_0": ("scale", "values"),
    "Q4_K": ("scale", "subscales", "values"),
    "Q6_K": ("values", "subscales", "scale"),
}
"""The parts of a block of each type that is kept, in the order of its bytes."""
_MOST_PARTS = 1 << 23  # most numbers and strings in the metadata; a tokenizer of 2**18 tokens has about 2 million
_CHUNK = 1 << 18  # stored bytes dequantised at a time; the gguf package's temporaries are several times larger


class Stored(NamedTuple):
    """Where a tensor is in the file.

    Attributes:
        shape: outermost dimension first, unlike in the file.
        kind: the type of its numbers.
        offset: position of its first byte.
        size: number of bytes.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class _BoundedReader(GGUFReader):
    """A reader that raises ``ValueError`` for a part beyond the file's end.

    The parent class returns a shorter part instead, and never finishes an array that claims 2**60 entries.
    """

    _parts = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self._parts += 1
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it ends too early")
        if self._parts > _MOST_PARTS:
            raise ValueError(f"its metadata have more than {_MOST_PARTS:,} parts")
        return super()._get(offset, dtype, count, override_order)


class Gguf(NamedTuple):
    """A file's contents without the bytes of its tensors.

    Attributes:
        file: the file.
        meta: its metadata.
        tensors: its tensors, by Hugging Face's name if there is one.
    """

    file: Path
    meta: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def open_gguf(file: str | PathLike) -> Gguf:
    """Read a file's metadata and the positions of its tensors.

    Raises:
        UserError: the file is damaged or cut short.
    """
    file = Path(file)
    try:
        with opened(file):
            reader = _BoundedReader(file)
        meta = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            _hugging_face_name(tensor.name): Stored(
                tuple(map(int, tensor.shape[::-1])), tensor.tensor_type, int(tensor.data_offset), int(tensor.n_bytes)
            )
            for tensor in reader.tensors
        }
    except (ValueError, IndexError, KeyError, RecursionError) as error:
        raise UserError(f"{file}: is no readable GGUF file ({shorten(str(error))}); fetch it again") from None
    return Gguf(file, meta, tensors)


def architecture(opened: Gguf) -> str:
    """Returns the file's architecture, a key of :data:`INTERLEAVED`.

    Raises:
        UserError: it is another one.
    """
    name = opened.meta.get("general.architecture")
    if not isinstance(name, str) or name not in INTERLEAVED:
        known = ", ".join(INTERLEAVED)
        raise UserError(
            f"{opened.file}: holds a model of architecture {shorten(repr(name))}, only {known} are supported"
        )
    return name


def gguf_entries(opened: Gguf, config: LlamaConfig) -> dict[str, Entry]:
    """Returns the file's tensors as float32 in Hugging Face's row order; reading a tensor dequantises it exactly."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if not INTERLEAVED[architecture(opened)]:
        heads = {}

    def entry(name: str, stored: Stored) -> Entry:
        given = (opened.file, stored, heads.get(name.split(".")[-2]) if "." in name else None)
        dtype = "F32" if _is_known(stored.kind) else stored.kind.name
        blocks = (stored.kind.name, partial(_read_blocks, *given))
        return Entry(opened.file, stored.shape, dtype, partial(read_stored, *given), blocks)

    return {name: entry(name, stored) for name, stored in opened.tensors.items()}


@cache
def _is_known(kind: GGMLQuantizationType) -> bool:
    """Whether the ``gguf`` package can dequantise this type."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; an unknown name stays as it is."""
    parts = name.split(".")
    block = f"model.layers.{parts[1]}." if parts[0] == "blk" and len(parts) == 4 else ""
    if len(parts) != (4 if block else 2) or parts[-2] not in _NAMES:
        return name
    return f"{block}{_NAMES[parts[-2]]}.{parts[-1]}"


def read_stored(file: Path, stored: Stored, heads: int | None = None) -> np.ndarray:
    """Returns a tensor in float32; with ``heads`` its rows are reordered by :func:`rows_for_rotate_half`."""
    weight = np.empty(stored.shape, np.float32)
    if not weight.size:
        return weight
    rows = weight.reshape(-1, stored.shape[-1])
    # A block's scale may be infinite or NaN; callers check the weights.
    with np.errstate(all="ignore"):
        for targets, raw in _rows_of(file, stored, heads):
            rows[targets] = dequantize(raw, stored.kind)
    return rows_for_rotate_half(weight, heads) if heads and weight.ndim == 1 else weight


def _read_blocks(file: Path, stored: Stored, heads: int | None, target: Quantised) -> None:
    """Reads a matrix of a type in :data:`_PARTS` into the arrays of a kernel."""
    count = stored.shape[-1] // GGML_QUANT_SIZES[stored.kind][0]
    for targets, raw in _rows_of(file, stored, heads):
        blocks, start = raw.reshape(len(raw), count, -1), 0
        for name in _PARTS[target.kind]:
            part = getattr(target, name)
            end = start + len(part) * part.itemsize // count
            part[:, targets] = np.ascontiguousarray(blocks[..., start:end]).view(part.dtype).reshape(len(raw), -1).T
            start = end


def _rows_of(file: Path, stored: Stored, heads: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stored bytes of some rows at a time, ``[rows, bytes]``, and the rows' indices in Hugging Face's order."""
    count = math.prod(stored.shape[:-1])
    row_bytes, row_targets = stored.size // count, np.arange(count)
    if heads and len(stored.shape) > 1:
        row_targets = np.argsort(rows_for_rotate_half(row_targets, heads))
    rows_at_once = max(1, _CHUNK // row_bytes)
    with opened(file) as stream:
        stream.seek(stored.offset)
        for start in range(0, count, rows_at_once):
            targets = row_targets[start : start + rows_at_once]
            raw = np.fromfile(stream, np.uint8, len(targets) * row_bytes)
            if raw.size != len(targets) * row_bytes:
                raise UserError(f"{file}: is cut short; fetch it again")
            yield targets, raw.reshape(len(targets), row_bytes)


def rows_for_rotate_half(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k (``[heads*head_dim, ...]``) from interleaved rotary pairs to rotate-half.

    GGUF rotates rows (2i, 2i+1) of a head together, Hugging Face rotates rows (i, i + head_dim/2).
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
