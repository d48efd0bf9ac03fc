"""Tensors in files: what a file says of each, how each is read alone, and what keeps them from being a model."""

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

_FLOATS = ("F32", "F16", "BF16")
_SHOWN = 8  # names listed of each kind of fault before "and n more"


class Entry(NamedTuple):
    """One tensor of a file, under Hugging Face's name and in its shape and order whatever the file's own are."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of the type that ``read`` gives: F32, F16, BF16; or what the file calls another
    read: Callable[[], np.ndarray]  # opens the file, reads this tensor alone, closes it; ``UserError`` if damaged


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        # the library takes a file that may not be read for one that is not there, so it is opened here first
        with opened(file), safe_open(file, framework="numpy") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{file}: is damaged or cut short ({error}); fetch it again") from None


def read_header(file: Path) -> dict[str, Entry]:
    """What a safetensors file holds, by name; ``UserError`` where it is damaged or cut short."""
    with _opened(file) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (a handle does not iterate)
        return {
            name: Entry(file, tuple(part.get_shape()), part.get_dtype(), partial(_read_tensor, file, name))
            for name, part in slices.items()
        }


def _read_tensor(file: Path, name: str) -> np.ndarray:
    """One tensor in its stored dtype.

    The file is mapped anew for each, so that pages already read do not stay resident: peak memory is one tensor.
    """
    with _opened(file) as handle:
        return handle.get_tensor(name)


def mismatches(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Entry]) -> list[str]:
    """What keeps ``found`` from being ``expected``: a phrase for each kind of fault, naming tensors and files."""

    def at(name: str) -> str:
        return f"{shorten(name)} in {found[name].file.name}"

    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": [at(name) for name in sorted(found.keys() - expected.keys())],
        "of another shape": [
            f"{at(name)} is {shorten(str(list(found[name].shape)))} and not {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != tuple(shape)
        ],
        "of another type than float32, float16 or bfloat16": [
            f"{at(name)} is {found[name].dtype}"
            for name in expected
            if name in found and found[name].dtype not in _FLOATS
        ],
    }
    return [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a new safetensors file, readable by whom the umask says: the library alone makes it private."""
    file.touch()
    mode = file.stat().st_mode
    dense = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(dense, file, metadata={"format": "pt"})
    file.chmod(mode)
