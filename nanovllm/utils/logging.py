"""Logging: the standard library's, of which only warnings show unless more is asked for.

Every module logs through ``logging.getLogger(__name__)``, so an application configures it as any library's, under the
name ``nanovllm``. Where it configures nothing, Python prints warnings and what is worse to stderr by itself. Setting
``NANOVLLM_LOG_LEVEL`` before the import prints more without further ado: ``DEBUG`` shows every step's plan, its shapes
and why a backend was chosen.
"""

import logging
import os
import warnings

LEVEL_VARIABLE = "NANOVLLM_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def configure_logging() -> None:
    """Print what ``NANOVLLM_LOG_LEVEL`` asks for to stderr; without it, leave logging to the application.

    A name that is no level is warned of and left alone: a library must not end the program that imports it.
    """
    # No NullHandler: with one, Python's handler of last resort would hide the warnings it shows otherwise.
    logger = logging.getLogger("nanovllm")
    name = os.environ.get(LEVEL_VARIABLE, "").upper()
    if not name:
        return
    if name not in _LEVELS:
        given = os.environ[LEVEL_VARIABLE]
        warnings.warn(f"{LEVEL_VARIABLE} is {given!r}; use one of {', '.join(_LEVELS)}", stacklevel=2)
        return
    logger.setLevel(name)
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False  # otherwise a root handler added later would print every line twice
