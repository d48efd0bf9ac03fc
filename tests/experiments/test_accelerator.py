"""The accelerator benchmark: its clock, its order, what a cut-off leaves, and that it runs with few packages."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import _cli
from experiments.benchmarks import accelerator
from experiments.benchmarks.accelerator_rows import card, memory, plan, speed
from experiments.benchmarks.accelerator_rows.exactness import differing_bits
from experiments.benchmarks.accelerator_rows.forecast import error_line, memory_off, time_off
from experiments.benchmarks.accelerator_rows.plan import ACCELERATOR, CPU, Job, jobs
from experiments.benchmarks.accelerator_rows.process import FailedError, OutOfTimeError, Process
from experiments.benchmarks.accelerator_rows.schedule import Clock, Schedule
from experiments.benchmarks.accelerator_rows.worker import KINDS
from experiments.benchmarks.step import Setting, random_case
from fedmezo_jax.errors import UserError
from fedmezo_jax.llama.shapes import named_shape
from fedmezo_jax.planning import cost_model

ROOT = Path(__file__).parents[2]
CARD = Job("card", ("card",), 1.0, {})


class Bench:
    """A device in a time of its own: each job takes what its options say, and fails as they say."""

    def __init__(self, seconds):
        self.time, self.started, self.recorded = 0.0, [], []
        self.clock = Clock(seconds, lambda: self.time)

    def measure(self, jobs, rows=()):
        earlier = {name: {"row": name} for name in rows}
        schedule = Schedule(self.clock, self.start, self.recorded.append, earlier, {"jax": "0"})
        schedule.run(jobs)
        assert self.open == 0
        return schedule

    def start(self, job):
        self.started.append(job.process or job.rows[0])
        self.open = 1
        return self

    def run(self, kind, wanted, card, options, seconds):
        hidden = options.pop("hides", ())  # until the next time
        for name in wanted:
            took = options.get("takes", 1.0)
            if took > seconds:
                self.time += seconds
                raise OutOfTimeError
            self.time, seconds = self.time + took, seconds - took
            if name == options.get("fails"):
                raise FailedError("RESOURCE_EXHAUSTED: out of memory")
            if name not in hidden:
                yield {"row": name}

    def close(self):
        self.open = 0

    open = 0


def job(*names, seconds=1.0, process=plan.DEVICE, kind="speed", **options):
    return Job(kind, names, seconds, options, process)


def test_rows_come_in_order_and_processes_are_shared():
    bench = Bench(100)
    schedule = bench.measure([CARD, job("a"), job("b", process="cpu"), job("c", process=None), job("d")])
    assert [row["row"] for row in bench.recorded] == list(schedule.rows) == ["card", "a", "b", "c", "d"]
    assert bench.started == ["device", "cpu", "c", "device"]
    assert bench.recorded[1] == {"row": "a", "kind": "speed", "jax": "0"}


def test_a_row_that_does_not_fit_is_skipped_and_a_shorter_one_is_measured():
    schedule = Bench(10).measure([CARD, job("long", seconds=20.0), job("short")])
    assert list(schedule.rows) == ["card", "short"]
    assert schedule.skipped == {"long": "would take 20 s, 9 s are left"}


def test_estimates_follow_the_rows_before():
    """The first takes four times what was thought, so the next of its kind would take 12 of the 11 seconds left."""
    kinds = [job("a", seconds=2.0, takes=8.0), job("b", seconds=3.0), job("c", seconds=3.0, kind="peer", takes=3.0)]
    schedule = Bench(20).measure([CARD, *kinds])
    assert list(schedule.rows) == ["card", "a", "c"]
    assert schedule.skipped == {"b": "would take 12 s, 11 s are left"}


def test_what_is_busy_when_the_time_is_up_is_cut_off():
    bench = Bench(10)
    schedule = bench.measure([CARD, job("a", "b", "c", takes=4.0), job("d")])
    assert list(schedule.rows) == ["card", "a", "b"]
    assert schedule.skipped == {
        "c": "was cut off when the time was up",
        "d": "would take 9 s, 0 s are left",
    }
    assert bench.time == 10


def test_a_failure_is_a_row_and_the_rest_goes_on_in_a_new_process():
    bench = Bench(100)
    schedule = bench.measure([CARD, job("a", "b", "c", fails="b"), job("d")])
    assert [name for name, row in schedule.rows.items() if "error" not in row] == ["card", "a", "d"]
    assert schedule.rows["b"]["error"] == schedule.rows["c"]["error"] == "RESOURCE_EXHAUSTED: out of memory"
    assert bench.started == ["device", "device"]


def test_a_peak_that_was_hidden_is_measured_in_a_fresh_process():
    bench = Bench(100)
    schedule = bench.measure([CARD, job("a", "b", "c", process=None, hides=("b",))])
    assert [row["row"] for row in bench.recorded] == ["card", "a", "c", "b"]
    assert not any("error" in row for row in schedule.rows.values())
    assert bench.started == ["device", "a", "a"]


def test_a_job_without_rows_fails_and_is_not_tried_for_ever():
    schedule = Bench(100).measure([CARD, job("a", hides=("a",))])
    assert schedule.rows["a"]["error"] == "gave no row"


def test_without_the_card_nothing_has_a_roofline():
    schedule = Bench(100).measure([CARD._replace(options={"fails": "card"}), job("a")])
    assert list(schedule.rows) == ["card"]
    assert schedule.skipped == {"a": "the card could not be measured"}


def test_rows_of_an_earlier_run_are_not_measured_again():
    bench = Bench(100)
    bench.measure([CARD, job("a", "b"), job("c")], rows=("card", "a", "c"))
    assert [row["row"] for row in bench.recorded] == ["b"]


@pytest.mark.parametrize("sizes", [ACCELERATOR, CPU], ids=["accelerator", "cpu"])
def test_a_plan_names_each_row_once_and_measures_the_card_first(sizes, tmp_path):
    planned = jobs(sizes, tmp_path)
    names = [name for job in planned for name in job.rows]
    assert len(set(names)) == len(names)
    assert planned[0].rows == ("card",)
    assert {job.kind for job in planned} == set(KINDS)
    for i, job in enumerate(planned):  # a comparison needs the run of the device
        if job.kind == "comparison":
            assert (planned[i - 1].kind, planned[i - 1].options) == ("exactness", job.options)


def test_the_plan_covers_the_settings_that_were_asked_for(tmp_path):
    speeds = {
        tuple(job.options[name] for name in ("clients", "length", "precision", "layers"))
        for job in jobs(ACCELERATOR, tmp_path)
        if job.kind == "speed"
    }
    settings = [(clients, length) for clients in (1, 4, 16, 64) for length in (256, 1024)]
    kinds = [("float32", "all"), ("bfloat16", "all"), ("paired", "all"), ("paired", "last:4")]
    assert speeds == {(*setting, *kind) for setting in settings for kind in kinds}


@pytest.mark.parametrize(
    ("measured", "forecast", "off"),
    [(109, 100, False), (111, 100, True), (91, 100, False), (89, 100, True), (None, 100, None), (100, None, None)],
)
def test_a_memory_forecast_may_be_a_tenth_off(measured, forecast, off):
    assert memory_off(measured, forecast) is off


@pytest.mark.parametrize(("seconds", "off"), [(1.9, False), (2.1, True), (0.6, False), (0.4, True)])
def test_a_time_may_be_twice_the_roofline_or_half_of_it(seconds, off):
    assert time_off(seconds, 1.0) is off


def test_bits_that_differ_are_counted():
    assert differing_bits(b"\x00\xff", b"\x00\xff") == 0
    assert differing_bits(b"\x00\xff", b"\x03\xfe") == 3
    assert differing_bits(b"\x00\xff\x00", b"\x80") == 1 + 16


def test_an_error_is_one_short_line():
    assert error_line(ValueError("one\ntwo")) == "ValueError: one"
    assert len(error_line(ValueError("x" * 1000))) == 300


CARD_ROW = {"bfloat16_flops": 5.0, "float32_flops": 2.0, "copied_bytes_per_second": 3.0, "table": None}
UNKNOWN = CARD_ROW | {"table_bfloat16_flops": None, "table_bytes_per_second": None}
KNOWN = CARD_ROW | {"table_bfloat16_flops": 7.0, "table_bytes_per_second": 4.0, "table": "https://example.org"}


def test_a_roofline_is_the_maker_s_where_there_is_one():
    assert card.chip(UNKNOWN, "paired")[:2] == (5.0, 3.0)
    assert card.chip(KNOWN, "bfloat16")[:2] == (7.0, 4.0)
    assert card.chip(KNOWN, "float32")[:2] == (2.0, 4.0)


def test_every_device_kind_names_a_chip():
    assert set(cost_model.DEVICE_KINDS.values()) == set(cost_model.CHIPS)


def test_a_round_from_hidden_states_has_the_weights_above_alone():
    tiny = named_shape(plan.TINY)
    case = speed.from_hidden(random_case(tiny, Setting(2, 1, 8, 2), ["q_proj"], "paired", 0, "last:2"))
    assert case.base["norm"]["scale"].shape == (128,)
    assert case.base["layers"]["mlp"]["up_proj"]["kernel"].shape[0] == 2
    assert case.cohort.batches.hidden.shape == (2, 1, 1, 8, 128)
    assert card.above(tiny, "last:2").num_hidden_layers == 2


def test_a_peak_is_a_row_only_where_it_rose(monkeypatch):
    """A device whose peak is 100 bytes before anything runs: the second program stays below that of the first."""
    job = next(job for job in jobs(CPU, Path()) if job.kind == "memory")
    peaks = iter([100, 300, 300, 300])
    monkeypatch.setattr(memory, "_peak", lambda: next(peaks))
    limits = UNKNOWN | {"bfloat16_flops": 1e9, "copied_bytes_per_second": 1e9}
    (row,) = memory.measure(job.rows, limits, **job.options)
    assert (row["row"], row["peak_bytes"]) == ("memory tiny all forward bfloat16", 300)
    assert row["memory_forecast_off"] is True  # megabytes
    assert row["forecast_bytes"] > 1e6
    assert next(peaks, None) is None


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["accelerator", *map(str, arguments)])
    _cli.run(accelerator.main, accelerator.Config, accelerator.__doc__, accelerator.parse)


def rows_in(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_writes_its_rows_as_they_come_and_goes_on_after_a_cut_off(tmp_path, monkeypatch, capsys):
    def chosen(sizes, folder):
        planned = {job.kind: job for job in jobs(sizes._replace(product=64, copied=1024), folder)}
        broken = planned["speed"]._replace(options=planned["speed"].options | {"model": "no-such-model"})
        return [planned["card"], broken, planned["rebuild"], planned["peer"]._replace(seconds=1e6)]

    monkeypatch.setattr(accelerator, "jobs", chosen)
    out = tmp_path / "out"
    run(monkeypatch, "--out", out)
    rows = rows_in(out / "rows.jsonl")
    measured_card, failed, rebuilt = rows
    assert measured_card["device_kind"] == "cpu"
    assert failed["error"].startswith("UserError: unknown model 'no-such-model'")
    assert rebuilt["adapter_bytes"] == 4 * 5 * 8 * (128 + 128 + 128 + 64)  # five layers, A and B of q_proj and v_proj
    *kept, skipped = json.loads((out / "results.json").read_text())["rows"][:4]
    assert kept == rows
    assert skipped["skipped"].startswith("would take 1000000 s")
    text = capsys.readouterr().out
    assert f"error: {failed['row']}: UserError" in text
    assert "skipped: peer fedmezo: would take" in text

    lines = (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text(lines[: lines.index('{"row": "rebuild"') + 20])
    run(monkeypatch, "--out", out)
    assert rows_in(out / "rows.jsonl")[:2] == rows[:2]
    assert [row["row"] for row in rows_in(out / "rows.jsonl")] == [row["row"] for row in rows]


BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(["tyro", "datasets", "gguf", "cryptography", "dp_accounting"]))
"""
SHORT = """
import sys
from experiments import _cli
from experiments.benchmarks import accelerator

jobs, kinds = accelerator.jobs, ("card", "exactness", "comparison")

def chosen(sizes, folder):
    return [job for job in jobs(sizes._replace(product=64, copied=1024), folder) if job.kind in kinds]

accelerator.jobs = chosen
_cli.run(accelerator.main, accelerator.Config, accelerator.__doc__, accelerator.parse)
"""


def test_it_runs_without_packages_that_only_other_commands_need(tmp_path):
    """All Python processes that the command starts lack them as well."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "FEDMEZO_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SHORT, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, replayed, compared = rows_in(tmp_path / "out" / "rows.jsonl")
    assert (replayed["replay_bit_exact"], replayed["repeat_bit_exact"]) == (True, True)
    assert (compared["theta_bits_apart"], compared["ledger_bits_apart"], compared["adapter_bits_apart"]) == (0, 0, 0)
    assert compared["theta_bits"] == 2 * 32 * 5 * 8 * (128 + 128 + 128 + 64)  # of two rounds


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff\xfe", b'{"row": "card"}'])
def test_a_damaged_line_is_refused_and_nothing_is_lost(damage, tmp_path, monkeypatch, capsys):
    row = json.dumps({"row": "card", "kind": "card", "device_kind": "cpu", "jax": "0.10"}).encode()
    content = b"\n".join([row, damage, row, b""])
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", tmp_path)
    assert "rows.jsonl: line 2 is no row of this benchmark" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_bytes() == content


def test_a_folder_of_another_device_is_refused(tmp_path):
    rows = [{"row": "card", "device_kind": "NVIDIA H100 80GB HBM3", "jax": "0.11.2"}]
    accelerator.check_same(rows, {"device_kind": "NVIDIA H100 80GB HBM3", "jax": "0.11.2"}, tmp_path)
    with pytest.raises(UserError, match=r"holds rows of NVIDIA H100 80GB HBM3 with jax 0.11.2, and this is cpu with"):
        accelerator.check_same(rows, {"device_kind": "cpu", "jax": "0.12.0"}, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--minutes", "nan"], "--minutes must be above 0"),
        (["--minutes", "x"], "argument --minutes: invalid float value: 'x'"),
        (["--hours", "1"], "unrecognized arguments: --hours 1"),
    ],
)
def test_bad_options_are_one_line(arguments, complaint, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments, "--out", tmp_path)
    assert capsys.readouterr().err.startswith(f"error: {complaint}")


def test_a_process_that_dies_says_so_and_one_that_is_busy_is_ended(tmp_path):
    small = {"width": 64, "copied": 64}
    process = Process(tmp_path / "log", 120, cpu=True)
    assert process.hello["platform"] == "cpu"
    with pytest.raises(OutOfTimeError):
        list(process.run("card", ["card"], {}, small, 0.0))
    assert process._process.returncode == -signal.SIGKILL
    process = Process(tmp_path / "log", 120, cpu=True)
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(FailedError, match=r"ended with code -9: see .*log"):
        list(process.run("card", ["card"], {}, small, 60))
    process.close()
