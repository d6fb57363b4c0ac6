"""A checkpoint by its name on the hub: out of the Hugging Face cache, or into it.

The cache is laid out as huggingface_hub and transformers lay it out, so that all of them find what one has fetched:

    models--OWNER--NAME/refs/main                which commit a branch or tag was at
    models--OWNER--NAME/snapshots/COMMIT/FILE    links into blobs/
    models--OWNER--NAME/blobs/HASH               a file's content, or HASH.*.incomplete, its beginning
    models--OWNER--NAME/.no_exist/COMMIT/FILE    empty: the commit has no such file

What is there is taken as it is, without asking whether the branch has moved: the same name gives the same answers until
somebody fetches another commit.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanovllm.hub.client import NAME_PATTERN, HubError, Repository
from nanovllm.hub.contents import SMALL_FILES, TEMPLATE_FILE, check_space, check_weights, fetch_checkpoint
from nanovllm.utils.file_lock import lock
from nanovllm.utils.loader import INDEX_FILE
from nanovllm.utils.model_config import CONFIG_FILE

logger = logging.getLogger(__name__)

COMMIT_PATTERN = r"[0-9a-f]{40}"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Without these, or the knowledge that there are none, a snapshot may be one that another program has fetched a part of.
ESSENTIAL_FILES = {"model": (CONFIG_FILE, "generation_config.json", *TOKENIZER_FILES), "tokenizer": TOKENIZER_FILES}
WAIT_SECONDS = 0.2  # between two looks at a lock
REMEDY = "HF_HOME or download_dir (or HF_HUB_CACHE)"


def find_checkpoint(
    name: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    kind: str = "model",
    token: bool | str | None = None,
) -> str:
    """The directory of a checkpoint that is given by its path, or by its name on the hub.

    A directory is taken as it is. Otherwise a string ``OWNER/NAME`` is looked for in the Hugging Face cache, and
    downloaded into it if it is not wholly there; interrupted, the next call resumes. The environment variables of
    huggingface_hub count: ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_ENDPOINT``, ...

    Args:
        name: A path, or ``OWNER/NAME``.
        revision: A branch, tag or commit of the repository; the main branch by default.
        cache_dir: The cache; by default Hugging Face's.
        kind: What is needed of it, "model" (its weights, and all that belongs to it) or "tokenizer".
        token: To download with: a text, True for this machine's, False for none; by default this machine's if it has
            one.

    Returns:
        The directory.

    Raises:
        HubError: It is not here, and the hub, or the way to it, does not give it.
        ValueError: It is neither a directory nor a name, a directory is to have a revision, the disk is full, or the
            architecture is not supported.
        OSError: The cache cannot be written to.
    """
    path = os.path.expanduser(os.fspath(name))
    if os.path.isdir(path):
        if revision is not None:
            raise ValueError(f"{kind} is {path!r}, a directory, which has no revision {revision!r}; leave revision out")
        return path
    if os.path.isfile(path):
        raise ValueError(
            f"{kind} is {path!r}, a file; give the directory of a Hugging Face checkpoint (config.json, *.safetensors, "
            "tokenizer.json)"
        )
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(
            f"{kind} is {path!r}, which is not a directory; give the path of a downloaded Hugging Face checkpoint, or "
            "the name of one to download, as in 'Qwen/Qwen3-0.6B'"
        )
    from huggingface_hub import constants

    cache = Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser()
    entry = _Entry(name, revision, cache / f"models--{name.replace('/', '--')}", kind, token)
    snapshot = entry.snapshot()
    lacks = entry.lacks(snapshot)
    if snapshot is not None and not lacks:
        return str(snapshot)
    try:
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f"it cannot be downloaded, for HF_HUB_OFFLINE is set; unset it, or run 'nanovllm download {name}' "
                "where there is a network"
            )
        with _sole(cache / ".locks" / entry.folder.name / "nanovllm.lock", name):
            snapshot = entry.snapshot()  # another process may have fetched it meanwhile
            return str(snapshot if snapshot is not None and not entry.lacks(snapshot) else entry.download())
    except OSError as error:  # of the hub, or of a cache that can only be read
        if snapshot is not None and entry.is_usable(snapshot):
            logger.warning("%s lacks %s and is used as it is: %s", snapshot, ", ".join(lacks), error)
            return str(snapshot)
        if not isinstance(error, HubError):
            if error.strerror is None:  # it says all
                raise
            raise OSError(
                f"{name} cannot be downloaded into the cache {cache} ({error.strerror}); name another with {REMEDY}"
            ) from error
        at = "" if revision is None else f", revision {revision!r},"
        raise HubError(
            f"{kind} is {name!r}, which is no directory here and{at} not wholly in the cache {cache}; {error}; or give "
            "the path of a checkpoint"
        ) from error


class _Entry:
    """What a cache has, or is to have, of a repository."""

    def __init__(self, name: str, revision: str | None, folder: Path, kind: str, token: bool | str | None) -> None:
        self.name, self.revision, self.folder, self.kind = name, revision, folder, kind
        self._token = token
        self._ref = folder.joinpath("refs", *(revision or "main").split("/"))

    def snapshot(self) -> Path | None:
        """The folder of the revision; None if the cache has none."""
        commit = self.revision or ""
        with suppress(OSError, ValueError):
            commit = self._ref.read_text(encoding="utf-8").strip()
        folder = self.folder / "snapshots" / commit
        return folder if re.fullmatch(COMMIT_PATTERN, commit) and folder.is_dir() else None

    def lacks(self, snapshot: Path | None) -> list[str]:
        """What a snapshot may have to have and has not."""
        if snapshot is None:
            return ["everything"]
        absent = self._absent(snapshot)
        essential = [*ESSENTIAL_FILES[self.kind], *([] if _has_own_template(snapshot) else [TEMPLATE_FILE])]
        lacking = [file for file in essential if not (snapshot / file).is_file() and not (absent / file).exists()]
        return lacking + ["weights"] * (self.kind == "model" and not _has_weights(snapshot))

    def is_usable(self, snapshot: Path) -> bool:
        """Whether a snapshot has what it cannot do without; a repository may have no more."""
        if self.kind == "tokenizer":
            return any((snapshot / file).is_file() for file in ("tokenizer.json", "vocab.json", "tokenizer.model"))
        return (snapshot / CONFIG_FILE).is_file() and _has_weights(snapshot)

    def download(self) -> Path:
        """Fetch what is not there yet; nobody else does so meanwhile. Returns the snapshot's folder."""
        remote = Repository(self.name, self.revision, self._token)
        snapshot = self.folder / "snapshots" / remote.commit

        def fetch(names: list[str]) -> None:
            self._fetch(remote, snapshot, names)

        if self.kind == "model":
            fetch_checkpoint(remote, snapshot, fetch)
        else:
            fetch([name for name in SMALL_FILES if name in remote.files and name != INDEX_FILE])
        for name in (*ESSENTIAL_FILES[self.kind], TEMPLATE_FILE):
            if name not in remote.files:
                self._absent(snapshot).mkdir(parents=True, exist_ok=True)
                (self._absent(snapshot) / name).touch()
        if self.revision != remote.commit:  # at last: until then, what it was at stays usable
            self._ref.parent.mkdir(parents=True, exist_ok=True)
            self._ref.write_text(remote.commit, encoding="utf-8")
        return snapshot

    def _fetch(self, remote: Repository, snapshot: Path, names: list[str]) -> None:
        """Files of a repository into blobs, with links to them in the snapshot."""
        blobs = self.folder / "blobs"
        wanted = [remote.files[name] for name in names if not remote.files[name].is_at(snapshot / name)]
        targets = [(file, blobs / file.digest if file.digest else snapshot / file.name) for file in wanted]
        check_space(self.folder, targets, REMEDY)
        for folder in (blobs, snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        for file, target in targets:
            remote.fetch(file.name, target)
            if target.parent == blobs:
                _link(snapshot / file.name, target)

    def _absent(self, snapshot: Path) -> Path:
        return self.folder / ".no_exist" / snapshot.name


def _has_own_template(snapshot: Path) -> bool:
    """Whether the chat template stands in tokenizer_config.json; newer repositories have it in a file of its own."""
    try:
        values = json.loads((snapshot / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and bool(values.get("chat_template"))


def _has_weights(snapshot: Path) -> bool:
    try:
        check_weights(snapshot)
    except (OSError, ValueError):
        return False
    return True


def _link(link: Path, blob: Path) -> None:
    """Make ``link`` stand for ``blob``; where there are no links, the file itself goes there."""
    with suppress(FileNotFoundError):
        link.unlink()
    try:
        link.symlink_to(os.path.relpath(blob, link.parent))
    except OSError:  # Windows without the right to
        blob.replace(link)


@contextmanager
def _sole(path: Path, name: str) -> Iterator[None]:
    """Wait until no other process downloads ``name``, and keep others from it for the time of the context."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        waits = False
        while True:
            try:
                lock(file, f"{name} is being downloaded by another process")
                break
            except BlockingIOError:
                if not waits:
                    logger.warning("another process is downloading %s; waiting for it", name)
                waits = True
                time.sleep(WAIT_SECONDS)
        yield
