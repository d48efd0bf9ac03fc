"""Settings for all tests: no test is timed, so a slow machine cannot fail one."""

from hypothesis import settings

settings.register_profile("fedmezo", deadline=None, max_examples=50)
settings.load_profile("fedmezo")
