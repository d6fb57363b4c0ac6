"""The input of a batch job: its rows, one a line, and what is told of a file that is none."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanovllm.batch_rows import hash_id, line_id, load_line, row_id_of
from nanovllm.utils.text import counted

_ASK = "{'messages': [{'role': 'user', 'content': %s}]%s}"
_TEXT = (
    "import json, sys; [print(json.dumps("
    + _ASK % ("line.strip()", "")
    + ")) for line in open(sys.argv[1], encoding='utf-8-sig') if line.strip()]"
)
_TABLE = (
    "import csv, json, sys; [print(json.dumps("
    + _ASK % ("row.pop('prompt')", ", 'metadata': row")
    + ")) for row in csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''), delimiter=%s)]"
)
_ARRAY = "import json, sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1], encoding='utf-8-sig'))]"
# What Python makes JSONL of it, by the end of the name: what it is, and the program.
_TABLES = {
    ".csv": ("of a CSV file with a column 'prompt'", _TABLE % "','"),
    ".tsv": ("of a TSV file with a column 'prompt'", _TABLE % "chr(9)"),
}


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The rows of the input with their line numbers; blank lines are none.

    Raises:
        ValueError: The file is in UTF-16 or UTF-32.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{path} is in UTF-16 or UTF-32; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()
            if line:
                yield number, line


def check_rows(path: Path) -> int:
    """Number of rows.

    Raises:
        ValueError: An id stands on two lines, which it names; or this is no JSONL: every row would become an error.
    """
    num_objects, first_line = 0, b""

    def ids() -> Iterator[tuple[int, bytes]]:
        nonlocal num_objects, first_line
        for number, line in lines(path):
            first_line = first_line or line
            try:
                record = load_line(line)
                num_objects += isinstance(record, dict)
                row_id = row_id_of(record, number)
            except (RecursionError, TypeError, ValueError):
                row_id = line_id(number)
            yield number, hash_id(row_id)

    digests = bytearray()
    for _, digest in ids():
        digests += digest
    # The last line of an array, or an object within one, may look like a row.
    if first_line and (not num_objects or first_line.startswith(b"[") or first_line == b"{"):
        raise ValueError(_no_rows(path, first_line))
    found = np.sort(np.frombuffer(digests, "S16"))
    repeated = found[1:][found[1:] == found[:-1]]
    if len(repeated):
        first, second = [n for n, digest in ids() if digest.rstrip(b"\0") == bytes(repeated[0])][:2]
        more = f" ({counted(len(repeated) - 1, 'more row')} repeat an id)" if len(repeated) > 1 else ""
        raise ValueError(
            f"lines {first} and {second} of {path} have the same id{more}; give each row an id of its own, or none"
        )
    return len(found)


def _no_rows(path: Path, first_line: bytes) -> str:
    """Why a file is no input, and what makes one of it; ``first_line`` is the first that is not blank."""
    wanted = 'a row is an object on a line of its own, as {"prompt": "..."} or {"messages": [...]}'
    try:
        is_text = b"\0" not in first_line and bool(first_line.decode())
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        return f"{path} is not JSONL but binary, or compressed; {wanted}"
    if first_line == b"{":
        return f"{path} is not JSONL: its objects are spread over several lines; {wanted}: json.dumps writes one so"
    if first_line.startswith(b"["):
        what, program = "of an array", _ARRAY
    else:
        what, program = _TABLES.get(path.suffix.lower(), ("of text with a question a line", _TEXT))
    target = path.with_suffix(".jsonl")
    if target == path:
        target = path.with_name(f"{path.stem}-rows.jsonl")
    return f'{path} is not JSONL; {wanted}. This makes it {what}: python -c "{program}" "{path}" > "{target}"'
