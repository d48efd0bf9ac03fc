"""Commands whose ``--out`` cannot be written to, or whose work fails."""

import os
import sys

import pytest

from experiments import _cli, evaluate, generate, memory, merge, plan
from experiments.benchmarks import step
from experiments.studies import effective_rank
from fedmezo_jax.out_folder import out_folder

COMMANDS = {
    "generate": (generate, ["--prompt", "x"]),
    "evaluate": (evaluate, []),
    "merge": (merge, []),
    "memory": (memory, []),
    "plan": (plan, []),
    "step": (step, []),
    "effective_rank": (effective_rank, []),
}


def run(monkeypatch, name, *arguments):
    """The command's exit code."""
    module, given = COMMANDS[name]
    monkeypatch.setattr(sys, "argv", [name, *given, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        _cli.run(module.main, module.Config, module.__doc__)
    return stop.value.code


@pytest.fixture(params=["a file", "below a file", "a name too long", "no place for files"])
def impossible(request, tmp_path):
    (tmp_path / "file").write_text("kept")
    return {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "out",
        "a name too long": tmp_path / ("x" * 300) / "out",
        "no place for files": "/proc/self/task/out",
    }[request.param]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_out_that_cannot_be_made_is_one_line_before_any_work(name, impossible, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(COMMANDS[name][0], "main", lambda *_: pytest.fail("worked before it looked at --out"))
    assert run(monkeypatch, name, "--out", impossible) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out {impossible}")
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch, capsys):
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    tmp_path.chmod(0o500)
    try:
        assert run(monkeypatch, "generate", "--out", tmp_path / "out") == 2
        assert run(monkeypatch, "generate", "--out", tmp_path) == 2
    finally:
        tmp_path.chmod(0o700)
    assert capsys.readouterr().err.count("Permission denied") == 2


def write_and_fail(file):
    file.write_text("x")
    raise ZeroDivisionError


def test_what_was_made_goes_where_the_work_fails_and_nothing_else(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyboardInterrupt), out_folder(tmp_path / "old" / "a" / "b"):
        raise KeyboardInterrupt
    assert list((tmp_path / "old").iterdir()) == []
    with pytest.raises(KeyboardInterrupt), out_folder(tmp_path / "old"):
        raise KeyboardInterrupt
    assert (tmp_path / "old").is_dir()  # it was there before
    with pytest.raises(FileNotFoundError), out_folder(tmp_path / "new"):
        (tmp_path / "new" / "result").write_text((tmp_path / "nowhere").read_text())
    assert not (tmp_path / "new").exists()
    with pytest.raises(ZeroDivisionError), out_folder(tmp_path / "kept"):
        write_and_fail(tmp_path / "kept" / "result")
    assert (tmp_path / "kept" / "result").read_text() == "x"  # what was written stays
    with out_folder(tmp_path / "c" / "d"):
        pass
    assert list((tmp_path / "c" / "d").iterdir()) == []
