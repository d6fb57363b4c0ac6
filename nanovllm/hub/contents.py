"""What of a repository is a checkpoint: the files that are wanted, whether they can be served and are whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nanovllm.hub.client import RemoteFile, Repository
from nanovllm.models.registry import MODELS
from nanovllm.utils.loader import INDEX_FILE, find_shards
from nanovllm.utils.model_config import CONFIG_FILE, load_model_config

WEIGHTS_FILE = "model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
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
    TEMPLATE_FILE,
    "chat_template.json",
    INDEX_FILE,
)
SPARE_BYTES = 2**26  # left free on the disk


def fetch_checkpoint(remote: Repository, folder: Path, fetch: Callable[[list[str]], None]) -> tuple[str, list[str]]:
    """Fetch what a checkpoint is made of, and check it.

    Args:
        remote: Where it comes from.
        folder: Where it is read from, once it is fetched.
        fetch: Puts the files of these names there; called twice. The small ones come first: they tell whether the large
            ones are of use, and which they are.

    Returns:
        The architecture, and the files' names.

    Raises:
        ValueError: It is none, or of an architecture that is not supported, or what came is damaged.
        OSError: As ``fetch`` does.
    """
    small = [name for name in SMALL_FILES if name in remote.files]
    if CONFIG_FILE not in small:
        raise ValueError(f"{remote.name} is no checkpoint that can be loaded: it has no {CONFIG_FILE}")
    fetch(small)
    architecture = check_config(folder, remote.name)
    weights = weights_of(folder, remote.files, remote.name)
    fetch(weights)
    check_weights(folder)
    return architecture, [*small, *weights]


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


def check_config(folder: Path, repository: str) -> str:
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


def weights_of(folder: Path, files: Mapping[str, RemoteFile], repository: str) -> list[str]:
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


def check_space(folder: Path, files: Iterable[tuple[RemoteFile, Path]], remedy: str) -> None:
    """ValueError if the disk of a folder lacks the space for what is still to come of files; each has its place."""
    needed = 0
    for file, target in files:
        held = [path.stat().st_size for path in (target, file.unfinished(target)) if path.is_file()]
        needed += max(0, file.size - max(held, default=0))
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed and needed + SPARE_BYTES > free:
        raise ValueError(
            f"{folder} takes {needed:,} more bytes, and {free:,} are free on its disk; free some, or name a folder on "
            f"another disk with {remedy}"
        )
