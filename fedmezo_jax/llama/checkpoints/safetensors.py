"""Tensors in safetensors files: reading their headers and single tensors, comparing them with a model, writing."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.folder import opened, shorten
from fedmezo_jax.llama.quantised import Quantised

_FLOATS = ("F32", "F16", "BF16")
_SHOWN = 8  # most names listed for one kind of fault; then "and n more"


class Entry(NamedTuple):
    """One tensor of a file of any format, in Hugging Face's shape and row order.

    Attributes:
        file: the file.
        shape: the tensor's shape.
        dtype: safetensors' name of the type that ``read`` returns (F32, F16, BF16), or the file's name of another type.
        read: opens the file, reads only this tensor and closes the file; raises ``UserError`` if the file is damaged.
        blocks: the type of its blocks in the file, if it has any, and a function that reads them as they are.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    blocks: tuple[str, Callable[[Quantised], None]] | None = None


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        # The library reports an unreadable file as missing, so it is opened here first.
        with opened(file), safe_open(file, framework="numpy") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{file}: is damaged or cut short ({error}); fetch it again") from None


def read_header(file: Path) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by name.

    Raises:
        UserError: the file is damaged or cut short.
    """
    with _opened(file) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (a handle does not iterate)
        return {
            name: Entry(
                file, tuple(tensor_slice.get_shape()), tensor_slice.get_dtype(), partial(_read_tensor, file, name)
            )
            for name, tensor_slice in slices.items()
        }


def _read_tensor(file: Path, name: str) -> np.ndarray:
    """One tensor in its stored dtype.

    The file is mapped again for each tensor, so that pages already read are freed: peak memory is one tensor.
    """
    with _opened(file) as handle:
        return handle.get_tensor(name)


def mismatches(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Entry]) -> list[str]:
    """Returns how ``stored`` differs from ``expected``: a phrase per kind of fault, with tensors and files."""

    def at(name: str) -> str:
        return f"{shorten(name)} in {stored[name].file.name}"

    kinds = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": [at(name) for name in sorted(stored.keys() - expected.keys())],
        "of another shape": [
            f"{at(name)} is {shorten(str(list(stored[name].shape)))} and not {list(shape)}"
            for name, shape in expected.items()
            if name in stored and stored[name].shape != tuple(shape)
        ],
        "of another type than float32, float16 or bfloat16": [
            f"{at(name)} is {stored[name].dtype}"
            for name in expected
            if name in stored and stored[name].dtype not in _FLOATS
        ],
    }
    return [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]


def listed(names: list[str]) -> str:
    """Returns the first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a new safetensors file with the permissions of the umask; the library would make it private."""
    file.touch()
    mode = file.stat().st_mode
    dense = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(dense, file, metadata={"format": "pt"})
    file.chmod(mode)
