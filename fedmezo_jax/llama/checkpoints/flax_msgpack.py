"""Reading Flax msgpack checkpoints one tensor at a time, in the key layout of transformers' FlaxLlamaForCausalLM.

``flax.serialization`` reads a file as a whole. This module reads only the msgpack headers, which give the position of
each tensor's bytes, and reads a tensor when it is needed. The format is msgpack's: an array is extension 1 around
[shape, dtype name, bytes], and an array above 1 GiB is a map of such chunks (flax.serialization).
"""

import os
from functools import partial
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.layout import layout
from fedmezo_jax.llama.checkpoints.safetensors import Entry
from fedmezo_jax.llama.config import LlamaConfig
from fedmezo_jax.llama.folder import opened, shorten

_DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY = 1  # Flax's extension type for an array
_LONGEST_LIST = 1000  # Flax writes lists only for shapes
_LONGEST_TEXT = 1 << 20  # for keys and dtype names; the bytes of arrays are not read with the header

# First byte of a msgpack object -> its kind, and the number of bytes of the size (or integer value) that follows.
_SIZED = {
    **{0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2)},
    **{0xC9: ("ext", 4), 0xCC: ("int", 1), 0xCD: ("int", 2), 0xCE: ("int", 4), 0xCF: ("int", 8)},
    **{0xD9: ("bytes", 1), 0xDA: ("bytes", 2), 0xDB: ("bytes", 4), 0xDC: ("array", 2), 0xDD: ("array", 4)},
    **{0xDE: ("map", 2), 0xDF: ("map", 4)},
}


class _Stored(NamedTuple):
    """Where a tensor's bytes are in the file.

    Attributes:
        shape: the tensor's shape.
        dtype: numpy's name of its type.
        pieces: (offset in the file, bytes) of each chunk, in order.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]


class _Damaged(Exception):
    pass


def read_flax_header(file: Path, config: LlamaConfig) -> dict[str, Entry]:
    """Returns the tensors of a Flax msgpack file, by Hugging Face's name, or by ``a/b/c`` if it has none.

    Raises:
        UserError: the file is damaged or cut short.
    """
    with opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            tree = _walk(stream, size)
            if stream.tell() != size or not isinstance(tree, dict):
                raise _Damaged("it is no single tree of arrays")
            flat = traverse_util.flatten_dict(_joined(tree), sep="/")
        except (_Damaged, RecursionError) as error:
            raise UserError(f"{file}: is damaged or cut short ({error}); fetch it again") from None
    names = _flax_names(config)
    entries = {}
    for path, stored in flat.items():
        if not isinstance(stored, _Stored):
            stored = _Stored((), f"no array but {shorten(repr(stored))}", ())
        transposed = path in names and path.endswith("/kernel")
        shape = stored.shape[::-1] if transposed else stored.shape
        dtype = _DTYPES[stored.dtype][0] if stored.dtype in _DTYPES else stored.dtype
        entries[names.get(path, path)] = Entry(file, shape, dtype, partial(_read, file, stored, transposed))
    return entries


def _flax_names(config: LlamaConfig) -> dict[str, str]:
    """Maps Flax's path of each tensor to Hugging Face's name; the head is included even if it is tied."""
    leaf = {"kernel": "kernel", "embedding": "embedding", "scale": "weight", "bias": "bias"}
    names = {
        f"{name.rpartition('.')[0].replace('.', '/')}/{leaf[slot.path[-1]]}": name
        for name, slot in layout(config).items()
    }
    return names | {"lm_head/kernel": "lm_head.weight"}


def _read(file: Path, stored: _Stored, transposed: bool) -> np.ndarray:
    tensor = np.empty(stored.shape, _DTYPES[stored.dtype][1])
    tensor_bytes, start = tensor.reshape(-1).view(np.uint8), 0
    with opened(file) as stream:
        for offset, size in stored.pieces:
            stream.seek(offset)
            if stream.readinto(tensor_bytes[start : start + size].data) != size:
                raise UserError(f"{file}: is cut short; fetch it again")
            start += size
    return tensor.T if transposed else tensor


def _walk(stream: BufferedReader, end: int) -> Any:
    """Reads the object at the stream's position; arrays become ``_Stored``, without their bytes."""
    kind, value = _header(stream)
    if kind == "map":
        tree = {}
        for _ in range(value):
            key = _walk(stream, end)
            if not isinstance(key, str) or key in tree:
                raise _Damaged(f"a key is {shorten(repr(key))}")
            tree[key] = _walk(stream, end)
        return tree
    if kind == "array" and value <= _LONGEST_LIST:
        return [_walk(stream, end) for _ in range(value)]
    if kind == "bytes" and value <= _LONGEST_TEXT:
        return _take(stream, value).decode("utf-8", "backslashreplace")
    if kind == "ext":
        return _walk_array(stream, end, value)
    if kind in ("array", "bytes"):
        raise _Damaged(f"a list or text of length {value} does not belong there")
    return value


def _walk_array(stream: BufferedReader, end: int, size: int) -> _Stored:
    code, array_end = _take(stream, 1)[0], stream.tell() + size
    if code != _ARRAY or array_end > end:
        raise _Damaged(f"an object of type {code} and {size} bytes does not belong there")
    if _header(stream) != ("array", 3):
        raise _Damaged("an array is not [shape, dtype, bytes]")
    shape, dtype = _walk(stream, end), _walk(stream, end)
    (kind, byte_count), offset = _header(stream), stream.tell()
    is_array = isinstance(shape, list) and all(isinstance(width, int) for width in shape) and isinstance(dtype, str)
    if not is_array or kind != "bytes" or offset + byte_count != array_end:
        raise _Damaged("an array is not [shape, dtype, bytes]")
    if dtype in _DTYPES and byte_count != prod(shape) * _DTYPES[dtype][1].itemsize:
        raise _Damaged(f"an array of shape {shape} in {dtype} has {byte_count} bytes")
    stream.seek(array_end)
    return _Stored(tuple(shape), dtype, ((offset, byte_count),))


def _joined(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with each map of chunks joined into one array."""
    if _CHUNKED not in tree:
        return {key: _joined(value) if isinstance(value, dict) else value for key, value in tree.items()}
    try:
        shape = tuple(tree["shape"][str(i)] for i in range(len(tree["shape"])))
        chunks = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
        (dtype,) = {chunk.dtype for chunk in chunks}
        count = sum(prod(chunk.shape) for chunk in chunks)
        if not all(isinstance(width, int) for width in shape):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _Damaged("an array in chunks lacks some") from None
    if count != prod(shape):
        raise _Damaged(f"an array of shape {list(shape)} has {count} entries")
    return _Stored(shape, dtype, tuple(piece for chunk in chunks for piece in chunk.pieces))  # pyright: ignore[reportReturnType]


def _header(stream: BufferedReader) -> tuple[str, Any]:
    """The kind of the object at the stream's position, and its size, or its value if the header contains it."""
    first = _take(stream, 1)[0]
    if first < 0x80:
        return "int", first
    if first < 0xC0:
        kind = "map" if first < 0x90 else "array" if first < 0xA0 else "bytes"
        return kind, first & (0x1F if kind == "bytes" else 0x0F)
    if first in (0xC0, 0xC2, 0xC3):
        return "value", {0xC0: None, 0xC2: False, 0xC3: True}[first]
    if 0xD4 <= first <= 0xD8:
        return "ext", 1 << (first - 0xD4)
    if first not in _SIZED:
        raise _Damaged(f"byte {first:#x} begins no object of a checkpoint")
    kind, width = _SIZED[first]
    return kind, int.from_bytes(_take(stream, width), "big")


def _take(stream: BufferedReader, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise _Damaged("it ends too early")
    return data
