"""What a checkpoint's directory is called."""

import os
import re
from pathlib import Path


def model_name(directory: str | os.PathLike[str]) -> str:
    """The repository's name, if it is in a Hugging Face cache, which calls directories by commits; else its own."""
    path = Path(directory)
    parents = [parent.name for parent in path.parents]
    if parents[:1] == ["snapshots"] and (found := re.fullmatch(r"models--(.+?)--(.+)", parents[1])):
        return f"{found[1]}/{found[2]}"
    return path.name
