"""Reads the fast tokenizer in a folder's ``tokenizer.json``, with checks before and after transformers opens it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.folder import read_json_object, shorten

_LARGEST_ID = 1 << 22  # the library's time and memory grow with the largest id; known vocabularies end before 2**19
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # optional files
_PROBE = "The 1st <s>."


def read_tokenizer_json(folder: Path) -> Any:
    """Returns the ``PreTrainedTokenizerFast`` of a folder with ``tokenizer.json``.

    Raises:
        UserError: a file is missing or broken, or has an id so large that it would exhaust the memory.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    path = folder / "tokenizer.json"
    _check_ids(path, read_json_object(path))
    settings = [folder / name for name in _SETTINGS if (folder / name).exists()]
    for file in settings:
        read_json_object(file)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        tokenizer.decode(tokenizer(_PROBE).input_ids, skip_special_tokens=True)  # some faults only show in use
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception, and panics are not Exceptions
        reason = shorten(" ".join(str(error).split()))
        if settings and _is_sound(path):
            names = " or ".join(file.name for file in settings)
            raise UserError(f"{folder}: {names} does not fit tokenizer.json ({reason}); fetch them again") from None
        raise UserError(f"{path}: is no tokenizer that can be read ({reason}); fetch it again") from None
    return tokenizer


def _check_ids(path: Path, document: Mapping[str, Any]) -> None:
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping):
        return
    for token, index in vocab.items():
        if isinstance(index, int) and index > _LARGEST_ID:
            large_id = f"the id {shorten(str(index))} for {shorten(repr(token))}"
            raise UserError(f"{path}: its vocabulary has {large_id}, more than {_LARGEST_ID:,}; fetch it again")


def _is_sound(path: Path) -> bool:
    """Whether the tokenizers library reads a ``tokenizer.json`` by itself."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return False
    return True
