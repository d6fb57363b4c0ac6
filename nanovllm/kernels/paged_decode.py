"""Attention of one query a row over the paged cache, the work split evenly whatever the context lengths are.

A step of few rows, or of rows of very different length, would leave most of the GPU idle if a row were one piece of
work. So a planning kernel, run once a step, cuts the contexts into items of about equal length: enough of them to fill
the device, and no more, since rows of several items leave partial results that the last program to end has to combine
(after Dao et al., Flash-Decoding, 2023). The host knows nothing but the number of rows: it launches as many programs as
that allows for, and they find their items on the device. That makes a step the same from the host's side whatever it
computes, so CUDA graphs can capture it.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from nanovllm.kernels import is_interpreted
from nanovllm.kernels.dependent_launch import launch_options, let_next_kernel_start, wait_for_previous_kernel

# Tokens of keys and values loaded at a time.
TILE = 32
# The same of float32, which tensor cores do not multiply exactly: products of larger tiles exceed the registers.
EXACT_TILE = 16
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
# Programs launched for a multiprocessor, beside one a row and head; each takes every so manieth item. Those that find
# none cost time as well: where there is little work, they are the most.
PROGRAMS_PER_SM = 4
NUM_WARPS = 4
NUM_STAGES = 3
# Partial results of a head that are combined at a time.
REDUCE_TILE = 32

# Rows of DecodeWork.items.
_TOKEN = tl.constexpr(0)
_SLOT = tl.constexpr(1)
_START = tl.constexpr(2)
_END = tl.constexpr(3)
_FIRST = tl.constexpr(4)
_PARTS = tl.constexpr(5)
_FIELDS = 6

_ANY_CACHE = tl.constexpr("")

LOG2_E = 1.4426950408889634


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
            tl.store(items + _TOKEN * capacity + item, tl.broadcast_to(token[:, None], (ROWS, WIDTH)), mask=mask)
            tl.store(items + _SLOT * capacity + item, tl.broadcast_to(slot[:, None], (ROWS, WIDTH)), mask=mask)
            tl.store(items + _START * capacity + item, start, mask=mask)
            tl.store(items + _END * capacity + item, end, mask=mask)
            tl.store(items + _FIRST * capacity + item, tl.broadcast_to(before[:, None], (ROWS, WIDTH)), mask=mask)
            tl.store(items + _PARTS * capacity + item, tl.broadcast_to(parts[:, None], (ROWS, WIDTH)), mask=mask)
        taken += tl.sum(tl.where(inside, parts, 0), axis=0)
    tl.store(first_items + rows, taken)


@triton.jit
def load_item(items, capacity, item, num_items, CACHE: tl.constexpr):
    """What ``DecodeWork.items`` says of an item; nothing of use if it is not one of the first ``num_items``."""
    inside = item < num_items
    token = tl.load(items + _TOKEN * capacity + item, mask=inside, other=0, cache_modifier=CACHE).to(tl.int64)
    slot = tl.load(items + _SLOT * capacity + item, mask=inside, other=0, cache_modifier=CACHE).to(tl.int64)
    start = tl.load(items + _START * capacity + item, mask=inside, other=0, cache_modifier=CACHE)
    end = tl.load(items + _END * capacity + item, mask=inside, other=0, cache_modifier=CACHE)
    first_item = tl.load(items + _FIRST * capacity + item, mask=inside, other=0, cache_modifier=CACHE).to(tl.int64)
    parts = tl.load(items + _PARTS * capacity + item, mask=inside, other=0, cache_modifier=CACHE)
    return token, slot, start, end, first_item, parts


@triton.jit
def combine(
    partial_out,
    partial_lse,
    first,
    parts,
    head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    dim,
    TILE: tl.constexpr,
):
    """What a head attends to, float32 [dim], from the results of the ``parts`` items that begin with ``first``."""
    largest = float("-inf")
    total = 0.0
    attended = tl.zeros(dim.shape, dtype=tl.float32)
    for first_part in range(0, parts, TILE):
        part = first_part + tl.arange(0, TILE)
        inside = part < parts
        place = (first + part) * HEADS + head
        # From the second-level cache: other multiprocessors have written them.
        lse = tl.load(partial_lse + place, mask=inside, other=float("-inf"), cache_modifier=".cg")
        partial = tl.load(
            partial_out + place[:, None] * HEAD_DIM + dim[None, :],
            mask=inside[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_largest = tl.maximum(largest, tl.max(lse, axis=0))
        weights = tl.exp2(lse - new_largest)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=0)
        attended = attended * shrink + tl.sum(partial * weights[:, None], axis=0)
        largest = new_largest
    return attended / total


@triton.jit(do_not_specialize=["rows", "capacity", "table_stride"])
def _decode_kernel(
    q,
    keys,
    values,
    block_tables,
    items,
    first_items,
    out,
    partial_out,
    partial_lse,
    arrivals,
    rows,
    capacity,
    table_stride,
    scale_log2,
    Q_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    REDUCE_TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_kernel_start(OVERLAPS)
    wait_for_previous_kernel(OVERLAPS)
    # Everything is transposed, [tokens, queries]: tokens fill the rows of a product, the few queries of a group would
    # leave most of them empty.
    dim = tl.arange(0, PADDED_DIM)
    lane = tl.arange(0, TILE)
    number = tl.arange(0, PADDED_GROUP)
    real_dim = dim < HEAD_DIM
    real = (number < GROUP)[None, :] & real_dim[:, None]
    whole: tl.constexpr = BLOCK_SIZE % TILE == 0  # a tile lies in one block
    num_items = tl.load(first_items + rows)

    # Heads of an item are neighbours, so that they run at the same time: they are neighbours in each block too.
    for index in range(tl.program_id(0), num_items * KV_HEADS, tl.num_programs(0)):
        item = index // KV_HEADS
        kv_head = index % KV_HEADS
        token, slot, start, end, first_item, parts = load_item(items, capacity, item, num_items, _ANY_CACHE)
        head = kv_head * GROUP + number
        inside = head[None, :] * HEAD_DIM + dim[:, None]
        query = tl.load(q + token * Q_STRIDE + inside, mask=real, other=0.0)  # [dim, queries]
        table = block_tables + slot * table_stride

        largest = tl.full([PADDED_GROUP], float("-inf"), dtype=tl.float32)
        sums = tl.zeros([TILE, PADDED_GROUP], dtype=tl.float32)  # of weights, added up over the tokens at the end
        attended = tl.zeros([PADDED_DIM, PADDED_GROUP], dtype=tl.float32)
        # Blocks are looked up a tile ahead: a look-up that keys wait for in the same round would keep Triton from
        # loading tiles ahead of their use.
        if whole:
            block = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0)
        else:
            block = tl.load(table + (start + lane) // BLOCK_SIZE, mask=start + lane < end, other=0)
        for first in range(start, end, TILE):
            position = first + lane
            # What lies beyond the context is not read: weight 0 would not make it harmless, 0 times infinity is NaN.
            seen = position < end
            place = block.to(tl.int64) * BLOCK_STRIDE + (position % BLOCK_SIZE) * TOKEN_STRIDE
            if whole:
                block = tl.load(table + (first + TILE) // BLOCK_SIZE, mask=first + TILE < end, other=0)
            else:
                block = tl.load(table + (position + TILE) // BLOCK_SIZE, mask=position + TILE < end, other=0)
            offset = (place + kv_head * HEAD_STRIDE)[:, None] + dim[None, :]
            mask = seen[:, None] & real_dim[None, :]
            key = tl.load(keys + offset, mask=mask, other=0.0)  # [tokens, dim]
            value = tl.load(values + offset, mask=mask, other=0.0)
            scores = tl.dot(key, query, input_precision="ieee") * scale_log2
            scores = tl.where(seen[:, None], scores, float("-inf"))  # [tokens, queries]
            new_largest = tl.maximum(largest, tl.max(scores, axis=0))
            weights = tl.exp2(scores - new_largest[None, :])
            shrink = tl.exp2(largest - new_largest)
            sums = sums * shrink[None, :] + weights
            attended *= shrink[None, :]
            attended = tl.dot(tl.trans(value), weights.to(value.dtype), attended, input_precision="ieee")
            largest = new_largest

        total = tl.sum(sums, axis=0)
        attended = attended / tl.where(end > start, total, 1.0)[None, :]
        line = out + token * (KV_HEADS * GROUP * HEAD_DIM)
        if parts == 1:
            tl.store(line + inside, attended.to(out.dtype.element_ty), mask=real)
        else:
            wide = item.to(tl.int64) * (KV_HEADS * GROUP)
            tl.store(partial_out + wide * HEAD_DIM + inside, attended, mask=real)
            tl.store(partial_lse + wide + head, largest + tl.log2(total), mask=number < GROUP)
            tl.debug_barrier()  # the whole program has stored, before any of it says so
            arrival = arrivals + first_item * KV_HEADS + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == parts - 1:  # the last one: all others are there
                tl.store(arrival, 0)  # for the next layer
                for member in range(GROUP):
                    own = kv_head * GROUP + member
                    combined = combine(
                        partial_out, partial_lse, first_item, parts, own, KV_HEADS * GROUP, HEAD_DIM, dim, REDUCE_TILE
                    )
                    tl.store(line + own * HEAD_DIM + dim, combined.to(out.dtype.element_ty), mask=real_dim)


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
        items=torch.empty(_FIELDS, capacity, dtype=torch.int32, device=device),
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


def paged_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    work: DecodeWork,
    scale: float,
    out: torch.Tensor,
) -> None:
    """softmax(q k^T * scale) v of one query a row over its context in the cache.

    Args:
        q: [tokens, num_heads, head_dim]; a token's heads lie packed, tokens may lie apart.
        keys: [blocks, kv_heads, block_size, head_dim], a layer's, the last dimension packed; ``block_size`` is a power
            of two.
        values: The same, with the same strides.
        block_tables: [slots, blocks], int32 or int64: KV blocks in order; the last dimension is packed.
        work: The rows, from :func:`plan_decode`.
        scale: Of the scores.
        out: [tokens, num_heads, head_dim], packed; the rows' tokens are written, zeros for those without a context.
    """
    if work.rows == 0:
        return
    heads, head_dim = q.shape[1:]
    kv_heads, block_size = keys.shape[1:3]
    capacity, group = work.items.shape[1], heads // kv_heads
    padded_group = max(16, triton.next_power_of_2(group))
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    programs = min(capacity * kv_heads, multiprocessors(q.device) * PROGRAMS_PER_SM + work.rows * kv_heads)
    _decode_kernel[(programs,)](
        q,
        keys,
        values,
        block_tables,
        work.items,
        work.first_items,
        out,
        work.partial_out,
        work.partial_lse,
        work.arrivals,
        work.rows,
        capacity,
        block_tables.stride(0),
        scale * LOG2_E,
        Q_STRIDE=q.stride(0),
        BLOCK_STRIDE=keys.stride(0),
        HEAD_STRIDE=keys.stride(1),
        TOKEN_STRIDE=keys.stride(2),
        BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_GROUP=padded_group,
        PADDED_DIM=padded_dim,
        REDUCE_TILE=REDUCE_TILE,
        **_variant(q.dtype, padded_group, padded_dim),
        **launch_options(q.device),
    )


def paged_decode_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    work: DecodeWork,
    scale: float,
    out: torch.Tensor,
) -> None:
    """:func:`paged_decode` in torch's operators, a row at a time, in float32 or better."""
    exact = torch.promote_types(q.dtype, torch.float32)
    firsts = work.first_items.tolist()
    for row in range(work.rows):
        token = row if work.tokens is None else int(work.tokens[row])
        slot, end = work.items[_SLOT.value, firsts[row]], int(work.items[_END.value, firsts[row + 1] - 1])
        if end == 0:
            out[token] = 0
            continue
        blocks = block_tables[slot, : -(-end // keys.shape[2])].long()
        # [kv_heads, context, head_dim], then a copy of each for every query head
        key, value = (x[blocks].transpose(0, 1).flatten(1, 2)[:, :end].to(exact) for x in (keys, values))
        key, value = (x.repeat_interleave(q.shape[1] // keys.shape[1], dim=0) for x in (key, value))
        weights = torch.softmax(torch.einsum("hd,hkd->hk", q[token].to(exact), key) * scale, dim=-1)
        out[token] = torch.einsum("hk,hkd->hd", weights, value).to(out.dtype)


def _variant(dtype: torch.dtype, padded_group: int, padded_dim: int) -> dict[str, int]:
    """How the kernel is compiled, so that neither registers nor shared memory run out."""
    if dtype == torch.float32 and not is_interpreted():  # which is as slow with small tiles as with large
        return {"TILE": EXACT_TILE, "num_warps": 4 if padded_dim <= 128 else 8, "num_stages": 3}
    return {"TILE": TILE, "num_warps": NUM_WARPS if padded_group < 64 else 8, "num_stages": NUM_STAGES}


def compile_cases() -> list[dict[str, Any]]:
    """Variants worth compiling ahead of time."""
    cases: list[dict[str, Any]] = []

    def case(kernel: Any, label: str, pointers: dict[str, str], numbers: dict[str, str], **launch: Any) -> None:
        options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
        signature = {**pointers, **numbers, **dict.fromkeys(launch, "constexpr")}
        cases.append({"kernel": kernel, "signature": signature, "constexprs": launch, "label": label, **options})

    partials = {"partial_out": "*fp32", "partial_lse": "*fp32"}
    case(
        _plan_kernel,
        "plan",
        dict.fromkeys(("context_lengths", "slots", "tokens", "items", "first_items", "arrivals"), "*i32"),
        dict.fromkeys(("rows", "capacity", "wave_items", "most_items"), "i32"),
        TILE=TILE,
        MIN_CHUNK=MIN_CHUNK,
        CHUNK=CHUNK,
        HAS_TOKENS=True,
        KV_HEADS=8,
        ROWS=1024,
        WIDTH=2,
        num_warps=8,
        num_stages=3,
    )
    for dtype, kv_heads, group, head_dim, block_size in (
        ("bf16", 8, 2, 128, 16),
        ("bf16", 8, 2, 128, 32),
        ("bf16", 8, 8, 80, 256),
        ("bf16", 1, 71, 64, 32),
        ("bf16", 4, 1, 256, 32),
        ("fp32", 8, 2, 128, 32),
        ("fp32", 8, 4, 256, 32),
    ):
        padded_group = max(16, triton.next_power_of_2(group))
        padded_dim = triton.next_power_of_2(head_dim)
        tensors = {**dict.fromkeys(("q", "keys", "values", "out"), f"*{dtype}"), **partials}
        case(
            _decode_kernel,
            f"decode {dtype} {kv_heads}x{group}x{head_dim}, blocks of {block_size}",
            {**tensors, **dict.fromkeys(("block_tables", "items", "first_items", "arrivals"), "*i32")},
            {"rows": "i32", "capacity": "i32", "table_stride": "i32", "scale_log2": "fp32"},
            Q_STRIDE=kv_heads * (group + 2) * head_dim,
            BLOCK_STRIDE=kv_heads * block_size * head_dim,
            HEAD_STRIDE=block_size * head_dim,
            TOKEN_STRIDE=head_dim,
            BLOCK_SIZE=block_size,
            KV_HEADS=kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            PADDED_GROUP=padded_group,
            PADDED_DIM=padded_dim,
            REDUCE_TILE=REDUCE_TILE,
            OVERLAPS=False,
            **_variant(torch.float32 if dtype == "fp32" else torch.bfloat16, padded_group, padded_dim),
        )
    return cases
