"""The cache of compiled programs: a folder for each processor, found by the next process, unless the user has one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fedmezo_jax.run import compilation_cache

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_cache_named():
    """As where the user has named no cache for compiled programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_each_processor_has_a_folder_of_its_own(no_cache_named, tmp_path, monkeypatch):
    chosen = []
    for processor in ("one", "another", "one"):
        monkeypatch.setattr(compilation_cache, "_processor", lambda processor=processor: processor)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.keep_compiled(tmp_path)
        chosen.append(Path(jax.config.jax_compilation_cache_dir))
    assert chosen[0] == chosen[2] != chosen[1]
    assert {folder.parent for folder in chosen} == {tmp_path}


def test_a_cache_that_is_named_already_stays(no_cache_named, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    compilation_cache.keep_compiled(tmp_path / "other")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


COMPILE = """
import sys
from pathlib import Path
import jax
from fedmezo_jax.run.compilation_cache import keep_compiled
keep_compiled(Path(sys.argv[1]))
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(1) if event.endswith("/cache_hits") else None)
jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
print(len(hits))
"""


def compile_in_a_process(folder, **environment):
    """How many programs a process of its own finds in the cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)],
        cwd=ROOT,
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return int(done.stdout)


def files(folder):
    return sorted(file.relative_to(folder) for file in folder.rglob("*-cache") if file.is_file())


def test_a_second_process_finds_the_programs_under_the_folder(tmp_path):
    assert compile_in_a_process(tmp_path) == 0
    kept = files(tmp_path)
    assert kept
    assert {len(file.parts) for file in kept} == {2}  # a folder for the processor, and the programs
    assert compile_in_a_process(tmp_path) == len(kept)
    assert files(tmp_path) == kept


def test_programs_cut_short_by_a_full_disk_are_compiled_again_without_a_word(tmp_path):
    compile_in_a_process(tmp_path)
    for file in files(tmp_path):
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:50])
    assert compile_in_a_process(tmp_path) == 0


def test_the_users_own_cache_is_used_where_there_is_one(tmp_path):
    mine, ours = tmp_path / "mine", tmp_path / "ours"
    named = {"JAX_COMPILATION_CACHE_DIR": str(mine), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert compile_in_a_process(ours, **named) == 0
    assert files(mine)
    assert not ours.exists()
