"""Logging: the standard library's, quiet unless asked.

Every module logs through ``logging.getLogger(__name__)``, so an application configures it as any library's, under the
name ``nanovllm``. Setting ``NANOVLLM_LOG_LEVEL`` before the import prints to stderr without further ado: ``DEBUG``
shows every step's plan, its shapes and why a backend was chosen.
"""

import logging
import os

LEVEL_VARIABLE = "NANOVLLM_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def configure_logging() -> None:
    """Print what ``NANOVLLM_LOG_LEVEL`` asks for to stderr; without it, leave logging to the application.

    Raises:
        ValueError: The variable names no level.
    """
    logger = logging.getLogger("nanovllm")
    logger.addHandler(logging.NullHandler())
    name = os.environ.get(LEVEL_VARIABLE, "").upper()
    if not name:
        return
    if name not in _LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE} is {name!r}; use one of {', '.join(_LEVELS)}")
    logger.setLevel(name)
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False  # otherwise a root handler added later would print every line twice
