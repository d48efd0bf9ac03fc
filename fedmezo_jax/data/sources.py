"""Loads instruction data by name: generated, from a local file, or from the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedmezo_jax.data import files, records
from fedmezo_jax.data.examples import Chat, Example
from fedmezo_jax.data.files import Record
from fedmezo_jax.data.synthetic.bundled import bundled
from fedmezo_jax.errors import UserError

BUNDLED_ROWS = 4000


def _gsm8k(example: Example) -> Example:
    """Replaces "####" by "The answer is" and keeps the calculator's <<...>>, as the paper does."""
    return example._replace(response=re.sub(r"\n####\s*", "\nThe answer is ", example.response))


_LANGUAGES = (
    "X86-64 Assembly", "C++", "C#", "JavaScript", "TypeScript", "Java", "Python", "PHP", "SQL", "HTML", "CSS", "Bash",
    "Ruby", "Swift", "Rust", "Scala", "Kotlin", "Perl",
)  # fmt: skip
_CANONICAL = {name.lower(): name for name in _LANGUAGES}
# "go" and "c" are everyday text, and 'C' in quotes is a letter, so these two languages must be capitalised.
_LANGUAGE = re.compile(rf"(?<![\w'])(?:(?i:{'|'.join(map(re.escape, _LANGUAGES))})|Go|C)(?!\w)")


def _codealpaca(example: Example) -> Example | None:
    """Sets the category to the programming language, unless the file gives one; None if the paper leaves it out.

    The language is the input if that is only a language's name, and else the first language named.
    """
    match = _LANGUAGE.fullmatch(example.input.strip())
    match = match or _LANGUAGE.search(example.instruction) or _LANGUAGE.search(example.input)
    language = _CANONICAL.get(match[0].lower(), match[0]) if match else "other"
    category = example.category or language
    return None if category == "X86-64 Assembly" else example._replace(category=category)


class _Source(NamedTuple):
    """A data set of the paper.

    Attributes:
        hub_id: its name on the hub.
        config: its configuration there, or None.
        stems: file names of a local copy, without suffix, in the order in which they are tried.
        convert: returns the example as the paper uses it, or None to leave it out.
    """

    hub_id: str
    config: str | None
    stems: tuple[str, ...]
    convert: Callable[[Example], Example | None]


_SOURCES = {
    "gsm8k": _Source("openai/gsm8k", "main", ("gsm8k_train", "gsm8k", "train"), _gsm8k),
    "codealpaca": _Source(
        "sahil2801/CodeAlpaca-20k",
        None,
        ("codealpaca", "code_alpaca", "code_alpaca_20k", "new_codealpaca"),
        _codealpaca,
    ),
    "alpaca": _Source("tatsu-lab/alpaca", None, ("alpaca", "alpaca_data"), lambda example: example),
    "dolly": _Source(
        "databricks/databricks-dolly-15k", None, ("dolly", "databricks-dolly-15k"), lambda example: example
    ),
}
NAMES = ("bundled", *_SOURCES)


def load(
    name: str, *, data_dir: str | Path | None = None, fields: records.Fields | None = None, seed: int = 0
) -> list[Example] | list[Chat]:
    """Returns the examples of a data set.

    Args:
        name: ``bundled`` (generated from ``seed``); a data set of the paper (``gsm8k``, ``codealpaca``, ``alpaca``,
            ``dolly``); the path of a .json, .jsonl or .parquet file; or a data set on the hub: ``owner/name``,
            ``owner/name:config`` or ``owner/name:config:split`` (by default the split ``train``).
        data_dir: folder with local copies. If given, nothing is fetched for a data set of the paper.
        fields: names of the fields for the parts of an example, if they are not the usual ones.
        seed: seed of the generated data.

    Raises:
        UserError: unknown name, no such file, a broken file (with its line), or a hub that does not answer.
    """
    if name == "bundled":
        if fields:
            raise UserError("--fields is for files and hub sets; the bundled data have none to map")
        return bundled(seed, BUNDLED_ROWS)
    source_records = load_records(name, data_dir=data_dir, fields=fields)
    parsed = records.examples(source_records, fields)
    if name not in _SOURCES:
        return parsed
    pairs = [example for example in parsed if isinstance(example, Example)]
    kept = [converted for pair in pairs if (converted := _SOURCES[name].convert(pair)) is not None]
    if not kept:
        raise UserError(
            f"{source_records[0].where}: neither this row nor any other is one of {name}: give another --data"
        )
    return kept


def load_records(
    name: str, *, data_dir: str | Path | None = None, fields: records.Fields | None = None
) -> list[Record]:
    """Returns the unparsed rows of any data set but ``bundled``, e.g. multiple-choice questions; see :func:`load`."""
    if name in _SOURCES:
        source = _SOURCES[name]
        if data_dir is None:
            return _from_hub(source.hub_id, source.config, "train")
        return _from_folder(Path(data_dir), source, records.field_names(fields or {}))
    if name.endswith(files.SUFFIXES):
        return _from_file(Path(name), data_dir, records.field_names(fields or {}))
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", name):
        hub_id, config, split = (*name.split(":"), "", "")[:3]
        return _from_hub(hub_id, config or None, split or "train")
    raise UserError(
        f"unknown data {name!r}: choose {', '.join(NAMES)}, a .json, .jsonl or .parquet file, "
        "or a hub id owner/name[:config[:split]]"
    )


def _from_file(path: Path, data_dir: str | Path | None, names: tuple[str, ...]) -> list[Record]:
    path = path.expanduser()
    candidates = [path] if data_dir is None or path.is_absolute() else [path, Path(data_dir) / path]
    for candidate in candidates:
        if candidate.is_file():
            return files.read(candidate, names)
    raise UserError(f"no data file {' or '.join(map(str, candidates))}")


def _from_folder(folder: Path, source: _Source, names: tuple[str, ...]) -> list[Record]:
    for file in (folder / f"{stem}{suffix}" for stem in source.stems for suffix in files.SUFFIXES):
        if file.is_file():
            return files.read(file, names)
    suffixes = f"{', '.join(files.SUFFIXES[:-1])} or {files.SUFFIXES[-1]}"
    raise UserError(f"no {' or '.join(source.stems)} as {suffixes} in the data folder {folder}")


def _from_hub(hub_id: str, config: str | None, split: str) -> list[Record]:
    # Imported here because it takes a second and only the hub needs it.
    import datasets
    import huggingface_hub
    from datasets import config as settings

    try:
        if not settings.HF_HUB_OFFLINE:
            # Ask the hub once first: without an answer load_dataset would retry for half a minute, with warnings.
            huggingface_hub.HfApi().dataset_info(hub_id, timeout=20)
        dataset = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # the hub's clients raise many types, for connections, unknown splits and more
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"cannot load {hub_id} from the Hugging Face hub ({reason}): give a local copy instead, "
            "with --data-dir FOLDER or as --data FILE.jsonl, or set HF_HUB_OFFLINE=1 to use one fetched before"
        ) from None
    return [Record(f"{hub_id}, row {row}", record) for row, record in enumerate(dataset)]
