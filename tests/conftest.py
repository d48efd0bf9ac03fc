"""Settings for all tests: no test is timed, so a slow machine cannot fail one; equal programs are compiled once."""

import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import settings

settings.register_profile("fedmezo", deadline=None, max_examples=50)
settings.load_profile("fedmezo")

# Most of a test's time is spent in XLA, and tests often ask for programs that another test has compiled. The process
# that starts the tests makes one cache for all workers and for all processes that tests start. JAX decides at the first
# compilation whether there is a cache, so it must be named here and not in a fixture.
STARTS_THE_TESTS = "PYTEST_XDIST_WORKER" not in os.environ
if STARTS_THE_TESTS:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fedmezo-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)


def pytest_unconfigure():
    """Leaves nothing behind."""
    if STARTS_THE_TESTS:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_runtest_setup(item):
    """Skips comparisons with PyTorch where it or PEFT is not installed. A test that imports them needs the marker."""
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch")
        pytest.importorskip("peft")


@pytest.fixture(autouse=True, scope="module")
def programs_of_few_files_alone():
    """Drops compiled programs between two files of tests before their memory maps run out.

    Linux gives a process 65,530 of them (`vm.max_map_count`). A program takes up to some hundreds, and XLA crashes at
    the next one.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
