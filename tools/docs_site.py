"""What the documentation site needs besides the settings of mkdocs.yml.

In the repository links lead from file to file. The site has pages besides those in docs/, under other names
(:data:`PAGES`), and no sources: here links are rewritten to what the site has, and a link to anything else that is in
the repository becomes its text. A page that would load something from the network is a warning, hence with
``mkdocs build --strict`` an error.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

logger = logging.getLogger("mkdocs.docs_site")  # below mkdocs' own, which counts the warnings

ROOT = Path(__file__).resolve().parent.parent
# Files outside docs/ that the site has, and their names there.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/README.md": "results.md",
    "benchmarks/results/cpu_zen5_2core_peers.png": "pictures/cpu_zen5_2core_peers.png",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$)", re.M | re.S)
_LOADED = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*?\s(?:src|href)=["']?((?:https?:)?//[^"'\s>]*)""")
_ROLE = re.compile(r":(?:meth|class|func|mod|data|attr):`([^`]+)`")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite a page's links."""
    return rewritten_links(markdown, page.file.src_uri)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warn of what a page would load from elsewhere."""
    for address in _LOADED.findall(output):
        logger.warning("%s would load %s", page.file.src_uri, address)
    return output


def rewritten_links(markdown: str, uri: str) -> str:
    """The text of the page ``uri`` with links to what the site has; code is left as it is."""
    pieces = _CODE.split(markdown)
    pieces[::2] = [_LINK.sub(lambda link: _rewritten(link, uri), piece) for piece in pieces[::2]]
    return "".join(pieces)


def _rewritten(link: re.Match[str], uri: str) -> str:
    """A link of the page ``uri``, as the site has it."""
    picture, text, target, anchor = link.groups(default="")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_path_of(uri)), target))
    if ":" in target or not (ROOT / path).exists():
        return link.group()  # elsewhere, or nowhere, which mkdocs says itself
    if path == "README.md":
        path = "docs/index.md"
    if path not in PAGES and not path.startswith("docs/"):
        return text
    found = PAGES.get(path, path.removeprefix("docs/"))
    return f"{picture}[{text}]({posixpath.relpath(found, posixpath.dirname(uri) or '.')}{anchor})"


def _path_of(uri: str) -> str:
    """A page's file in the repository."""
    return next((path for path, name in PAGES.items() if name == uri), f"docs/{uri}")


class PlainRoles(griffe.Extension):
    """Docstrings name functions and classes by Sphinx's roles; the site shows what they name as code."""

    def on_instance(self, *, obj: griffe.Object, **arguments: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: f"`{role[1].lstrip('~')}`", obj.docstring.value)
