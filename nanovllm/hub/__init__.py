"""Checkpoints from the Hugging Face hub: only what the engine reads, resumed after an interruption, and checked."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from nanovllm.hub.cache import find_checkpoint
from nanovllm.hub.client import NAME_PATTERN, HubError, Repository
from nanovllm.hub.contents import WEIGHTS_FILE, check_space, check_weights, fetch_checkpoint
from nanovllm.utils.file_lock import lock
from nanovllm.utils.loader import find_shards
from nanovllm.utils.model_config import CONFIG_FILE

__all__ = ["Download", "HubError", "check_weights", "download", "find_checkpoint"]

# In a folder that was downloaded: from where. Other folders are not written into.
NOTE_FILE = ".nanovllm-download.json"


@dataclass(frozen=True, slots=True)
class Download:
    """A checkpoint that is here, and complete.

    Args:
        path: Its folder.
        repository: Where it comes from.
        revision: The commit that was downloaded.
        architecture: What it is, as its config.json says.
        files: Names and sizes in bytes.
    """

    path: Path
    repository: str
    revision: str
    architecture: str
    files: dict[str, int]


def download(repository: str, revision: str | None = None, local_dir: str | os.PathLike[str] | None = None) -> Download:
    """Fetch a checkpoint. Interrupted at any moment, the same call resumes; what is there already is not fetched again.

    The environment variables of huggingface_hub count: ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ...

    Args:
        repository: ``OWNER/NAME``.
        revision: A branch, tag or commit; the main branch by default.
        local_dir: The folder; ``NAME`` in the working directory by default.

    Raises:
        HubError: The repository cannot be reached, is not there, or is gated, or what came is damaged.
        ValueError: The name is none, the folder holds something else, there is not enough space, or the model is of an
            architecture that is not supported.
        OSError: The folder cannot be written to, or another download into it is running (BlockingIOError).
    """
    if not re.fullmatch(NAME_PATTERN, repository):
        raise ValueError(f"{repository!r} is not the name of a repository; write OWNER/NAME, as in Qwen/Qwen3-0.6B")
    folder = Path(local_dir if local_dir is not None else repository.split("/")[1]).expanduser()
    _check_folder(folder, repository)
    remote = Repository(repository, revision)
    with ExitStack() as claimed:

        def fetch(names: list[str]) -> None:
            check_space(folder, [(remote.files[name], folder / name) for name in names], "--local-dir")
            if CONFIG_FILE in names:  # they are the first: what cannot be had leaves no folder behind
                claimed.enter_context(_claim(folder, remote))
            for name in names:
                remote.fetch(name, folder / name)

        architecture, names = fetch_checkpoint(remote, folder, fetch)
        for path in folder.glob("*.incomplete"):  # of other revisions
            path.unlink()
        weights = sorted(name for name in names if name.endswith(".safetensors"))
        if sorted(os.path.basename(path) for path in find_shards(str(folder))) != weights:
            raise ValueError(
                f"{folder} also holds {WEIGHTS_FILE}, which is not of {repository} and would be loaded instead; remove "
                "it"
            )
    return Download(folder, repository, remote.commit, architecture, {name: remote.files[name].size for name in names})


@contextmanager
def _claim(folder: Path, remote: Repository) -> Iterator[None]:
    """Make the folder, note what it is for, and keep other downloads from it for the time of the context."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NOTE_FILE).open("a", encoding="utf-8") as note:
        lock(note, f"another download into {folder} is running; wait for it to end, or name another with --local-dir")
        note.truncate(0)
        note.seek(0)
        note.write(json.dumps({"repository": remote.name, "revision": remote.commit}) + "\n")
        note.flush()
        yield


def _check_folder(folder: Path, repository: str) -> None:
    """Refuse a folder that holds something else: files of the same names would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with --local-dir")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        held = json.loads((folder / NOTE_FILE).read_text(encoding="utf-8"))["repository"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder} is not empty, and not of an earlier download; name another folder with --local-dir"
        ) from None
    if held != repository:
        raise ValueError(f"{folder} holds a download of {held}; name another folder with --local-dir")
