"""Instruction data by name: generated here, from a local file, or from the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedmezo_jax.data import records
from fedmezo_jax.data.bundled import bundled
from fedmezo_jax.data.examples import Example
from fedmezo_jax.errors import UserError

BUNDLED_ROWS = 4000


def _gsm8k(example: Example) -> Example:
    """Drops the calculator marks <<...>> and says "The answer is" in the place of "####", as the paper does."""
    response = re.sub(r"<<[^>]*>>", "", example.response)
    return example._replace(response=re.sub(r"\n####\s*", "\nThe answer is ", response))


_LANGUAGES = (
    "X86-64 Assembly", "C++", "C#", "JavaScript", "TypeScript", "Java", "Python", "PHP", "SQL", "HTML", "CSS", "Bash",
    "Ruby", "Swift", "Rust", "Scala", "Kotlin", "Perl",
)  # fmt: skip
_CANONICAL = {name.lower(): name for name in _LANGUAGES}
# "go" and "c" are everyday text, and 'C' in quotes is a letter: these two count in capitals only.
_LANGUAGE = re.compile(rf"(?<![\w'])(?:(?i:{'|'.join(map(re.escape, _LANGUAGES))})|Go|C)(?!\w)")


def _codealpaca(example: Example) -> Example | None:
    """The row with the file's category or else the language named first; None for the one the paper leaves out."""
    named = _LANGUAGE.search(example.instruction) or _LANGUAGE.search(example.input)
    language = _CANONICAL.get(named[0].lower(), named[0]) if named else "other"
    category = example.category or language
    return None if category == "X86-64 Assembly" else example._replace(category=category)


class _Source(NamedTuple):
    """A data set of the paper.

    Attributes:
        hub_id: its name on the hub.
        config: its configuration there, or None.
        files: names under which a local copy is looked for, in this order.
        convert: gives the row as the paper has it, or None to leave it out.
    """

    hub_id: str
    config: str | None
    files: tuple[str, ...]
    convert: Callable[[Example], Example | None]


_SOURCES = {
    "gsm8k": _Source("openai/gsm8k", "main", ("gsm8k_train.jsonl", "gsm8k.jsonl", "train.jsonl"), _gsm8k),
    "codealpaca": _Source(
        "sahil2801/CodeAlpaca-20k",
        None,
        ("codealpaca.jsonl", "codealpaca.json", "code_alpaca.jsonl", "code_alpaca_20k.json", "new_codealpaca.json"),
        _codealpaca,
    ),
    "alpaca": _Source(
        "tatsu-lab/alpaca", None, ("alpaca.jsonl", "alpaca.json", "alpaca_data.json"), lambda example: example
    ),
    "dolly": _Source(
        "databricks/databricks-dolly-15k",
        None,
        ("dolly.jsonl", "dolly.json", "databricks-dolly-15k.jsonl"),
        lambda example: example,
    ),
}
NAMES = ("bundled", *_SOURCES)


def load(name: str, *, data_dir: str | Path | None = None, seed: int = 0) -> list[Example]:
    """The examples of a data set.

    Args:
        name: `bundled` (made here from `seed`), a data set of the paper (`gsm8k`, `codealpaca`, `alpaca`, `dolly`), the
            path of a .json or .jsonl file, or the id of a data set on the hub (`owner/name`).
        data_dir: folder with local copies. Where it is given nothing is fetched for a data set of the paper.
        seed: seed of the generated data.

    Raises:
        UserError: unknown name, no such file, a broken file (with its line), or a hub that does not answer.
    """
    if name == "bundled":
        return bundled(seed, BUNDLED_ROWS)
    if name in _SOURCES:
        source = _SOURCES[name]
        found = _from_hub(source.hub_id, source.config) if data_dir is None else _from_folder(Path(data_dir), source)
        return [converted for example in found if (converted := source.convert(example)) is not None]
    if name.endswith((".json", ".jsonl")):
        return _from_file(Path(name), data_dir)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _from_hub(name, None)
    raise UserError(f"unknown data {name!r}: choose {', '.join(NAMES)}, a .json or .jsonl file, or a hub id owner/name")


def _from_file(path: Path, data_dir: str | Path | None) -> list[Example]:
    places = [path] if data_dir is None or path.is_absolute() else [path, Path(data_dir) / path]
    for place in places:
        if place.is_file():
            return records.read(place)
    raise UserError(f"no data file {' or '.join(map(str, places))}")


def _from_folder(folder: Path, source: _Source) -> list[Example]:
    for file in source.files:
        if (folder / file).is_file():
            return records.read(folder / file)
    raise UserError(f"no {', '.join(source.files[:-1])} or {source.files[-1]} in the data folder {folder}")


def _from_hub(hub_id: str, config: str | None) -> list[Example]:
    # Imported here because it takes a second and only the hub needs it.
    import datasets
    import huggingface_hub
    from datasets import config as settings

    try:
        if not settings.HF_HUB_OFFLINE:
            # One question first: without an answer load_dataset would try again for half a minute, with warnings.
            huggingface_hub.HfApi().dataset_info(hub_id, timeout=20)
        found = datasets.load_dataset(hub_id, config, split="train")
    except Exception as error:  # the hub's clients raise many kinds, from connection faults to unknown splits
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"cannot load {hub_id} from the Hugging Face hub ({reason}): give a local copy instead, "
            "with --data-dir FOLDER or as --data FILE.jsonl, or set HF_HUB_OFFLINE=1 to use one fetched before"
        ) from None
    return [records.example(record, f"{hub_id}, row {row}") for row, record in enumerate(found)]
