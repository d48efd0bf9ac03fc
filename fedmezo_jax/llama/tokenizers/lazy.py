"""A model folder's tokenizer that is opened when it is needed: a run whose tokens are in the cache does without."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedmezo_jax.llama.folder import readable

_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "additional_chat_templates/*")


@dataclass(frozen=True)
class LazyTokenizer:
    """Stands for the tokenizer of a folder. Any use but that of ``cache_key`` opens it, which imports transformers.

    Attributes:
        folder: the model's.
        open: opens its tokenizer, see :func:`registry.load_tokenizer`.
    """

    folder: Path
    open: Callable[[Path], Any]

    @cached_property
    def cache_key(self) -> str:
        """sha256 of all that decides what the tokenizer does: the folder's files but the weights, and the libraries.

        Raises:
            UserError: a file cannot be read.
        """
        digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
        with readable(self.folder):
            for file in sorted({file for pattern in _FILES for file in self.folder.glob(pattern) if file.is_file()}):
                content = file.read_bytes()
                digest.update(f"{file.relative_to(self.folder)} {len(content)} ".encode())
                digest.update(content)
        return digest.hexdigest()

    @cached_property
    def _opened(self) -> Any:
        return self.open(self.folder)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the tokenizer."""
        return getattr(self._opened, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        """See the tokenizer."""
        return self._opened(*texts, **options)
