"""Gathers results into one page: every results.json with its table, its plots, its command and what the paper has.

    python -m experiments.report
    python -m experiments.report --results runs

The page holds its pictures itself and needs no network.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from experiments import _cli
from fedmezo_jax.errors import UserError
from fedmezo_jax.run.run_folder import write_json

# Where the paper (arXiv 2402.05926) asks the same, and what it finds; a name without an entry goes past it.
PAPER = {
    "convergence": "Fig. 1, 10: FedMeZO falls faster than FedAvg by plain SGD at FedMeZO's own learning rate",
    "memory": "Tab. 1 (MiB, back-propagation → FedMeZO): Dolly 26571 → 10061, GSM8K 17771 → 9733, Code 15287 → 9569",
    "bench_step": "Tab. 4 (seconds for 10 rounds): Dolly 117 → 108, Code 126 → 120, GSM8K 104 → 95, Alpaca 107 → 99",
    "perturbation_scale": "Fig. 2, 8: among μ = 2e-4, 1e-3, 5e-3 a smaller one is slightly better",
    "local_steps": "Fig. 3, 9: among H = 10, 30, 50 more converge faster; 50 can surge",
    "personalised_rates": "Fig. 4: model-diff is best, five-round good, round-wise without effect",
    "divergence": "Fig. 5: of 1, 3, 5, 10 × 1e-5 the larger surges the earlier",
    "partitioners": "Fig. 6: more heterogeneity, lower loss",
    "clients": "Fig. 7, Tab. 6: N = 3 … 40 differ little; N = 9 ends at 1.31, N = 40 at 1.32 (round 500)",
    "batch_size": "Tab. 7: at round 409 batch 1 has 1.38 and batch 5 has 1.49",
    "model_size": "Tab. 8 (round 309): 3B and 7B on Dolly 1.40 and 1.51, Code .87 and .90, GSM8K .94 and 1.01",
    "communication": "App. F.1: 80.45 MB a client and round (fp16 LoRA), 6.39 GB for all weights",
    "task_metrics": "Tab. 5 (rounds 0/100/200): GSM8K accuracy 3.41/4.32/4.62 %",
    "effective_rank": "open question 1: not measured",
    "best_rank": "open question 1, Conjecture 3.8: not tested",
    "heterogeneity_index": "open question 2: not measured",
}

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fedmezo_jax: results</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } code { background: #f4f4f4; padding: .1rem .3rem; overflow-wrap: anywhere }
.facts { color: #666; font-size: .9rem } nav a { margin-right: .8rem }
</style></head><body>
<h1>fedmezo_jax: results</h1>
<p class="facts">Each by one command. The paper is arXiv 2402.05926. Losses are nats a token.</p>
<nav>{% for one in sections %}<a href="#{{ one.name }}">{{ one.name }}</a> {% endfor %}</nav>
{% for one in sections %}
<section id="{{ one.name }}"><h2>{{ one.name.replace("_", " ") }}</h2>
{% if one.paper %}<p>Paper: {{ one.paper }}</p>{% endif %}
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
    """What to gather, and where to."""

    results: Path = Path("experiments/results")
    """folder with NAME.json and NAME.png, or with folders that hold a results.json"""
    out: Path = Path("runs/report")
    """folder for report.html, config.json and results.json"""


class Section(NamedTuple):
    """One result of the page."""

    name: str
    paper: str | None
    command: str
    facts: str
    pictures: list[str]
    heads: list[str]
    rows: list[list[str]]


def main(config: Config) -> None:
    """Reads the results, writes the page and prints what it holds."""
    start = time.perf_counter()
    if not config.results.is_dir():
        raise UserError(f"--results {config.results} is no folder: give one with results, e.g. runs")
    sections = [found for file in sorted(config.results.rglob("*.json")) if (found := section(file))]
    if not sections:
        raise UserError(f"--results {config.results} holds no results: run an experiment first")
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "report.html").write_text(PAGE.render(sections=sections), encoding="utf-8")
    rows = [{"result": one.name, "rows": len(one.rows), "pictures": len(one.pictures)} for one in sections]
    write_json(config.out / "config.json", asdict(config) | {"results": str(config.results), "out": str(config.out)})
    _cli.write_results(config.out, rows, time.perf_counter() - start)
    _cli.print_table(f"results in {config.results}", rows)
    print(f"{config.out / 'report.html'}")


def section(file: Path) -> Section | None:
    """The page's section of a results file; None for another JSON file."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        command, rows = found["command"], found["rows"]
        facts = (
            f"{found['seconds']:.0f} s on {found['host']['cores']} cores, {found['host']['platform']}; "
            + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        )
        heads = list(dict.fromkeys(key for row in rows for key in row))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = file.name == "results.json"
    name = file.parent.name if whole else file.stem
    module = command.split(" ")[2].rpartition(".")[2] if command.startswith("python -m ") else name
    pictures = sorted(file.parent.glob("*.png") if whole else file.parent.glob(f"{name}.png"))
    coded = [base64.b64encode(picture.read_bytes()).decode() for picture in pictures]
    cells = [[_cli.shown(row.get(head)) for head in heads] for row in rows]
    return Section(name, PAPER.get(name, PAPER.get(module)), command, facts, coded, heads, cells)


if __name__ == "__main__":
    _cli.run(main, Config, __doc__)
