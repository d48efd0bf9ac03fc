"""Makes model folders from GGUF files: with a link to the file, or converted to safetensors."""

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.base_model import write_tokenizer, write_weights
from fedmezo_jax.llama.checkpoints.gguf import open_gguf
from fedmezo_jax.llama.checkpoints.gguf_config import gguf_weights, read_gguf_config
from fedmezo_jax.llama.checkpoints.layout import layout
from fedmezo_jax.llama.checkpoints.safetensors import Entry, mismatches
from fedmezo_jax.llama.config import LlamaConfig, to_json
from fedmezo_jax.llama.folder import readable, staged
from fedmezo_jax.llama.tokenizers.gguf import read_gguf_tokenizer


def gguf_folder(file: str | PathLike, cache: Path) -> Path:
    """Returns a folder under ``cache`` with a GGUF file's config, its tokenizer and a link to it.

    The folder is made once for each version of the file. The weights stay in the file and are dequantised when they are
    read.

    Raises:
        UserError: as :func:`convert_gguf`.
    """
    file = Path(file).resolve()
    with readable(file):
        status = file.stat()
    version = hashlib.sha256(f"{file} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache / f"{file.stem}-{version}"
    if not folder.is_dir():
        config, tokenizer, _ = _read(file)
        with staged(folder) as fresh:
            write_tokenizer(fresh, tokenizer)
            (fresh / "config.json").write_text(json.dumps(to_json(config), indent=2) + "\n", encoding="utf-8")
            (fresh / file.name).symlink_to(file)
    return folder


def convert_gguf(file: str | PathLike, folder: str | PathLike) -> None:
    """Convert a GGUF file to a Hugging Face folder (config, float32 safetensors, tokenizer).

    Quantised weights are dequantised exactly. All files appear at once.

    Raises:
        UserError: the file is damaged, holds another architecture than ``gguf.INTERLEAVED`` names, or has a tensor,
            rotary scaling or tokenizer that is not supported.
    """
    config, tokenizer, entries = _read(Path(file))
    with staged(Path(folder)) as fresh:
        write_tokenizer(fresh, tokenizer)
        write_weights(fresh, config, lambda name: entries[name].read(), "float32")


def _read(file: Path) -> tuple[LlamaConfig, Any, dict[str, Entry]]:
    """A file's config, tokenizer and tensors, checked to fit together."""
    opened = open_gguf(file)
    config = read_gguf_config(opened)
    entries = gguf_weights(opened, config)
    if problems := mismatches({name: slot.shape for name, slot in layout(config).items()}, entries):
        raise UserError(f"{file}: does not fit its metadata: " + "; ".join(problems))
    return config, read_gguf_tokenizer(file, opened.meta), entries
