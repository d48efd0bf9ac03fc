"""The documents agree with the repository: examples run, and every link, command and option that they name exists."""

import contextlib
import importlib
import io
import re
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from experiments.studies import runner

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(
    r"^(?P<skip><!-- not run: (?P<reason>.+) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
COMMAND = re.compile(r"python -m (experiments[\w.]*)([^`\n|&]*)")


def name_of(file):
    return str(file.relative_to(ROOT))


def text_of(file):
    return file.read_text(encoding="utf-8")


def found(pattern):
    """(document, match) of all documents."""
    return [(file, match) for file in DOCUMENTS for match in pattern.finditer(text_of(file))]


def line_of(match):
    return match.string.count("\n", 0, match.start()) + 1


def ids_of(cases):
    return [f"{name_of(file)}:{line_of(match)}" for file, match in cases]


EXAMPLES = [case for case in found(FENCE) if not case[1]["skip"]]


def test_every_python_block_is_recognised():
    opened = sum(text_of(file).count("```python") for file in DOCUMENTS)
    assert len(found(FENCE)) == opened
    assert EXAMPLES


@pytest.mark.parametrize(("file", "match"), EXAMPLES, ids=ids_of(EXAMPLES))
def test_an_example_runs_as_written(file, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(match["code"], name_of(file), "exec"), {"__name__": "__main__"})


def anchors(file):
    """The names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", text_of(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_relative_link_leads_somewhere():
    links = found(LINK)
    assert len(links) > 20
    for file, match in links:
        path, anchor = match.groups()
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{name_of(file)}:{line_of(match)}: {path}"
        assert target.is_relative_to(ROOT)
        assert anchor is None or anchor in anchors(target), f"{name_of(file)}:{line_of(match)}: #{anchor}"


@cache
def options(name):
    """The options of an experiment, by the fields of its configuration."""
    module = importlib.import_module(name)
    return frozenset({"--help", *_options(getattr(module, "Config", runner.Config))})


def _options(config):
    kinds = get_type_hints(config)
    for field in fields(config):
        if is_dataclass(kinds[field.name]):
            yield from _options(kinds[field.name])
        else:
            option = field.name.replace("_", "-")
            yield f"--{option}"
            if kinds[field.name] is bool:
                yield f"--no-{option}"


def experiments():
    """Names of all modules that are commands."""
    files = sorted((ROOT / "experiments").rglob("*.py"))
    commands = (file for file in files if '__name__ == "__main__"' in text_of(file))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in commands}


def test_every_command_and_its_options_exist():
    commands = found(COMMAND)
    assert len(commands) > 40
    for file, match in commands:
        module, arguments = match[1].rstrip("."), match[2]
        assert module in experiments(), f"{name_of(file)}:{line_of(match)}"
        unknown = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", arguments)) - options(module)
        assert not unknown, f"{name_of(file)}:{line_of(match)}"


def test_every_option_that_is_named_alone_exists():
    named = found(re.compile(r"`(--[a-z][a-z-]*)(?![\w-])[^`\n]*`"))
    assert len(named) > 20
    known = set().union(*map(options, experiments()))
    for file, match in named:
        assert match[1] in known, f"{name_of(file)}:{line_of(match)}: {match[1]}"


def test_the_index_names_every_experiment_once():
    rows = re.findall(r"^\| `python -m (experiments[\w.]+)", text_of(ROOT / "experiments/README.md"), re.MULTILINE)
    assert sorted(rows) == sorted(experiments())


def test_the_layout_of_the_readme_names_every_part_of_the_library():
    parts = {file.parent.name for file in (ROOT / "fedmezo_jax").glob("*/__init__.py")}
    assert parts == set(re.findall(r"`fedmezo_jax/(\w+)/`", text_of(ROOT / "README.md")))


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 130
