"""The work of a decode step: its rows' contexts, cut into items of about equal length.

A step of few rows, or of rows of very different length, would leave most of the GPU idle if a row were one piece of
work. So a planning kernel, run once a step, cuts the contexts into items: enough of them to fill the device, and no
more, since rows of several items leave partial results that have to be combined (after Dao et al., Flash-Decoding,
2023). The host knows nothing but the number of rows: it launches as many programs as that allows for, and they find
their items on the device. That makes a step the same from the host's side whatever it computes, so CUDA graphs can
capture it.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

# Tokens that the length of an item is a multiple of: those of a tile of ``paged_decode``.
TILE = 32
# Programs of a multiprocessor that little work is cut into items for, which then all run at once. (Four fit; an H200
# was no faster with items for as many.)
RESIDENT = 2
# Tokens of an item where there is more work: so many that its start, some loads that wait for each other, and its end,
# where partial results are combined, are a small part of its time; and so few that the last items end at about the same
# time. Of 256 contexts of 600 on average, in blocks of 16, an H200 reads 2.8 TB/s in items of 256, 3.8 in such of 1024.
CHUNK = 1024
# Fewest tokens of an item.
MIN_CHUNK = 64
# Most items times heads for a multiprocessor, beside one a row: it bounds the memory that partial results take.
ITEMS_PER_SM = 48

# Rows of DecodeWork.items.
TOKEN = tl.constexpr(0)
SLOT = tl.constexpr(1)
START = tl.constexpr(2)
END = tl.constexpr(3)
FIRST = tl.constexpr(4)
PARTS = tl.constexpr(5)
FIELDS = 6


@triton.jit(do_not_specialize=["rows", "capacity", "wave_items", "most_items"])
def _plan_kernel(
    context_lengths,
    slots,
    tokens,
    items,
    first_items,
    arrivals,
    rows,
    capacity,
    wave_items,
    most_items,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    for first in range(0, capacity * KV_HEADS, 1024):
        place = first + tl.arange(0, 1024)
        tl.store(arrivals + place, tl.zeros([1024], dtype=tl.int32), mask=place < capacity * KV_HEADS)
    lane = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS], dtype=tl.int64)
    for first in range(0, rows, ROWS):
        row = first + lane
        sums += tl.maximum(tl.load(context_lengths + row, mask=row < rows, other=0), 0).to(tl.int64)
    total = tl.sum(sums, axis=0)
    wanted = tl.minimum(tl.maximum(tl.cdiv(total, wave_items), MIN_CHUNK), CHUNK)
    wanted = tl.maximum(tl.cdiv(total, most_items), wanted)
    chunk = (tl.cdiv(wanted, TILE) * TILE).to(tl.int32)

    taken = 0
    for first in range(0, rows, ROWS):
        row = first + lane
        inside = row < rows
        context = tl.maximum(tl.load(context_lengths + row, mask=inside, other=0), 0)
        slot = tl.load(slots + row, mask=inside, other=0).to(tl.int32)
        token = row
        if HAS_TOKENS:
            token = tl.load(tokens + row, mask=inside, other=0).to(tl.int32)
        # A row's items are of equal length, rather than full ones and a rest.
        most = tl.maximum(tl.cdiv(context, chunk), 1)
        length = tl.maximum(tl.cdiv(tl.cdiv(context, most), TILE) * TILE, TILE)
        parts = tl.maximum(tl.cdiv(context, length), 1)  # a row without a context gets zeros
        before = taken + tl.cumsum(parts, 0) - parts
        tl.store(first_items + row, before, mask=inside)
        for first_part in range(0, tl.max(parts, axis=0), WIDTH):
            part = first_part + tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
            item = before[:, None] + part  # [ROWS, WIDTH]
            start = part * length[:, None]
            end = tl.minimum(start + length[:, None], context[:, None])
            mask = (part < parts[:, None]) & (item < capacity) & inside[:, None]
            tl.store(items + TOKEN * capacity + item, tl.broadcast_to(token[:, None], (ROWS, WIDTH)), mask=mask)
            tl.store(items + SLOT * capacity + item, tl.broadcast_to(slot[:, None], (ROWS, WIDTH)), mask=mask)
            tl.store(items + START * capacity + item, start, mask=mask)
            tl.store(items + END * capacity + item, end, mask=mask)
            tl.store(items + FIRST * capacity + item, tl.broadcast_to(before[:, None], (ROWS, WIDTH)), mask=mask)
            tl.store(items + PARTS * capacity + item, tl.broadcast_to(parts[:, None], (ROWS, WIDTH)), mask=mask)
        taken += tl.sum(tl.where(inside, parts, 0), axis=0)
    tl.store(first_items + rows, taken)


@triton.jit
def load_item(items, capacity, item, num_items, CACHE: tl.constexpr):
    """What ``DecodeWork.items`` says of an item; nothing of use if it is not one of the first ``num_items``."""
    inside = item < num_items
    token = tl.load(items + TOKEN * capacity + item, mask=inside, other=0, cache_modifier=CACHE).to(tl.int64)
    slot = tl.load(items + SLOT * capacity + item, mask=inside, other=0, cache_modifier=CACHE).to(tl.int64)
    start = tl.load(items + START * capacity + item, mask=inside, other=0, cache_modifier=CACHE)
    end = tl.load(items + END * capacity + item, mask=inside, other=0, cache_modifier=CACHE)
    first_item = tl.load(items + FIRST * capacity + item, mask=inside, other=0, cache_modifier=CACHE).to(tl.int64)
    parts = tl.load(items + PARTS * capacity + item, mask=inside, other=0, cache_modifier=CACHE)
    return token, slot, start, end, first_item, parts


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # interpreted: enough that work is split


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """What the rows of a step attend to, cut into items; and room for their partial results, which layers share.

    Args:
        rows: Rows of the step.
        items: [6, capacity], int32: each item's token of the step, line of the block tables, first position, end, the
            first item of its row, and how many the row has; there are as many as ``first_items`` ends with.
        first_items: [rows + 1], int32: each row's first item; row i has those up to the next row's.
        tokens: [rows], int32: each row's token in the step; None if row i is token i.
        partial_out: [capacity, num_heads, head_dim], float32.
        partial_lse: [capacity, num_heads], float32: binary logarithm of the sum of the unscaled weights.
        arrivals: [capacity, num_kv_heads], int32: at a row's first item, how many of its items are done; zeros between
            the layers.
    """

    rows: int
    items: torch.Tensor
    first_items: torch.Tensor
    tokens: torch.Tensor | None
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    arrivals: torch.Tensor


def plan_decode(
    context_lengths: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor | None,
    max_context: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    item_tokens: int | None = None,
) -> DecodeWork:
    """Cut the contexts of a step's decode rows into items of about equal length, for all layers.

    Args:
        context_lengths: [rows], int32: tokens to attend to; 0 for a row that is none.
        slots: [rows], int32 or int64: each row's line of the block tables.
        tokens: [rows], int32: each row's token in the step; None if row i is token i.
        max_context: No context is longer.
        num_heads: Query heads.
        num_kv_heads: Key-value heads.
        head_dim: Elements of a head.
        item_tokens: Of all items but the last of a row, whatever work there is; a multiple of ``TILE``.
    """
    rows, device = context_lengths.shape[0], context_lengths.device
    processors = multiprocessors(device)
    if item_tokens is None:
        shortest, longest, most = MIN_CHUNK, CHUNK, max(1, processors * ITEMS_PER_SM // num_kv_heads)
    else:
        shortest, longest, most = item_tokens, item_tokens, rows * max(1, -(-max_context // item_tokens))
    # Rounding up adds at most an item a row, and each row has one.
    capacity = max(1, min(most + rows, rows * max(1, -(-max_context // shortest))))
    work = DecodeWork(
        rows=rows,
        items=torch.empty(FIELDS, capacity, dtype=torch.int32, device=device),
        first_items=torch.empty(rows + 1, dtype=torch.int32, device=device),
        tokens=tokens,
        partial_out=torch.empty(capacity, num_heads, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(capacity, num_heads, dtype=torch.float32, device=device),
        arrivals=torch.empty(capacity, num_kv_heads, dtype=torch.int32, device=device),
    )
    if rows > 0:
        few = rows <= 64
        # Not launched to overlap, and letting nothing start: ``decode_few_rows`` reads the plan without waiting.
        _plan_kernel[(1,)](
            context_lengths,
            slots,
            tokens,
            work.items,
            work.first_items,
            work.arrivals,
            rows,
            capacity,
            max(1, processors * RESIDENT // num_kv_heads),
            most,
            TILE=TILE if item_tokens is None else item_tokens,
            MIN_CHUNK=shortest,
            CHUNK=longest,
            HAS_TOKENS=tokens is not None,
            KV_HEADS=num_kv_heads,
            ROWS=64 if few else 1024,
            WIDTH=16 if few else 2,
            num_warps=4 if few else 8,
        )
    return work
