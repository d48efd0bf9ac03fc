"""Gathers results into one page: a summary of the paper's questions, then every results.json with its plots and table.

    python -m experiments.report
    python -m experiments.report --results runs

The summary has one row for each question of the paper that the results answer. The page includes its plots and needs no
network.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from experiments import _cli
from experiments._findings import Finding, finding
from experiments.studies.paper import NOT_IN_PAPER, QUESTIONS, Question
from fedmezo_jax.errors import UserError

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fedmezo_jax: results</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
#summary { font-size: .8rem; line-height: 1.3 }
#summary td { text-align: left; white-space: normal; vertical-align: top }
img { max-width: 100% } code { background: #f4f4f4; padding: .1rem .3rem; overflow-wrap: anywhere }
.facts { color: #666; font-size: .9rem } nav a { margin-right: .8rem }
</style></head><body>
<h1>fedmezo_jax: results</h1>
<p class="facts">Each by one command. The paper is arXiv 2402.05926. Losses are in nats/token.</p>
{% if summary %}<table id="summary"><thead><tr><th>question</th><th>paper</th><th>here</th><th>verdict</th></tr></thead>
<tbody>{% for one in summary %}<tr><td><a href="#{{ one.name }}">{{ one.asked.question }}</a></td>
<td>{{ one.asked.paper }}</td><td>{{ one.finding.here }}</td><td>{{ one.finding.verdict }}</td></tr>
{% endfor %}</tbody></table>{% endif %}
<nav>{% for one in sections %}<a href="#{{ one.name }}">{{ one.name }}</a> {% endfor %}</nav>
{% for one in sections %}
<section id="{{ one.name }}"><h2>{{ one.name.replace("_", " ") }}</h2>
{% if one.asked %}<p>{{ one.asked.question }} Paper: {{ one.asked.paper }}.</p>{% endif %}
<p><code>{{ one.command }}</code></p>
<p class="facts">{{ one.facts }}</p>
{% for picture in one.pictures %}<img alt="{{ one.name }}" src="data:image/png;base64,{{ picture }}">{% endfor %}
<table><thead><tr>{% for head in one.heads %}<th>{{ head.replace("_", " ") }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in one.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></section>
{% endfor %}
</body></html>
""",
    autoescape=True,
)


@dataclass(frozen=True)
class Config:
    """The results to gather, and where to write the page."""

    results: Path = Path("experiments/results")
    """folder with NAME.json and NAME.png, or with folders that hold a results.json"""
    out: Path = Path("runs/report")
    """folder for report.html, config.json and results.json"""


class Section(NamedTuple):
    """One result of the page.

    Attributes:
        name: name of the results file or its folder.
        module: name of the experiment's module, without its package.
        asked: its question, if the table of questions has one.
        finding: its finding; None for questions beyond the paper and for the preset ``smoke``, which is only a test.
        command: the command that made it.
        facts: time, machine and versions.
        pictures: PNGs in base 64.
        heads: column heads of the table.
        rows: cells of the table.
    """

    name: str
    module: str
    asked: Question | None
    finding: Finding | None
    command: str
    facts: str
    pictures: list[str]
    heads: list[str]
    rows: list[list[str]]


def main(config: Config) -> None:
    """Reads the results, writes the page and prints its contents."""
    start = time.perf_counter()
    if not config.results.is_dir():
        raise UserError(f"--results {config.results} is no folder: give one with results, e.g. runs")
    sections = [result_section for file in sorted(config.results.rglob("*.json")) if (result_section := section(file))]
    if not sections:
        raise UserError(f"--results {config.results} holds no results: run an experiment first")
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "report.html").write_text(PAGE.render(sections=sections, summary=summary(sections)), encoding="utf-8")
    rows = [{"result": part.name, "rows": len(part.rows), "pictures": len(part.pictures)} for part in sections]
    _cli.write_folder(config, rows, time.perf_counter() - start)
    _cli.print_table(f"results in {config.results}", rows)
    print(f"{config.out / 'report.html'}")


def summary(sections: Sequence[Section]) -> list[Section]:
    """Returns the first result of each question that the paper treats, in the order of the table of questions."""
    by_module = {part.module: part for part in reversed(sections) if part.finding}
    return [by_module[module] for module in QUESTIONS if module in by_module]


def section(file: Path) -> Section | None:
    """Returns the page's section of a results file; None for another JSON file."""
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        command, rows = results["command"], results["rows"]
        facts = (
            f"{results['seconds']:.0f} s on {results['host']['cores']} cores, {results['host']['platform']}; "
            + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        )
        heads = list(dict.fromkeys(key for row in rows for key in row))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    in_own_folder = file.name == "results.json"
    name = file.parent.name if in_own_folder else file.stem
    module = command.split(" ")[2].rpartition(".")[2] if command.startswith("python -m ") else name
    pictures = sorted(file.parent.glob("*.png") if in_own_folder else file.parent.glob(f"{name}.png"))
    encoded = [base64.b64encode(picture.read_bytes()).decode() for picture in pictures]
    cells = [[_cli.shown(row.get(head)) for head in heads] for row in rows]
    question = QUESTIONS.get(module)
    of_paper = question is not None and question.paper != NOT_IN_PAPER and "--preset smoke" not in command
    return Section(
        name, module, question, finding(module, rows) if of_paper else None, command, facts, encoded, heads, cells
    )


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
