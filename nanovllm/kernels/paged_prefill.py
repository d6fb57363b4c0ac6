"""Causal attention of rows of several queries over the paged cache: prompts, their chunks, and ends of cached prompts.

The step's own keys and values have been stored, so all are read from the cache. The query heads that share a KV head
are rows of one product, as if they were more queries: keys and values are loaded once for all of them. The tiles of
queries are listed on the host, those with the most keys first, since what starts last should be short. (Online
softmax: Milakov and Gimelshein, 2018; the loop is that of Dao, FlashAttention-2, 2023.)
"""

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from nanovllm.kernels import LOG2_E, is_interpreted

# Rows of the list of tiles.
_TOKEN = tl.constexpr(0)
_POSITION = tl.constexpr(1)
_COUNT = tl.constexpr(2)
_ROW = tl.constexpr(3)

# Queries times heads of their group, and keys, of a tile. The keys that a multiprocessor loads for 128 queries take it
# about as long to multiply as the L2 cache to deliver.
QUERY_TILE = 128
KEY_TILE = 64
# Where tiles are to be smaller: a program has 100 KB of shared memory on most GPUs, and 227 KB on data centre ones.
SMALL_KEY_TILE = 32
# The same of float32, which tensor cores do not multiply exactly: products of larger tiles exceed the registers.
EXACT_QUERY_TILE = 32
EXACT_KEY_TILE = 16
NUM_WARPS = 8
NUM_STAGES = 3


@triton.jit
def _look_up(table, position, end, BLOCK_SIZE: tl.constexpr):
    """The blocks of positions; 0 for those at ``end`` and beyond, which the table need not have."""
    return tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0)


@triton.jit
def _weigh(scores, largest, sums, attended):
    """The weights of a tile of scores, relative to the largest so far; what was summed up before is made so too."""
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    return weights, new_largest, sums * shrink + tl.sum(weights, axis=1), attended * shrink[:, None]


@triton.jit(do_not_specialize=["num_tiles", "table_stride"])
def _prefill_kernel(
    q,
    keys,
    values,
    block_tables,
    slots,
    tiles,
    out,
    num_tiles,
    table_stride,
    scale_log2,
    Q_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    kv_head = tl.program_id(0) % (HEADS // GROUP)
    tile = tl.program_id(0) // (HEADS // GROUP)
    token = tl.load(tiles + _TOKEN * num_tiles + tile).to(tl.int64)
    position = tl.load(tiles + _POSITION * num_tiles + tile)
    count = tl.load(tiles + _COUNT * num_tiles + tile)
    slot = tl.load(tiles + _ROW * num_tiles + tile).to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots + slot).to(tl.int64)
    table = block_tables + slot * table_stride
    keys += kv_head * HEAD_STRIDE
    values += kv_head * HEAD_STRIDE

    line = tl.arange(0, QUERY_TILE)  # of the tile: a query's heads are neighbours
    number = line // GROUP
    head = kv_head * GROUP + line % GROUP
    dim = tl.arange(0, PADDED_DIM)
    lane = tl.arange(0, KEY_TILE)
    real = (number < count)[:, None] & (dim < HEAD_DIM)[None, :]
    query_place = (token + number) * Q_STRIDE + head * HEAD_DIM
    query = tl.load(q + query_place[:, None] + dim[None, :], mask=real, other=0.0)

    largest = tl.full([QUERY_TILE], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([QUERY_TILE], dtype=tl.float32)
    attended = tl.zeros([QUERY_TILE, PADDED_DIM], dtype=tl.float32)
    end = position + count
    # All queries see the keys up to the first one's own; whole tiles of those need no masks.
    unmasked = (position + 1) // KEY_TILE * KEY_TILE

    # Blocks are looked up a tile ahead: a look-up that keys wait for in the same round would keep Triton from loading
    # tiles ahead of their use.
    block = _look_up(table, lane, end, BLOCK_SIZE)
    for first in range(0, unmasked, KEY_TILE):
        place = block.to(tl.int64) * BLOCK_STRIDE + (first + lane) % BLOCK_SIZE * TOKEN_STRIDE
        block = _look_up(table, first + KEY_TILE + lane, end, BLOCK_SIZE)
        offset = place[:, None] + dim[None, :]
        mask = tl.broadcast_to((dim < HEAD_DIM)[None, :], (KEY_TILE, PADDED_DIM))
        key = tl.load(keys + offset, mask=mask, other=0.0)
        value = tl.load(values + offset, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        weights, largest, sums, attended = _weigh(scores, largest, sums, attended)
        attended = tl.dot(weights.to(value.dtype), value, attended, input_precision="ieee")
    for first in range(unmasked, end, KEY_TILE):
        position_of_key = first + lane
        seen = position_of_key[None, :] <= position + number[:, None]  # [queries, keys]
        place = block.to(tl.int64) * BLOCK_STRIDE + position_of_key % BLOCK_SIZE * TOKEN_STRIDE
        block = _look_up(table, position_of_key + KEY_TILE, end, BLOCK_SIZE)
        offset = place[:, None] + dim[None, :]
        mask = (position_of_key < end)[:, None] & (dim < HEAD_DIM)[None, :]
        key = tl.load(keys + offset, mask=mask, other=0.0)
        value = tl.load(values + offset, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(seen, scores, float("-inf"))
        weights, largest, sums, attended = _weigh(scores, largest, sums, attended)
        # Weight 0 does not make an infinity harmless: where a value has overflowed, those before it must not get NaN,
        # since their keys and values may be a beginning that others share. Those that see it get NaN, as they should.
        broken = tl.max(tl.where(tl.abs(value.to(tl.float32)) < float("inf"), 0, 1), axis=1) > 0  # [keys]
        weights = tl.where(seen & broken[None, :], float("nan"), weights)
        value = tl.where(broken[:, None], 0.0, value).to(values.dtype.element_ty)
        attended = tl.dot(weights.to(value.dtype), value, attended, input_precision="ieee")

    attended = attended / sums[:, None]
    out_place = (token + number) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    tl.store(out + out_place[:, None] + dim[None, :], attended.to(out.dtype.element_ty), mask=real)


def plan_prefill(
    query_lengths: np.ndarray, context_lengths: np.ndarray, tokens: np.ndarray, rows: np.ndarray, per_tile: int
) -> np.ndarray:
    """List the tiles of queries of a step's prefill rows, for all layers.

    Args:
        query_lengths: [rows]: queries of each row, at least 1.
        context_lengths: [rows]: tokens of each row to attend to, the queries' own included (they come last).
        tokens: [rows]: the first query of each row in the step.
        rows: [rows]: the line of ``slots`` or, if there are none, of ``block_tables`` of each row.
        per_tile: From :func:`queries_per_tile`.

    Returns:
        [4, tiles], int32: each tile's first query in the step, that one's position in its row, the number of queries,
        and the row's line. Tiles with the most keys come first.
    """
    counts = -(-query_lengths // per_tile)
    row = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the tile in its row
    start = number * per_tile
    position = (context_lengths - query_lengths)[row] + start
    count = np.minimum(query_lengths[row] - start, per_tile)
    order = np.argsort(-(position + count), kind="stable")
    columns = np.stack([tokens[row] + start, position, count, rows[row]])[:, order]
    return np.ascontiguousarray(columns, dtype=np.int32)


def queries_per_tile(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Queries that a program of :func:`paged_prefill` computes, with all heads of a KV head."""
    group = num_heads // num_kv_heads
    return _variant(dtype, group, head_dim, large=True)["QUERY_TILE"] // group


def paged_prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor | None,
    tiles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """softmax(q k^T * scale) v of rows of several queries over their contexts in the cache, causal.

    Args:
        q: [tokens, num_heads, head_dim]; a token's heads lie packed, tokens may lie apart.
        keys: [blocks, kv_heads, block_size, head_dim], a layer's, the last dimension packed; ``block_size`` is a power
            of two.
        values: The same, with the same strides.
        block_tables: [lines, blocks], int32 or int64: KV blocks in order; the last dimension is packed.
        slots: [rows], int32 or int64: each row's line of ``block_tables``; None if row i has line i.
        tiles: [4, tiles], int32, packed: :func:`plan_prefill`'s.
        scale: Of the scores.
        out: [tokens, num_heads, head_dim], packed; the tiles' tokens are written.
    """
    num_tiles = tiles.shape[1]
    if num_tiles == 0:
        return
    heads, head_dim = q.shape[1:]
    kv_heads, block_size = keys.shape[1:3]
    group = heads // kv_heads
    _prefill_kernel[(kv_heads * num_tiles,)](
        q,
        keys,
        values,
        block_tables,
        slots,
        tiles,
        out,
        num_tiles,
        block_tables.stride(0),
        scale * LOG2_E,
        Q_STRIDE=q.stride(0),
        BLOCK_STRIDE=keys.stride(0),
        HEAD_STRIDE=keys.stride(1),
        TOKEN_STRIDE=keys.stride(2),
        BLOCK_SIZE=block_size,
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=max(16, triton.next_power_of_2(head_dim)),
        HAS_SLOTS=slots is not None,
        **_variant(q.dtype, group, head_dim, _has_large_shared_memory(q.device)),
    )


def paged_prefill_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor | None,
    tiles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """:func:`paged_prefill` in torch's operators, a tile at a time, in float32 or better."""
    exact = torch.promote_types(q.dtype, torch.float32)
    for token, position, count, row in tiles.t().tolist():
        end = position + count
        table = block_tables[row if slots is None else int(slots[row])]
        blocks = table[: -(-end // keys.shape[2])].long()
        # [kv_heads, context, head_dim], then a copy of each for every query head
        key, value = (x[blocks].transpose(0, 1).flatten(1, 2)[:, :end].to(exact) for x in (keys, values))
        key, value = (x.repeat_interleave(q.shape[1] // keys.shape[1], dim=0) for x in (key, value))
        scores = torch.einsum("qhd,hkd->hqk", q[token : token + count].to(exact), key) * scale
        seen = torch.ones(count, end, dtype=torch.bool, device=q.device).tril(position)
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        out[token : token + count] = torch.einsum("hqk,hkd->qhd", weights, value).to(out.dtype)


@cache
def _has_large_shared_memory(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _variant(dtype: torch.dtype, group: int, head_dim: int, large: bool) -> dict[str, int]:
    """How the kernel is compiled, so that neither registers nor shared memory run out."""
    exact = dtype == torch.float32 and not is_interpreted()  # the interpreter is as slow with small tiles as with large
    wide = head_dim > 128
    query_tile = EXACT_QUERY_TILE if exact else QUERY_TILE
    key_tile = EXACT_KEY_TILE if exact else KEY_TILE if large and not wide else SMALL_KEY_TILE
    return {
        "QUERY_TILE": max(query_tile // 2 if wide else query_tile, triton.next_power_of_2(group)),
        "KEY_TILE": key_tile,
        "num_warps": NUM_WARPS,
        "num_stages": 2 if wide else NUM_STAGES,
    }
