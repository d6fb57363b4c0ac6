"""Lays out a step's attention for the CPU's kernel: which queries go through which stretch of the cache together."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nanovllm.kernels.cpu.paged_attention import CHUNK, TILE_ROWS, Items

# Tokens that sequences have in common from which on they go through them together.
MIN_SHARED_TOKENS = 64
# Tasks a thread at least, if the contexts are long enough to be cut.
TASKS_A_THREAD = 3


class Geometry(NamedTuple):
    """What the layout depends on beside the step.

    Args:
        block_size: Tokens a KV block.
        num_heads: Query heads.
        num_kv_heads: Key-value heads.
        threads: That share the work.
    """

    block_size: int
    num_heads: int
    num_kv_heads: int
    threads: int


class Rows(NamedTuple):
    """The rows of a step, a sequence each.

    Args:
        queries: int64 [rows]: tokens computed in this step.
        contexts: int64 [rows]: tokens to attend to, those included.
        lines: int64 [rows]: their lines of the block tables.
        tables: int32 [lines, blocks].
    """

    queries: np.ndarray
    contexts: np.ndarray
    lines: np.ndarray
    tables: np.ndarray


class _Piece(NamedTuple):
    """An item to be."""

    tokens: np.ndarray
    limits: np.ndarray
    line: int
    begin: int
    end: int


def lay_out(rows: Rows, geometry: Geometry, careful: bool = False) -> Items:
    """The items of a step.

    Args:
        rows: Its rows.
        geometry: See there.
        careful: Whether each query is to go alone, so that none comes near a value that it does not see.
    """
    if _is_plain_decode(rows, geometry):
        return _one_item_a_row(rows)
    block_size = geometry.block_size
    queries_an_item = 1 if careful else TILE_ROWS // (geometry.num_heads // geometry.num_kv_heads)
    first_tokens = np.cumsum(rows.queries) - rows.queries
    starts = np.zeros(len(rows.queries), dtype=np.int64)  # of what each row sees alone
    pieces: list[_Piece] = []
    for members, begin, end in _shared_blocks(rows, block_size):
        starts[members] = end * block_size
        tokens = np.concatenate([np.arange(rows.queries[row]) + first_tokens[row] for row in members])
        line = int(rows.lines[members[0]])
        for some in _cut(tokens, queries_an_item):
            limits = np.full(len(some), end * block_size)
            pieces.append(_Piece(some, limits, line, begin * block_size, end * block_size))
    numbers = zip(*(array.tolist() for array in (rows.queries, rows.contexts, rows.lines, starts)), strict=True)
    for row, (count, context, line, start) in enumerate(numbers):
        tokens = np.arange(first_tokens[row], first_tokens[row] + count)
        limits = np.arange(context - count + 1, context + 1)
        for some, seen in zip(_cut(tokens, queries_an_item), _cut(limits, queries_an_item), strict=True):
            pieces.append(_Piece(some, seen, line, start, int(seen[-1])))
    return _as_items(_split_keys(pieces, geometry))


def _is_plain_decode(rows: Rows, geometry: Geometry) -> bool:
    """Whether there is one query a row, no two rows begin with the same block, and there are tasks for all threads."""
    count = len(rows.queries)
    if rows.queries.max() > 1 or _cuts(count, geometry) > 1:
        return False
    return len(set(rows.tables[rows.lines, 0].tolist())) == count


def _one_item_a_row(rows: Rows) -> Items:
    """The items of a plain decode step, which is most of them: no lists, no sorting."""
    count = len(rows.queries)
    fields = np.zeros((count, 6), dtype=np.int64)
    fields[:, 0] = tokens = np.arange(count, dtype=np.int32)
    fields[:, 1], fields[:, 2], fields[:, 4] = 1, rows.lines, rows.contexts
    none = np.zeros(0, dtype=np.int32)
    return Items(fields, tokens, rows.contexts.astype(np.int32), none, np.zeros(1, dtype=np.int32), none)


def _cuts(pieces: int, geometry: Geometry) -> int:
    """Into how many parts keys are cut, lest some threads have nothing to do."""
    return math.ceil(TASKS_A_THREAD * geometry.threads / (pieces * geometry.num_kv_heads))


def _shared_blocks(rows: Rows, block_size: int) -> Iterator[tuple[list[int], int, int]]:
    """Rows whose tables name the same blocks: (rows, first block, end); all queries of these rows see them."""
    if len(rows.queries) < 2:
        return
    visible = (rows.contexts - rows.queries) // block_size  # blocks before a row's first query
    least = -(-MIN_SHARED_TOKENS // block_size)
    # Rows that are equal up to a block, the block from which on they are to be reported, and that block.
    groups = [(list(range(len(rows.queries))), 0, 0)]
    while groups:
        candidates, reported, begin = groups.pop()
        by_block: dict[int, list[int]] = {}
        for row in candidates:
            if visible[row] >= max(begin + 1, reported + least):
                by_block.setdefault(int(rows.tables[rows.lines[row], begin]), []).append(row)
        for members in by_block.values():
            if len(members) < 2:
                continue
            stretch = rows.tables[rows.lines[members], begin : visible[members].min()]
            differs = (stretch != stretch[0]).any(axis=0)
            end = begin + (int(differs.argmax()) if differs.any() else stretch.shape[1])
            if end - reported >= least:
                yield members, reported, end
                groups.append((members, end, end))
            else:
                groups.append((members, reported, end))


def _split_keys(pieces: list[_Piece], geometry: Geometry) -> list[_Piece]:
    """Cut long stretches of keys where there is too little work to go round."""
    cuts = _cuts(len(pieces), geometry)
    if cuts == 1:
        return pieces
    result = []
    for piece in pieces:
        step = max(1, math.ceil((piece.end - piece.begin) / cuts / CHUNK)) * CHUNK
        for begin in range(piece.begin, piece.end, step):
            result.append(piece._replace(begin=begin, end=min(piece.end, begin + step)))
    return result


def _as_items(pieces: list[_Piece]) -> Items:
    """The arrays that the kernel reads."""
    tokens = np.concatenate([piece.tokens for piece in pieces]).astype(np.int32)
    limits = np.concatenate([piece.limits for piece in pieces]).astype(np.int32)
    counts = np.array([len(piece.tokens) for piece in pieces])
    of_piece = np.repeat(np.arange(len(pieces)), counts)
    partial = np.zeros(len(pieces), dtype=np.int64)
    partial[of_piece[np.bincount(tokens)[tokens] > 1]] = 1
    places = np.array([piece[2:] for piece in pieces])
    fields = np.column_stack([np.cumsum(counts) - counts, counts, places, partial]).astype(np.int64)
    parts = np.nonzero(partial[of_piece])[0]
    parts = parts[np.argsort(tokens[parts], kind="stable")].astype(np.int32)
    split_tokens, part_counts = np.unique(tokens[parts], return_counts=True)
    bounds = np.concatenate([[0], np.cumsum(part_counts)]).astype(np.int32)
    return Items(fields, tokens, limits, parts, bounds, split_tokens.astype(np.int32))


def _cut(array: np.ndarray, length: int) -> Iterator[np.ndarray]:
    for first in range(0, len(array), length):
        yield array[first : first + length]
