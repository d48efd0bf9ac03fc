"""Keeps Orbax's log quiet while it is in use, without a change to the loggers that lasts."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("absl", "asyncio")  # Orbax writes to both: a line for every save, and stacks of errors that it also raises


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drops the records of Orbax while the context is open; all other records pass."""

    def not_from_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname + record.getMessage()

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(not_from_orbax)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(not_from_orbax)
