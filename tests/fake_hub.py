"""A hub on this machine: serves the files of a folder as the Hugging Face hub serves those of a repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class FakeHub:
    """What is served, and what was asked for.

    Attributes:
        repositories: Folders by ``OWNER/NAME``.
        gated: Names of repositories whose terms nobody has accepted.
        status: An HTTP status that everything is answered with.
        cut: Bytes after which a file's connection is closed, by name; once each.
        sent: (name, first byte) of each download.
        tokens: What each request had for authorization.
        url: Where it listens.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.status: int | None = None
        self.cut: dict[str, int] = {}
        self.sent: list[tuple[str, int]] = []
        self.tokens: list[str | None] = []
        self.url = ""


def _metadata(file: Path) -> dict[str, Any]:
    """What the hub says of a file: its size, git's hash of its blob, and, of a large one, its SHA-256."""
    content = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"size": len(content), "blobId": blob}
    if file.suffix == ".safetensors":
        digest = hashlib.sha256(content).hexdigest()
        found |= {"blobId": "0" * 40, "lfs": {"sha256": digest, "size": len(content), "pointerSize": 130}}
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.tokens.append(self.headers["Authorization"])
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.hub.repositories.get(name)
        if self.hub.status is not None:
            self._refuse(self.hub.status, "")
        elif folder is None:
            self._refuse(404, "RepoNotFound")
        elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif path.startswith("api/models/"):
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            siblings = [{"rfilename": file.relative_to(folder).as_posix(), **_metadata(file)} for file in files]
            info = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self._send(json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif name in self.hub.gated:
            self._refuse(403, "GatedRepo")
        else:
            self._send_file(folder, "/".join(rest[2:]))

    def _send_file(self, folder: Path, name: str) -> None:
        content = (folder / name).read_bytes()
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            self.hub.sent.append((name, first))
        cut = self.hub.cut.pop(name, None) if self.command == "GET" else None
        self._send(content[first:], headers, 206 if first else 200, cut)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", {"X-Error-Code": code, "Content-Type": "application/json"}, status)


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    """A hub for the time of the context."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
