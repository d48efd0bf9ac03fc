"""Instruction data by name: generated here, from a local file, or from the Hugging Face hub."""

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
    """Says "The answer is" in the place of "####" and keeps the calculator's <<...>>, as the paper does."""
    return example._replace(response=re.sub(r"\n####\s*", "\nThe answer is ", example.response))


_LANGUAGES = (
    "X86-64 Assembly", "C++", "C#", "JavaScript", "TypeScript", "Java", "Python", "PHP", "SQL", "HTML", "CSS", "Bash",
    "Ruby", "Swift", "Rust", "Scala", "Kotlin", "Perl",
)  # fmt: skip
_CANONICAL = {name.lower(): name for name in _LANGUAGES}
# "go" and "c" are everyday text, and 'C' in quotes is a letter: these two count in capitals only.
_LANGUAGE = re.compile(rf"(?<![\w'])(?:(?i:{'|'.join(map(re.escape, _LANGUAGES))})|Go|C)(?!\w)")


def _codealpaca(example: Example) -> Example | None:
    """The row with the file's category or else its language; None for the one that the paper leaves out.

    That is the input where this is a language's name and nothing else, or else the language named first.
    """
    named = _LANGUAGE.fullmatch(example.input.strip())
    named = named or _LANGUAGE.search(example.instruction) or _LANGUAGE.search(example.input)
    language = _CANONICAL.get(named[0].lower(), named[0]) if named else "other"
    category = example.category or language
    return None if category == "X86-64 Assembly" else example._replace(category=category)


class _Source(NamedTuple):
    """A data set of the paper.

    Attributes:
        hub_id: its name on the hub.
        config: its configuration there, or None.
        stems: names under which a local copy is looked for, in this order, each with every known suffix.
        convert: gives the row as the paper has it, or None to leave it out.
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
    """The examples of a data set.

    Args:
        name: `bundled` (made here from `seed`), a data set of the paper (`gsm8k`, `codealpaca`, `alpaca`, `dolly`), the
            path of a .json, .jsonl or .parquet file, or a data set on the hub: `owner/name`, or
            `owner/name:config` and `owner/name:config:split` (by default the split `train`).
        data_dir: folder with local copies. Where it is given nothing is fetched for a data set of the paper.
        fields: which field of a row is which part of an example, where the usual names do not say.
        seed: seed of the generated data.

    Raises:
        UserError: unknown name, no such file, a broken file (with its line), or a hub that does not answer.
    """
    if name == "bundled":
        if fields:
            raise UserError("--fields is for files and hub sets; the bundled data have none to map")
        return bundled(seed, BUNDLED_ROWS)
    stored = load_records(name, data_dir=data_dir, fields=fields)
    found = records.examples(stored, fields)
    if name not in _SOURCES:
        return found
    rows = [example for example in found if isinstance(example, Example)]
    kept = [converted for row in rows if (converted := _SOURCES[name].convert(row)) is not None]
    if not kept:
        raise UserError(f"{stored[0].where}: neither this row nor any other is one of {name}: give another --data")
    return kept


def load_records(
    name: str, *, data_dir: str | Path | None = None, fields: records.Fields | None = None
) -> list[Record]:
    """The rows of any data set but `bundled` as they stand, e.g. multiple-choice questions; else as :func:`load`."""
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
    places = [path] if data_dir is None or path.is_absolute() else [path, Path(data_dir) / path]
    for place in places:
        if place.is_file():
            return files.read(place, names)
    raise UserError(f"no data file {' or '.join(map(str, places))}")


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
            # One question first: without an answer load_dataset would try again for half a minute, with warnings.
            huggingface_hub.HfApi().dataset_info(hub_id, timeout=20)
        found = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # the hub's clients raise many kinds, from connection faults to unknown splits
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"cannot load {hub_id} from the Hugging Face hub ({reason}): give a local copy instead, "
            "with --data-dir FOLDER or as --data FILE.jsonl, or set HF_HUB_OFFLINE=1 to use one fetched before"
        ) from None
    return [Record(f"{hub_id}, row {row}", record) for row, record in enumerate(found)]
