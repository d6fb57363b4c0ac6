"""A lock on an open file, which ends with the process that holds it."""

import sys
from typing import IO, Any


def lock(file: IO[Any], message: str) -> None:
    """Lock a file until it is closed; BlockingIOError with ``message`` if another process, or another opening, has."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(2**31 - 2)  # a byte far behind what is written, for others may not read it
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError(message) from error
