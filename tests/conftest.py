"""Settings for all tests: no test is timed, so a slow machine cannot fail one; equal programs are compiled once."""

import shutil
import tempfile

import jax
from hypothesis import settings

settings.register_profile("fedmezo", deadline=None, max_examples=50)
settings.load_profile("fedmezo")

# Most of a test's time is XLA's, and a run that is repeated or resumed asks for the same programs again. JAX decides at
# the first compilation whether there is a cache, so it must be named here and not in a fixture.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="fedmezo-tests-"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_unconfigure():
    """Leaves nothing behind."""
    shutil.rmtree(jax.config.jax_compilation_cache_dir, ignore_errors=True)
