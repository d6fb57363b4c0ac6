"""Names of parametrized tests that are the same in every process."""

import re
from typing import Any


def stable(value: Any) -> str:
    """What ``repr`` says, without where in memory it is."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
