"""Checkpoints from the Hugging Face hub: only what the engine reads, resumed after an interruption, and checked."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nanovllm.hub.client import HubError, RemoteFile, Repository
from nanovllm.models.registry import MODELS
from nanovllm.utils.file_lock import lock
from nanovllm.utils.loader import INDEX_FILE, find_shards
from nanovllm.utils.model_config import CONFIG_FILE, load_model_config

__all__ = ["Download", "HubError", "check_weights", "download"]

WEIGHTS_FILE = "model.safetensors"
# Of a repository, besides its weights, what the engine or transformers' tokenizers read.
SMALL_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    INDEX_FILE,
)
SPARE_BYTES = 2**26  # left free on the disk
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
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise ValueError(f"{repository!r} is not the name of a repository; write OWNER/NAME, as in Qwen/Qwen3-0.6B")
    folder = Path(local_dir if local_dir is not None else repository.split("/")[1]).expanduser()
    _check_folder(folder, repository)
    remote = Repository(repository, revision)
    # Small ones first: they tell whether the large ones are of use, and which they are.
    small = [name for name in SMALL_FILES if name in remote.files]
    if CONFIG_FILE not in small:
        raise ValueError(f"{repository} is no checkpoint that can be loaded: it has no {CONFIG_FILE}")
    _check_space(folder, [remote.files[name] for name in small])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NOTE_FILE).open("a", encoding="utf-8") as note:
        lock(note, f"another download into {folder} is running; wait for it to end, or name another with --local-dir")
        note.truncate(0)
        note.seek(0)
        note.write(json.dumps({"repository": repository, "revision": remote.commit}) + "\n")
        note.flush()
        return _fetch(remote, repository, folder, small)


def _fetch(remote: Repository, repository: str, folder: Path, small: list[str]) -> Download:
    """Fetch the files into a folder that nobody else downloads into, and check them."""
    for name in small:
        remote.fetch(name, folder)
    architecture = _check_config(folder, repository)
    weights = _weights(folder, remote.files, repository)
    _check_space(folder, [remote.files[name] for name in weights])
    for name in weights:
        remote.fetch(name, folder)
    for path in folder.glob("*.incomplete"):  # of other revisions
        path.unlink()
    check_weights(folder)
    if sorted(os.path.basename(path) for path in find_shards(str(folder))) != sorted(weights):
        raise ValueError(
            f"{folder} also holds {WEIGHTS_FILE}, which is not of {repository} and would be loaded instead; remove it"
        )
    return Download(
        folder, repository, remote.commit, architecture, {name: remote.files[name].size for name in [*small, *weights]}
    )


def check_weights(folder: Path) -> None:
    """Look at the safetensors files of a checkpoint.

    Raises:
        FileNotFoundError: There are none, or one that the index names is missing.
        ValueError: One is damaged, or does not hold a tensor that the index says it holds; the message names it.
    """
    again = "remove it and download again"
    tensors: dict[str, set[str]] = {}
    for shard in find_shards(str(folder)):
        try:
            with safe_open(shard, framework="np") as file:  # which compares the header with the file's length
                tensors[os.path.basename(shard)] = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{shard} is damaged ({error}); {again}") from error
    if WEIGHTS_FILE in tensors or not (folder / INDEX_FILE).exists():
        return
    for tensor, name in _weight_map(folder).items():
        if tensor not in tensors[name]:
            raise ValueError(f"{folder / name} lacks {tensor}, which {INDEX_FILE} says it holds; {again}")


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


def _check_config(folder: Path, repository: str) -> str:
    """The architecture, if it can be served; ValueError if not, before anything large is downloaded."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        [architecture, *_] = [str(name) for name in values.get("architectures") or ["unknown"]]
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ValueError(f"the {CONFIG_FILE} of {repository} is damaged ({error})") from error
    if architecture not in MODELS:  # said first: of other architectures, not even the entries need be known here
        raise ValueError(
            f"{repository} is of the architecture {architecture}, which is not supported; supported: "
            f"{', '.join(MODELS)}. Its weights were not downloaded"
        )
    return load_model_config(str(folder)).architecture


def _weights(folder: Path, files: Mapping[str, RemoteFile], repository: str) -> list[str]:
    """The files of a repository that hold the weights."""
    if WEIGHTS_FILE in files:
        return [WEIGHTS_FILE]
    if INDEX_FILE in files:
        names = sorted(set(_weight_map(folder).values()))
        if absent := [name for name in names if name not in files]:
            raise ValueError(f"{repository} lacks {', '.join(absent)}, which its {INDEX_FILE} names")
        return names
    names = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
    if not names:
        raise ValueError(f"{repository} has no *.safetensors file; only such weights can be loaded")
    return names


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(found, dict) or not all(Path(str(name)).name == name for name in found.values()):
            raise ValueError("it names files outside its folder")
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX_FILE} is not a valid safetensors index ({error})") from error
    return found


def _check_space(folder: Path, files: Iterable[RemoteFile]) -> None:
    """ValueError if the disk lacks the space for what is still to come of the files."""
    needed = 0
    for file in files:
        held = [path.stat().st_size for path in (folder / file.name, file.unfinished(folder)) if path.is_file()]
        needed += max(0, file.size - max(held, default=0))
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed and needed + SPARE_BYTES > free:
        raise ValueError(
            f"{folder} takes {needed:,} more bytes, and {free:,} are free on its disk; free some, or name a folder on "
            "another disk with --local-dir"
        )
