"""A repository of the Hugging Face hub: its files, the way to fetch them, and what goes wrong with that, in words."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
NAME_PATTERN = r"[\w-][\w.-]*/[\w-][\w.-]*"  # OWNER/NAME
HASHED_BYTES = 2**22  # at a time


class HubError(OSError):
    """The hub, or the way to it, does not give what is asked for; the message says why and what to do, in one line."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Args:
        name: Its path there.
        size: Bytes.
        digest: Hexadecimal SHA-256 of a large file, SHA-1 of git's blob of a small one; None if the hub does not say.
    """

    name: str
    size: int
    digest: str | None = None

    def is_at(self, path: Path) -> bool:
        """Whether this very file is at ``path``, which is read for it."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.digest is None:
            return True
        is_blob = len(self.digest) == 40
        digest = hashlib.sha1(f"blob {self.size}\0".encode()) if is_blob else hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(HASHED_BYTES):
                digest.update(part)
        return digest.hexdigest() == self.digest

    def unfinished(self, target: Path) -> Path:
        """Where its beginning is kept until all of it is at ``target``; another revision's is elsewhere."""
        return target.with_name(f"{target.name}.{(self.digest or str(self.size))[:12]}.incomplete")


class Repository:
    """A repository at one commit.

    Args:
        name: ``OWNER/NAME``.
        revision: A branch, tag or commit; the main branch by default.
        token: As huggingface_hub has it: a text, True or None for that of this machine (None: if there is one), False
            for none.

    Attributes:
        commit: The commit.
        files: Its files by name.

    Raises:
        HubError: It is not there, or cannot be looked at.
    """

    def __init__(self, name: str, revision: str | None, token: bool | str | None = None) -> None:
        from huggingface_hub import HfApi

        self.name, self.revision, self._token = name, revision, token
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        api = HfApi(endpoint=self.endpoint, library_name="nanovllm", token=token)
        info = self._ask(lambda: api.model_info(name, revision=revision, files_metadata=True))
        self.commit: str = info.sha or revision or "main"
        self.files = {one.rfilename: _remote_file(one) for one in info.siblings or []}

    def fetch(self, name: str, target: Path) -> None:
        """Put a file at ``target``, unless it is there; what an interrupted call has left is completed.

        Raises:
            HubError: It does not come, or not as the hub says it is.
            OSError: It cannot be written.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        wanted = self.files[name]
        if wanted.is_at(target):
            return
        url = hf_hub_url(self.name, name, revision=self.commit, endpoint=self.endpoint)
        # Compressed, a part could not be continued where it ends.
        headers = {**build_hf_headers(token=self._token, library_name="nanovllm"), "Accept-Encoding": "identity"}
        # The package itself keeps no part of a file that it was fetching when it was interrupted.
        unfinished = wanted.unfinished(target)
        if unfinished.exists() and unfinished.stat().st_size > wanted.size:
            unfinished.unlink()

        def get() -> None:
            with unfinished.open("ab") as file:
                got = file.tell()
                http_get(
                    url, file, resume_size=got, headers=headers, expected_size=wanted.size, displayed_filename=name
                )

        self._ask(get)
        if not wanted.is_at(unfinished):
            unfinished.unlink()
            raise HubError(f"{name} of {self.name} came damaged: it is not what {self.endpoint} says it is; try again")
        unfinished.replace(target)

    def _ask(self, call: Callable[[], Result]) -> Result:
        """What a call of huggingface_hub gives; HubError or OSError for whatever it raises."""
        try:
            return call()
        except Exception as error:  # its own errors, those of its HTTP library, of which there are two, ...
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> OSError:
        from huggingface_hub import errors

        name = self.name
        if isinstance(error, errors.GatedRepoError):
            return HubError(
                f"{name} is gated: accept its terms at {self.endpoint}/{name}, then log in with 'hf auth login' or set "
                "HF_TOKEN to a token of that account"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return HubError(f"{name} has no revision {self.revision!r}; name another, or none for its main branch")
        if isinstance(error, errors.RepositoryNotFoundError):
            return HubError(
                f"{self.endpoint} has no model {name}, or it is private; check the spelling, or for a private one log "
                "in with 'hf auth login' or set HF_TOKEN"
            )
        if isinstance(error, errors.LocalTokenNotFoundError):
            return HubError(
                f"hf_token is True for {name}, and there is no token here; log in with 'hf auth login' or set HF_TOKEN"
            )
        if any("OfflineMode" in kind.__name__ for kind in type(error).__mro__):
            return HubError(
                f"{name} cannot be downloaded: HF_HUB_OFFLINE is set; unset it, or copy the folder from a machine that "
                "has it"
            )
        response = getattr(error, "response", None)
        if response is not None and response.status_code == 401:
            return HubError(
                f"{self.endpoint} does not accept the token that it was asked for {name} with; give a valid one with "
                "hf_token or HF_TOKEN, or log in with 'hf auth login'"
            )
        if response is not None:
            return HubError(
                f"{self.endpoint} answered {name} with HTTP status {response.status_code}; try again later "
                "(the same command resumes)"
            )
        if _is_of_the_net(error):
            return HubError(
                f"{self.endpoint} cannot be reached ({_root_cause(error)}); check the connection or set a proxy "
                "(HTTPS_PROXY) or a mirror (HF_ENDPOINT); the same command resumes. Or copy the folder from a machine "
                "that has it"
            )
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, a folder that cannot be written to
            return OSError(f"{name} cannot be written: {error.strerror or error}; the same command resumes")
        return HubError(f"{name} could not be downloaded: {type(error).__name__}: {error}")


def _remote_file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs or {}
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    return RemoteFile(sibling.rfilename, sibling.size or 0, sha256 or sibling.blob_id)


def _is_of_the_net(error: BaseException) -> bool:
    """Whether an error, or what it comes from, is one of a connection."""
    seen: BaseException | None = error
    while seen is not None:
        modules = {kind.__module__.partition(".")[0] for kind in type(seen).__mro__}
        libraries = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "socket", "ssl"}
        if isinstance(seen, (ConnectionError, TimeoutError)) or modules & libraries:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _root_cause(error: BaseException) -> str:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join(str(error).split()) or type(error).__name__
