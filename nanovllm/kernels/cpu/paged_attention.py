"""Attention over the paged cache on the CPU: each cached key and value is read once for all queries that see it.

The work of a step is a list of items (:class:`Items`): some queries, and a stretch of the cache that all of them see
to the end or up to a limit of each query's own. That covers decode (one query), prompts (a tile of queries), long
contexts (several items with the same query) and shared prefixes (queries of several sequences). A task is an item and
a KV head; the query heads that share it are rows of the same products. Softmax is computed along the way (Milakov and
Gimelshein, 2018, https://arxiv.org/abs/1805.02867). Where a query has several items, their results are combined at the
end.
"""

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, types

from nanovllm.kernels.cpu.kv_cache import value_columns
from nanovllm.kernels.cpu.launch import Kernel, as_float, as_integer, integers, new, next_task, num_tasks, thread_number
from nanovllm.kernels.cpu.tiles import (
    COLUMNS,
    MAX_ROWS,
    add_bfloat16_values,
    add_float32_values,
    bfloat16_scores,
    float32_scores,
)
from nanovllm.kernels.cpu.vectors import (
    LANES,
    LOG2_E,
    VECTOR_BYTES,
    as_float32,
    as_int32,
    as_int64,
    as_uint16,
    exp2,
    is_finite,
    largest,
    quickly_narrow,
    rough_exp2,
    write,
)

TILE_ROWS = 64  # most rows of an item: queries times the heads that share a KV head
CHUNK = 128  # keys whose scores exist at a time, a multiple of the columns of a tile
_ITEM_FIELDS = 6
_NO_SCORE = -3.0e38


@dataclass(slots=True)
class Items:
    """The work of a step, as arrays that must live while it runs.

    Args:
        fields: int64 [items, 6]: first line of ``tokens``, number of queries, line of the block tables, first key,
            end of keys, and whether the result is partial (1) or the query's whole answer (0).
        tokens: int32 [lines]: the query's token in the step. Items follow one another without overlap.
        limits: int32 [lines]: how many keys of its sequence the query sees.
        parts: int32 [parts]: lines whose results are partial, those of a token one after another.
        part_bounds: int32 [split tokens + 1]: where each split token's parts begin.
        split_tokens: int32 [split tokens].
    """

    fields: np.ndarray
    tokens: np.ndarray
    limits: np.ndarray
    parts: np.ndarray
    part_bounds: np.ndarray
    split_tokens: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        """All of them, in order."""
        return self.fields, self.tokens, self.limits, self.parts, self.part_bounds, self.split_tokens

    @classmethod
    def room_for(cls, lines: int) -> "Items":
        """Arrays that hold any work of at most so many lines."""
        fields = np.zeros((lines, _ITEM_FIELDS), dtype=np.int64)
        return cls(fields, *(np.zeros(lines + 1, dtype=np.int32) for _ in range(5)))

    def take(self, other: "Items") -> bool:
        """Copy another's numbers to the beginnings of these arrays; False if they have no room for them."""
        if len(other.tokens) > len(self.fields):
            return False
        for mine, theirs in zip(self.arrays(), other.arrays(), strict=True):
            mine[: len(theirs)] = theirs
        return True


class Workspace:
    """Memory that the layers of a step share.

    Args:
        threads: Of torch.
        lines: Lines whose results may be partial.
        heads: Query heads.
        head_dim: Elements of a head.
    """

    def __init__(self, threads: int, lines: int, heads: int, head_dim: int) -> None:
        columns = value_columns(head_dim)
        # By thread: tiles of queries, scores, weights and results, a vector of values, addresses, two numbers a row.
        floats = TILE_ROWS * (head_dim + 2 * CHUNK + columns + 2) + columns * LANES + 4 * CHUNK // LANES
        self.tiles = torch.empty(threads, -(-floats // LANES) * LANES, dtype=torch.float32, device="cpu")
        self.partial_sums = torch.empty(lines, heads, 2, dtype=torch.float32, device="cpu")
        self.partial_outs = torch.empty(lines, heads, head_dim, dtype=torch.float32, device="cpu")


class _Cache(NamedTuple):
    """Where a head's keys and values of a sequence lie; sizes in bytes, addresses as int64."""

    keys: Any  # of the head in block 0
    values: Any
    key_stride: Any  # from one block's to the next one's
    value_stride: Any
    blocks: Any  # the sequence's line of the block tables, int32
    block_size: Any  # tokens
    first: Any  # the first key that the item sees
    last: Any


class _Tiles(NamedTuple):
    """A thread's own memory, as addresses. Rows are queries times the heads that share a KV head."""

    queries: Any  # [TILE_ROWS, head_dim]
    scores: Any  # [TILE_ROWS, CHUNK], float32
    weights: Any  # [TILE_ROWS, CHUNK], of the cache's dtype
    totals: Any  # [TILE_ROWS, columns], float32
    tail: Any  # values of a vector of tokens
    segments: Any  # two int64 for each vector of tokens in a chunk
    peaks: Any  # [TILE_ROWS], float32: the largest scaled score so far
    sums: Any  # [TILE_ROWS], float32: of the weights relative to it


@njit(inline="always")
def _keys_at(cache: Any, key: Any) -> Any:
    """Address of the keys of the vector of tokens that ``key`` begins."""
    block = types.int64(as_int32(cache.blocks)[key // cache.block_size])
    return cache.keys + block * cache.key_stride + key % cache.block_size * 4


@njit(inline="always")
def _keys_ahead(cache: Any, key: Any, columns: Any, pair: Any) -> Any:
    """Address of as many bytes of keys as the values of a vector of tokens have, of the block that ``key`` is in."""
    block = types.int64(as_int32(cache.blocks)[key // cache.block_size])
    return cache.keys + block * cache.key_stride + key % cache.block_size // LANES * (LANES // pair * columns * 4)


@njit(inline="always")
def _values_at(cache: Any, key: Any, columns: Any, pair: Any) -> Any:
    """Address of the values of the vector of tokens that ``key`` begins."""
    block = types.int64(as_int32(cache.blocks)[key // cache.block_size])
    return cache.values + block * cache.value_stride + key % cache.block_size // pair * columns * 4


@njit(inline="always")
def _score(cache: Any, tiles: Any, rows: Any, chunk: Any, stop: Any, head_dim: Any, columns: Any, is_half: Any) -> None:
    """Scores of all rows for the keys from ``chunk`` to ``stop``, two vectors of tokens at a time."""
    pair, width = (2, 2) if is_half else (1, 4)
    key_row, depth, q_row, score_row = cache.block_size * 4, head_dim // pair, head_dim * width, CHUNK * 4
    for key in range(chunk, stop, COLUMNS):
        left, ahead = _keys_at(cache, key), _values_at(cache, key, columns, pair)
        beside = apart = 0
        if key + LANES < stop:
            beside = _keys_at(cache, key + LANES) - left
            apart = _values_at(cache, key + LANES, columns, pair) - ahead
        for row in range(0, rows, MAX_ROWS):
            count = min(MAX_ROWS, rows - row)
            a, c = tiles.queries + row * q_row, tiles.scores + row * score_row + (key - chunk) * 4
            if is_half:
                bfloat16_scores(count, a, q_row, left, key_row, beside, depth, c, score_row, ahead, apart)
            else:
                float32_scores(count, a, q_row, left, key_row, beside, depth, c, score_row, ahead, apart)


@njit(inline="always")
def _weigh(tiles: Any, row: Any, visible: Any, padded: Any, columns: Any, scale: Any, is_half: Any) -> None:
    """Turn a row's scores into weights, 0 beyond the ``visible``, and bring its sums to the same scale."""
    scores, totals = as_float32(tiles.scores + row * CHUNK * 4), as_float32(tiles.totals + row * columns * 4)
    peaks, sums = as_float32(tiles.peaks), as_float32(tiles.sums)
    weights = tiles.weights + row * CHUNK * (2 if is_half else 4)
    for i in range(max(visible, 0), padded):
        write(weights, i, is_half, types.float32(0))
    if visible <= 0:
        return
    peak = largest(tiles.scores + row * CHUNK * 4, visible) * scale
    if peaks[row] > peak:
        peak = peaks[row]
    total = types.float32(0)
    for i in range(visible):
        relative = scores[i] * scale - peak
        weight = rough_exp2(relative) if is_half else exp2(relative)
        total += weight
        if is_half:
            as_uint16(weights)[i] = quickly_narrow(weight)
        else:
            as_float32(weights)[i] = weight
    shrink = exp2(peaks[row] - peak)
    sums[row] = sums[row] * shrink + total if is_finite(peak) else types.float32(np.nan)
    peaks[row] = peak
    if shrink != types.float32(1):
        for d in range(columns):
            totals[d] *= shrink


@njit(inline="always")
def _add_values(
    cache: Any, upcoming: Any, tiles: Any, rows: Any, chunk: Any, stop: Any, end: Any, columns: Any, is_half: Any
) -> None:
    """Add the weighted values of the tokens from ``chunk`` to ``stop`` to all rows.

    Meanwhile the keys of the next chunk are asked for, or those that ``upcoming`` begins with.
    """
    pair, width = (2, 2) if is_half else (1, 4)
    weight_row, total_row, depth = CHUNK * width, columns * 4, LANES // pair
    segments, table = (stop - chunk + LANES - 1) // LANES, as_int64(tiles.segments)
    for segment in range(segments):
        key = chunk + segment * LANES
        source = _values_at(cache, key, columns, pair)
        if stop - key < LANES:  # what lies behind is anybody's, NaN perhaps, which 0 times would spoil the sum
            _copy_tail(source, tiles.tail, stop - key, columns, pair)
            source = tiles.tail
        table[2 * segment] = source
        if key + CHUNK < end:
            table[2 * segment + 1] = _keys_ahead(cache, key + CHUNK, columns, pair)
        else:
            table[2 * segment + 1] = _keys_ahead(
                upcoming, min(upcoming.first + key - chunk, upcoming.last), columns, pair
            )
    for column in range(0, columns, COLUMNS):
        for row in range(0, rows, MAX_ROWS):
            count = min(MAX_ROWS, rows - row)
            a, c = tiles.weights + row * weight_row, tiles.totals + row * total_row + column * 4
            b, offset = tiles.segments, column * 4
            if is_half:
                add_bfloat16_values(
                    count, a, weight_row, b, total_row, VECTOR_BYTES, depth, c, total_row, offset, segments
                )
            else:
                add_float32_values(
                    count, a, weight_row, b, total_row, VECTOR_BYTES, depth, c, total_row, offset, segments
                )


@njit(inline="always")
def _copy_tail(source: Any, target: Any, length: Any, columns: Any, pair: Any) -> None:
    """Copy the values of ``length`` tokens, and zeros for those after them up to a whole vector."""
    read_from, write_to = as_int32(source), as_int32(target)
    whole = length // pair * columns
    for d in range(whole):
        write_to[d] = read_from[d]
    for d in range(whole, LANES // pair * columns):
        write_to[d] = types.int32(0)
    if length % pair:  # the first of a pair
        for d in range(columns):
            write_to[whole + d] = read_from[whole + d] & types.int32(0xFFFF)


def attention_kernel(is_half: bool) -> Kernel:
    """The kernel for bfloat16 (``is_half``) or float32: compiled apart, for half of the time."""
    with _compiling:  # lest two threads make one each: recordings know theirs by identity
        return _attention_kernel(is_half)


_compiling = threading.Lock()


@cache
def _attention_kernel(is_half: bool) -> Kernel:
    def paged_attention(arguments: Any) -> None:
        (
            q,
            keys,
            values,
            out,
            tables,
            table_width,
            item_fields,
            item_tokens,
            item_limits,
            heads,
            kv_heads,
            head_dim,
            block_size,
            columns,
            sums_of_parts,
            outs_of_parts,
            workspace,
            workspace_bytes,
            threads,
            scale_bits,
        ) = integers(arguments, 20)
        fields, tokens, limits = as_int64(item_fields), as_int32(item_tokens), as_int32(item_limits)
        partial_sums, partial_outs = as_float32(sums_of_parts), as_float32(outs_of_parts)
        scale = as_float(scale_bits)
        group, q_bytes = heads // kv_heads, head_dim * (2 if is_half else 4)
        key_bytes = q_bytes * block_size  # of a block and head
        value_bytes = columns * (2 if is_half else 4) * block_size

        queries = workspace + thread_number(arguments) * workspace_bytes
        all_scores = queries + TILE_ROWS * head_dim * 4
        weights = all_scores + TILE_ROWS * CHUNK * 4
        all_totals = weights + TILE_ROWS * CHUNK * 4
        tail = all_totals + TILE_ROWS * columns * 4
        segments = tail + LANES * columns * 4
        all_peaks = segments + CHUNK // LANES * 16
        tiles = _Tiles(queries, all_scores, weights, all_totals, tail, segments, all_peaks, all_peaks + TILE_ROWS * 4)
        totals, peaks, sums = as_float32(tiles.totals), as_float32(tiles.peaks), as_float32(tiles.sums)

        task = next_task(arguments)
        while task < num_tasks(arguments):
            item, kv_head = task // kv_heads * _ITEM_FIELDS, task % kv_heads
            first, count, line = fields[item], fields[item + 1], fields[item + 2]
            begin, end, is_partial = fields[item + 3], fields[item + 4], fields[item + 5] != 0
            rows = count * group
            here = _Cache(
                keys + kv_head * key_bytes,
                values + kv_head * value_bytes,
                kv_heads * key_bytes,
                kv_heads * value_bytes,
                tables + line * table_width * 4,
                block_size,
                begin,
                end - 1,
            )
            # What this thread takes next, if all take turns: its first keys are asked for while this is finished.
            coming = min(task + threads, num_tasks(arguments) - 1)
            coming_item, coming_head = coming // kv_heads * _ITEM_FIELDS, coming % kv_heads
            upcoming = _Cache(
                keys + coming_head * key_bytes,
                values,
                kv_heads * key_bytes,
                kv_heads * value_bytes,
                tables + fields[coming_item + 2] * table_width * 4,
                block_size,
                fields[coming_item + 3],
                fields[coming_item + 4] - 1,
            )
            for i in range(count):  # the group's heads of a query lie side by side, and so do their rows
                source = as_int32(q + (tokens[first + i] * heads + kv_head * group) * q_bytes)
                target = as_int32(tiles.queries + i * group * q_bytes)
                for d in range(group * q_bytes // 4):
                    target[d] = source[d]
            for i in range(rows):
                peaks[i] = types.float32(_NO_SCORE)
                sums[i] = types.float32(0)
            for i in range(rows * columns):
                totals[i] = types.float32(0)

            for chunk in range(begin, end, CHUNK):
                stop = min(end, chunk + CHUNK)
                _score(here, tiles, rows, chunk, stop, head_dim, columns, is_half)
                padded = (stop - chunk + LANES - 1) // LANES * LANES
                for row in range(rows):
                    visible = min(stop, types.int64(limits[first + row // group])) - chunk
                    _weigh(tiles, row, visible, padded, columns, scale, is_half)
                _add_values(here, upcoming, tiles, rows, chunk, stop, end, columns, is_half)

            for row in range(rows):
                head = kv_head * group + row % group
                if is_partial:
                    place = (first + row // group) * heads + head
                    partial_sums[2 * place] = peaks[row]
                    partial_sums[2 * place + 1] = sums[row]
                    for d in range(head_dim):
                        partial_outs[place * head_dim + d] = totals[row * columns + d]
                else:
                    answer = out + (tokens[first + row // group] * heads + head) * q_bytes
                    share = types.float32(1) / sums[row]
                    for d in range(head_dim):
                        write(answer, d, is_half, totals[row * columns + d] * share)
            task = next_task(arguments)

    # A name each: the cache has a file a name, in which processes that write at once could leave the wrong code.
    paged_attention.__qualname__ += "_bfloat16" if is_half else "_float32"
    return Kernel(paged_attention)


def _combine(arguments: Any) -> None:
    """Add up the partial results of a token, a task a token and head."""
    (
        out,
        token_table,
        bound_table,
        part_table,
        heads,
        head_dim,
        half,
        sums_of_parts,
        outs_of_parts,
        workspace,
        workspace_bytes,
    ) = integers(arguments, 11)
    split_tokens, bounds, parts = as_int32(token_table), as_int32(bound_table), as_int32(part_table)
    partial_sums, partial_outs, is_half = as_float32(sums_of_parts), as_float32(outs_of_parts), half != 0
    memory = workspace + thread_number(arguments) * workspace_bytes
    total = as_float32(memory)
    task = next_task(arguments)
    while task < num_tasks(arguments):
        number_of_token, head = task // heads, task % heads
        peak, weight = types.float32(_NO_SCORE), types.float32(0)
        for d in range(head_dim):
            total[d] = types.float32(0)
        for part in range(bounds[number_of_token], bounds[number_of_token + 1]):
            place = parts[part] * heads + head
            other = partial_sums[2 * place]
            higher = peak if peak > other else other
            shrink, share = exp2(peak - higher), exp2(other - higher)
            peak, weight = higher, weight * shrink + partial_sums[2 * place + 1] * share
            for d in range(head_dim):
                total[d] = total[d] * shrink + partial_outs[place * head_dim + d] * share
        target = out + (split_tokens[number_of_token] * heads + head) * head_dim * (2 if is_half else 4)
        for d in range(head_dim):
            write(target, d, is_half, total[d] / weight)
        task = next_task(arguments)


combine_kernel = Kernel(_combine)


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    items: Items,
    workspace: Workspace,
    scale: float,
) -> torch.Tensor:
    """Attend queries to cached keys and values.

    Args:
        q: [tokens, heads, head_dim], contiguous.
        keys: A layer's, laid out as ``kv_cache`` says.
        values: The same.
        block_tables: int32 [lines, blocks], contiguous.
        items: Which queries see which keys.
        workspace: For as many lines, if there are parts.
        scale: Factor of the scores.

    Returns:
        [tokens, heads, head_dim].
    """
    _, heads, head_dim = q.shape
    kv_heads, block_size = keys.shape[1], keys.shape[3]
    is_half = q.dtype == torch.bfloat16
    out = new(tuple(q.shape), q.dtype)
    attention_kernel(is_half)(
        len(items.fields) * kv_heads,
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        block_tables.data_ptr(),
        block_tables.shape[1],
        items.fields.ctypes.data,
        items.tokens.ctypes.data,
        items.limits.ctypes.data,
        heads,
        kv_heads,
        head_dim,
        block_size,
        value_columns(head_dim),
        workspace.partial_sums.data_ptr(),
        workspace.partial_outs.data_ptr(),
        workspace.tiles.data_ptr(),
        workspace.tiles.stride(0) * 4,
        workspace.tiles.shape[0],
        as_integer(scale * LOG2_E),
    )
    combine_kernel(
        len(items.split_tokens) * heads,
        out.data_ptr(),
        items.split_tokens.ctypes.data,
        items.part_bounds.ctypes.data,
        items.parts.ctypes.data,
        heads,
        head_dim,
        is_half,
        workspace.partial_sums.data_ptr(),
        workspace.partial_outs.data_ptr(),
        workspace.tiles.data_ptr(),
        workspace.tiles.stride(0) * 4,
    )
    return out
