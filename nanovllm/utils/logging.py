"""Logging: the standard library's, quiet unless asked.

Every module logs through ``logging.getLogger(__name__)``, so the usual tools configure it: attach handlers to
the logger named ``nanovllm``, or set ``NANOVLLM_LOG_LEVEL`` (``DEBUG`` shows every step's plan, its shapes and
why a backend was chosen) before the import.
"""

import logging
import os

LEVEL_VARIABLE = "NANOVLLM_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def configure_logging(level: str | None = None) -> None:
    """Set the level of the ``nanovllm`` logger, and print to stderr unless the application has handlers of its own.

    Args:
        level: One of DEBUG, INFO, WARNING, ERROR, CRITICAL; ``None`` reads ``NANOVLLM_LOG_LEVEL`` (default WARNING).

    Raises:
        ValueError: The level is none of these.
    """
    name = (level or os.environ.get(LEVEL_VARIABLE) or "WARNING").upper()
    if name not in _LEVELS:
        source = "level" if level else LEVEL_VARIABLE
        raise ValueError(f"{source} is {name!r}; use one of {', '.join(_LEVELS)}")
    logger = logging.getLogger("nanovllm")
    logger.setLevel(name)
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False  # otherwise a root handler added later would print every line twice
