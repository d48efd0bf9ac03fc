"""Base weights in an Orbax checkpoint: a folder ``orbax`` beside ``config.json``, with one array per tensor.

Its tree has Hugging Face's names, split at the dots: ``{"model": {"layers": {"0": {"mlp": …``. Layers are not stacked,
because Orbax needs twice the memory of an array while it reads it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.safetensors import Entry
from fedmezo_jax.orbax_logging import quiet_orbax

ORBAX = "orbax"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FIRST = "model.norm.weight"


def write_orbax_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors by Hugging Face's names into the new folder ``folder/orbax``."""
    tree = traverse_util.unflatten_dict(dict(tensors), sep=".")
    with quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((folder / ORBAX).absolute(), tree)


def read_orbax_header(place: Path) -> dict[str, Entry]:
    """Returns the tensors of an Orbax folder by name.

    Raises:
        UserError: the checkpoint is damaged.
    """
    place = place.absolute()
    # Read one tensor first: damage then raises a single exception, whereas the metadata would print many tracebacks.
    _read(place, _FIRST)
    try:
        with quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(place).item_metadata
        if metadata is None:
            raise ValueError("its metadata are damaged")
        flat: dict[str, Any] = traverse_util.flatten_dict(metadata.tree, sep=".")
        return {
            name: Entry(
                place, tuple(leaf.shape), _DTYPES.get(str(leaf.dtype), str(leaf.dtype)), partial(_read, place, name)
            )
            for name, leaf in flat.items()
        }
    except Exception as error:  # Orbax, its storage and JSON raise different types
        raise _unreadable(place, "it", error) from None


def _read(place: Path, name: str) -> np.ndarray:
    keys = tuple(name.split("."))
    restore_args = traverse_util.unflatten_dict({keys: ocp.RestoreArgs(restore_type=np.ndarray)})
    try:
        with quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
            restore = ocp.args.PyTreeRestore(item=restore_args, restore_args=restore_args, partial_restore=True)
            restored: dict[Any, Any] = traverse_util.flatten_dict(checkpointer.restore(place, restore))
            return restored[keys]
    except Exception as error:
        raise _unreadable(place, name, error) from None


def _unreadable(place: Path, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{place}: {what} cannot be read as an Orbax checkpoint ({reason}); write it again")
