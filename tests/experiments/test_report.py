"""The report is one page that a browser shows with all its results, and without a network."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from experiments import _cli, report
from experiments.studies.paper import QUESTIONS

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def write(file, rows, command):
    file.parent.mkdir(parents=True, exist_ok=True)
    host = {"cores": 2, "platform": "cpu"}
    about = {"command": command, "versions": {"jax": "0.10"}, "host": host, "seconds": 12.3}
    file.write_text(json.dumps(about | {"rows": rows}))


@pytest.fixture
def results(tmp_path):
    rows = [{"variant": "H = <3>", "loss_after": 1.23456}, {"variant": "H = 10", "loss_after": None, "more": True}]
    write(tmp_path / "in" / "local_steps.json", rows, "python -m experiments.studies.local_steps")
    (tmp_path / "in" / "local_steps.png").write_bytes(PIXEL)
    write(tmp_path / "in" / "mine" / "results.json", [{"count": 12345}], "python -m experiments.fedmezo --seed 1")
    (tmp_path / "in" / "mine" / "loss.png").write_bytes(PIXEL)
    (tmp_path / "in" / "mine" / "config.json").write_text('{"seed": 1}')
    (tmp_path / "in" / "mine" / "broken.json").write_text("{")
    return tmp_path / "in"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    try:
        _cli.run(report.main, report.Config, report.__doc__)
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_page_holds_every_result(results, tmp_path, monkeypatch):
    assert run(monkeypatch, "--results", results, "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert [one["result"] for one in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]] == [
        "local_steps",
        "mine",
    ]
    assert "H = &lt;3&gt;" in page
    assert page.count(base64.b64encode(PIXEL).decode()) == 2
    assert "Fig. 3, 9" in page
    assert "http" not in page


def text_of(part):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", part)).split())


def test_the_page_opens_with_a_summary_of_the_papers_questions(tmp_path, monkeypatch):
    steps = [{"variant": f"H = {h}", "loss_after": loss, "band_90": 0.1} for h, loss in ((3, 2.0), (30, 1.5))]
    for name in ("local_steps", "again"):
        write(tmp_path / "in" / f"{name}.json", steps, "python -m experiments.studies.local_steps")
    write(tmp_path / "in" / "b.json", steps, "python -m experiments.studies.batch_size --preset smoke")
    write(tmp_path / "in" / "c.json", [{"what": "?"}], "python -m experiments.studies.convergence")
    write(tmp_path / "in" / "d.json", steps, "python -m experiments.studies.shared_directions")
    assert run(monkeypatch, "--results", tmp_path / "in", "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    rows = re.findall(r"<tr>(?:(?!</tr>).)*</tr>", page.split('id="summary"')[1].split("</table>")[0], re.DOTALL)
    assert page.index('id="summary"') < page.index("<section")
    assert [text_of(row) for row in rows] == [
        "question paper here verdict",
        f"{' '.join(QUESTIONS['convergence'][:2])} see the table -",
        f"{' '.join(QUESTIONS['local_steps'][:2])} H = 3: 2.000 ± 0.100; H = 30: 1.500 ± 0.100 as in the paper",
    ]
    assert 'href="#again"' in rows[2]


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_no_results_are_one_clear_line(tmp_path, monkeypatch, capsys, folder):
    (tmp_path / "empty").mkdir()
    assert run(monkeypatch, "--results", tmp_path / folder, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_it(results, tmp_path, monkeypatch):
    run(monkeypatch, "--results", results, "--out", tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    # A script beside the page's own text says what the browser made of it: pictures decoded, cells laid out.
    page.write_text(
        page.read_text()
        + """<script>addEventListener("load", () => { document.title = [
        [...document.images].filter(one => one.complete && one.naturalWidth === 1).length,
        document.querySelectorAll("td").length, document.querySelector("td").innerText,
        document.querySelector("table").getBoundingClientRect().height > 40].join("|") })</script>"""
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    shown = subprocess.run(
        [str(BROWSER), *options, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert "<title>2|7|H = &lt;3&gt;|true</title>" in shown
