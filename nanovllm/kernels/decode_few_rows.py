"""From the projection to what is attended to in one kernel, for decode steps of few rows.

Such a step has so little to compute that it waits, above all, for one thing after another: for the kernel before, for
lengths, for block tables, for keys. So each program holds the keys and values of one piece of one context. It asks for
them before the kernel that computes its queries has ended, and once that has, only normalises, rotates and multiplies.
What becomes of the pieces is as in ``paged_decode``.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from nanovllm.kernels.dependent_launch import launch_options, let_next_kernel_start, wait_for_previous_kernel
from nanovllm.kernels.paged_decode import (
    _LOG2_E,
    DecodeWork,
    load_item,
    multiprocessors,
    paged_decode_reference,
)
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store_reference

# Tokens of a program: their keys and values stay in registers.
TILE = 64
# Registers of a thread that hold them.
REGISTERS = 64
# Heads that a program computes together: queries and what they attend to stay in registers as well.
MOST_HEADS = 4
# Heads of a group: two programs divide those that are too many for one.
MOST_GROUP = 2 * MOST_HEADS
# Programs launched for a multiprocessor at most, as many as run at a time; each takes every so manieth item.
PROGRAMS_PER_SM = 2

# Scores of what is not there: finite, so that their differences are numbers.
_LOWEST = tl.constexpr(-1e30)


# Lines are loaded and stored as [lines * wide, dim], which threads share like a tile of keys, [tokens, dim]: what is
# computed of both is then in the right threads already. Of three dimensions they might share them otherwise.
@triton.jit
def _load_lines(first, dim, count, PADDED: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """``count`` lines of ``HEAD_DIM`` from ``first`` on, each once a column, in the order of ``dim``.

    Returns [PADDED, WIDE, padded dim].
    """
    DIM: tl.constexpr = dim.shape[0]
    line = tl.arange(0, PADDED * WIDE) // WIDE
    mask = (line < count)[:, None] & (tl.arange(0, DIM) < HEAD_DIM)[None, :]
    lines = tl.load(first + line[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
    return tl.reshape(lines, (PADDED, WIDE, DIM))


@triton.jit
def _store_lines(first, lines, count, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store ``count`` of the lines [padded, 1 or WIDE, padded dim], whose columns are equal, from ``first`` on."""
    PADDED: tl.constexpr = lines.shape[0]
    DIM: tl.constexpr = lines.shape[2]
    row = tl.arange(0, PADDED * WIDE)
    dim = tl.arange(0, DIM)
    mask = ((row % WIDE == 0) & (row // WIDE < count))[:, None] & (dim < HEAD_DIM)[None, :]
    lines = tl.reshape(tl.broadcast_to(lines, (PADDED, WIDE, DIM)), (PADDED * WIDE, DIM))
    tl.store(first + (row // WIDE)[:, None] * HEAD_DIM + dim[None, :], lines, mask=mask)


@triton.jit
def _normalise_and_rotate(own, other, own_weight, other_weight, eps, cosines, sines, HEAD_DIM: tl.constexpr):
    """Lines, float32 but rounded like their dtype wherever the layers round; ``other``: what turns with ``own``."""
    dtype = own.dtype
    own = own.to(tl.float32)
    other = other.to(tl.float32)
    scale = tl.rsqrt(tl.sum(own * own, axis=2) / HEAD_DIM + eps)[:, :, None]
    own = ((own * scale).to(dtype).to(tl.float32) * own_weight.to(tl.float32)).to(dtype).to(tl.float32)
    other = ((other * scale).to(dtype).to(tl.float32) * other_weight.to(tl.float32)).to(dtype).to(tl.float32)
    return (own * cosines + other * sines).to(dtype).to(tl.float32)


@triton.jit
def _merge(largest, total, other_largest, other_total):
    """Two sums of weights, each relative to the largest of its scores."""
    both = tl.maximum(largest, other_largest)
    return both, total * tl.exp2(largest - both) + other_total * tl.exp2(other_largest - both)


@triton.jit
def _combine(
    partial_out,
    partial_lse,
    first,
    parts,
    head,
    real,
    dim,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """What ``real`` heads attend to, float32 [heads, dim], from the results of ``parts`` items from ``first`` on."""
    GROUP: tl.constexpr = head.shape[0]
    DIM: tl.constexpr = dim.shape[0]
    # Every so manieth part is added up by itself, then all of them: one exchange among threads instead of one a tile.
    largest = tl.full([TILE, GROUP], _LOWEST, dtype=tl.float32)
    total = tl.zeros([TILE, GROUP], dtype=tl.float32)
    attended = tl.zeros([TILE, GROUP, DIM], dtype=tl.float32)
    for first_part in range(0, parts, TILE):
        part = first_part + tl.arange(0, TILE)
        inside = (part < parts)[:, None] & real[None, :]
        place = (first + part)[:, None] * HEADS + head[None, :]  # [parts, heads]
        # From the second-level cache: other multiprocessors have written them.
        lse = tl.load(partial_lse + place, mask=inside, other=_LOWEST, cache_modifier=".cg")
        partial = tl.load(
            partial_out + place[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=inside[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_largest = tl.maximum(largest, lse)
        weight = tl.exp2(lse - new_largest)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + weight
        attended = attended * shrink[:, :, None] + partial * weight[:, :, None]
        largest = new_largest
    weight = tl.exp2(largest - tl.max(largest, axis=0)[None, :])
    share = weight / tl.sum(total * weight, axis=0)[None, :]
    return tl.sum(attended * share[:, :, None], axis=0)


@triton.jit(do_not_specialize=["rows", "capacity", "table_stride"])
def _decode_few_rows_kernel(
    qkv,
    qkv_stride,
    q_weight,
    k_weight,
    eps,
    cos,
    sin,
    positions,
    keys,
    values,
    slot_mapping,
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
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    MEMBERS: tl.constexpr,
    PADDED_MEMBERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    REDUCE_TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_kernel_start(OVERLAPS)
    # A tile of keys is [deep, wide, dim]: a thread has some dimensions of a column of tokens, and computes the step's
    # own key and queries in these dimensions for itself. Threads that wait for each other's would take longer.
    DEEP: tl.constexpr = TILE // WIDE
    half: tl.constexpr = HEAD_DIM // 2
    column = tl.arange(0, WIDE)
    member = tl.arange(0, PADDED_MEMBERS)
    dim = tl.arange(0, PADDED_DIM)
    partner = tl.where(dim < half, dim + half, dim - half)  # what turns with it
    q_own = _load_lines(q_weight, dim, 1, 1, WIDE, HEAD_DIM)
    q_other = _load_lines(q_weight, partner, 1, 1, WIDE, HEAD_DIM)
    k_own = _load_lines(k_weight, dim, 1, 1, WIDE, HEAD_DIM)
    k_other = _load_lines(k_weight, partner, 1, 1, WIDE, HEAD_DIM)
    dtype: tl.constexpr = out.dtype.element_ty
    # Lengths, tables and the keys of earlier steps are older than the step's first layer: they can be read at once.
    # Programs that find no item end without waiting: the first one always has an item, and waits.
    index = tl.program_id(0)
    num_items = tl.load(first_items + rows)
    # The first item is asked for before it is known to be one: the one load need not wait for the other.
    token, slot, start, end, first_item, parts = load_item(items, capacity, index // (KV_HEADS * SPLIT), capacity)
    while index < num_items * (KV_HEADS * SPLIT):
        item = index // (KV_HEADS * SPLIT)
        kv_head = index // SPLIT % KV_HEADS
        split = index % SPLIT
        first_head = kv_head * GROUP + split * MEMBERS
        count = tl.minimum(GROUP - split * MEMBERS, MEMBERS)
        is_last = (item == first_item + parts - 1) & (end > start)  # with the step's own token, which is not cached yet
        position = start + tl.arange(0, TILE)
        cached = position < tl.where(is_last, end - 1, end)
        block = tl.load(block_tables + slot * table_stride + position // BLOCK_SIZE, mask=cached, other=0)
        cached_at = block.to(tl.int64) * BLOCK_STRIDE + (position % BLOCK_SIZE) * TOKEN_STRIDE + kv_head * HEAD_STRIDE
        offset = cached_at[:, None] + dim[None, :]
        mask = cached[:, None] & (dim < HEAD_DIM)[None, :]
        key = tl.load(keys + offset, mask=mask, other=0.0)  # [tokens, dim]
        value = tl.load(values + offset, mask=mask, other=0.0)
        target = tl.load(slot_mapping + token)
        angle = tl.load(positions + token) * half
        cosines = _load_lines(cos + angle, dim % half, 1, 1, WIDE, HEAD_DIM)
        sines = _load_lines(sin + angle, dim % half, 1, 1, WIDE, HEAD_DIM)
        sines = tl.where((dim < half)[None, None, :], -sines, sines)
        stores = is_last & (target >= 0) & (split == 0)
        new_place = (target // BLOCK_SIZE) * BLOCK_STRIDE + (target % BLOCK_SIZE) * TOKEN_STRIDE + kv_head * HEAD_STRIDE
        wait_for_previous_kernel(OVERLAPS)

        query_lines = qkv + token * qkv_stride + first_head * HEAD_DIM
        key_line = qkv + token * qkv_stride + (KV_HEADS * GROUP + kv_head) * HEAD_DIM
        query = _load_lines(query_lines, dim, count, PADDED_MEMBERS, WIDE, HEAD_DIM)
        query_other = _load_lines(query_lines, partner, count, PADDED_MEMBERS, WIDE, HEAD_DIM)
        new_key = _load_lines(key_line, dim, 1, 1, WIDE, HEAD_DIM)
        new_key_other = _load_lines(key_line, partner, 1, 1, WIDE, HEAD_DIM)
        new_value = _load_lines(key_line + KV_HEADS * HEAD_DIM, dim, 1, 1, WIDE, HEAD_DIM)
        # The value is stored here because loads have to come before a store in the machine's code as well. Else the
        # compiler puts some of them off until others have come, to save registers, and a program waits twice.
        if stores:
            _store_lines(values + new_place, new_value, 1, WIDE, HEAD_DIM)
        new_key = _normalise_and_rotate(new_key, new_key_other, k_own, k_other, eps, cosines, sines, HEAD_DIM)
        query = _normalise_and_rotate(query, query_other, q_own, q_other, eps, cosines, sines, HEAD_DIM)

        # Each column by itself, then all of them. The first one has the step's own token besides.
        has_new = (column < tl.where(is_last, 1, 0))[None, :]
        key = tl.reshape(key.to(tl.float32), (DEEP, 1, WIDE, PADDED_DIM))
        value = tl.reshape(value.to(tl.float32), (DEEP, 1, WIDE, PADDED_DIM))
        scores = tl.sum(key * tl.reshape(query, (1, PADDED_MEMBERS, WIDE, PADDED_DIM)), axis=3) * scale_log2
        scores = tl.where(tl.reshape(cached, (DEEP, 1, WIDE)), scores, _LOWEST)  # [deep, members, wide]
        new_score = tl.where(has_new, tl.sum(new_key * query, axis=2) * scale_log2, _LOWEST)
        column_largest = tl.maximum(tl.max(scores, axis=0), new_score)  # [members, wide]
        weights = tl.exp2(scores - column_largest[None, :, :])
        new_weight = tl.where(has_new, tl.exp2(new_score - column_largest), 0.0)
        attended = tl.sum(value * weights[:, :, :, None], axis=0)
        attended += new_value.to(tl.float32) * new_weight[:, :, None]  # [members, wide, dim]
        column_total = tl.sum(weights, axis=0) + new_weight
        largest, total = tl.reduce((column_largest, column_total), 1, _merge)
        share = tl.exp2(column_largest - largest[:, None]) / total[:, None]
        attended = tl.sum(attended * share[:, :, None], axis=1)[:, None, :]  # zeros of a row without a context

        if stores:
            _store_lines(keys + new_place, new_key.to(dtype), 1, WIDE, HEAD_DIM)
        target_lines = out + (token * (KV_HEADS * GROUP) + first_head) * HEAD_DIM
        if parts == 1:
            _store_lines(target_lines, attended.to(dtype), count, WIDE, HEAD_DIM)
        else:
            real = member < count
            place = item.to(tl.int64) * (KV_HEADS * GROUP) + first_head
            _store_lines(partial_out + place * HEAD_DIM, attended, count, WIDE, HEAD_DIM)
            tl.store(partial_lse + place + member, largest + tl.log2(total), mask=real)
            tl.debug_barrier()  # the whole program has stored, before any of it says so
            # The row has a second item, whose place the second program of a group counts in.
            arrival = arrivals + (first_item + split) * KV_HEADS + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == parts - 1:  # the last one: all others are there
                tl.store(arrival, 0)  # for the next layer
                combined = _combine(
                    partial_out,
                    partial_lse,
                    first_item,
                    parts,
                    first_head + member,
                    real,
                    dim,
                    KV_HEADS * GROUP,
                    HEAD_DIM,
                    REDUCE_TILE,
                )
                _store_lines(target_lines, combined[:, None, :].to(dtype), count, WIDE, HEAD_DIM)
        index += tl.num_programs(0)
        token, slot, start, end, first_item, parts = load_item(items, capacity, index // (KV_HEADS * SPLIT), num_items)


def decode_few_rows(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    work: DecodeWork,
    scale: float,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """``qk_norm_rope_store`` and ``paged_decode`` of a step whose rows all have one query, row i that of token i.

    Everything but ``qkv`` must have been computed before the last kernel on the stream that was not launched to overlap
    the one before it.

    Args:
        qkv: [rows, (num_heads + 2 * num_kv_heads) * head_dim]; the last dimension is packed.
        q_weight: [head_dim], of the queries' RMSNorm, of qkv's dtype.
        k_weight: [head_dim], of the keys' RMSNorm, of qkv's dtype.
        eps: Added to the mean squares.
        cos: [max_len, head_dim / 2], float32, contiguous.
        sin: The same.
        positions: [rows], int64, each below max_len: a row's context without its own token.
        keys: [blocks, num_kv_heads, block_size, head_dim], a layer's cache, of qkv's dtype; the last dimension is
            packed; ``block_size`` is a power of two.
        values: The same, with the same strides.
        slot_mapping: [rows], int64: where each row's key and value go; -1 stores nothing.
        block_tables: [slots, blocks], int32 or int64: KV blocks in order; the last dimension is packed.
        work: The rows, from ``plan_decode`` with ``item_tokens`` of ``TILE``.
        scale: Of the scores.
        num_heads: Query heads, at most ``MOST_GROUP`` for each of the key-value heads.
        num_kv_heads: Key-value heads.

    Returns:
        [rows, num_heads, head_dim]; zeros for rows without a context.
    """
    rows, head_dim, block_size = qkv.shape[0], q_weight.shape[0], keys.shape[2]
    out = torch.empty((rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    capacity = work.items.shape[1]
    sizes, num_warps = _launch_sizes(num_heads // num_kv_heads, head_dim, qkv.element_size())
    programs = min(capacity * num_kv_heads * sizes["SPLIT"], multiprocessors(qkv.device) * PROGRAMS_PER_SM)
    _decode_few_rows_kernel[(programs,)](
        qkv,
        qkv.stride(0),
        q_weight,
        k_weight,
        eps,
        cos,
        sin,
        positions,
        keys,
        values,
        slot_mapping,
        block_tables,
        work.items,
        work.first_items,
        out,
        work.partial_out,
        work.partial_lse,
        work.arrivals,
        rows,
        capacity,
        block_tables.stride(0),
        scale * _LOG2_E,
        BLOCK_STRIDE=keys.stride(0),
        HEAD_STRIDE=keys.stride(1),
        TOKEN_STRIDE=keys.stride(2),
        BLOCK_SIZE=block_size,
        KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        **sizes,
        **launch_options(qkv.device),
        num_warps=num_warps,
    )
    return out


def decode_few_rows_reference(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    work: DecodeWork,
    scale: float,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """:func:`decode_few_rows` by torch's operators."""
    norms, tables = (q_weight, k_weight, eps), (cos, sin, positions)
    q = qk_norm_rope_store_reference(qkv, *norms, *tables, keys, values, slot_mapping, num_heads, num_kv_heads)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    paged_decode_reference(q, keys, values, block_tables, work, scale, out)
    return out


def _launch_sizes(group: int, head_dim: int, itemsize: int) -> tuple[dict[str, int], int]:
    """Tile sizes and warps: registers hold a tile of keys and one of values, and later one of partial results."""
    split = triton.cdiv(group, MOST_HEADS)
    members = triton.cdiv(group, split)
    padded_members, padded_dim = triton.next_power_of_2(members), triton.next_power_of_2(head_dim)
    num_warps = min(max(2 * TILE * padded_dim * itemsize // (32 * 4 * REGISTERS), 4), 16)
    sizes = {
        "SPLIT": split,
        "MEMBERS": members,
        "PADDED_MEMBERS": padded_members,
        "PADDED_DIM": padded_dim,
        "TILE": TILE,
        "WIDE": min(num_warps * 32 * 16 // (padded_dim * itemsize), TILE),  # tokens of 16 bytes a thread
        "REDUCE_TILE": min(max(num_warps * 32 * REGISTERS // (padded_members * padded_dim), 4), 16),
    }
    return sizes, num_warps


def compile_cases() -> list[dict[str, Any]]:
    """The variants worth compiling ahead of time; see tools/compile_kernels.py."""
    cases = []
    for dtype, kv_heads, group, head_dim in (
        ("bf16", 8, 2, 128),
        ("bf16", 8, 4, 128),
        ("bf16", 8, 8, 80),
        ("fp32", 8, 2, 128),
    ):
        sizes, num_warps = _launch_sizes(group, head_dim, 4 if dtype == "fp32" else 2)
        constexprs = {
            "BLOCK_STRIDE": kv_heads * 32 * head_dim,
            "HEAD_STRIDE": 32 * head_dim,
            "TOKEN_STRIDE": head_dim,
            "BLOCK_SIZE": 32,
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            **sizes,
            "OVERLAPS": False,
        }
        cases.append(
            {
                "kernel": _decode_few_rows_kernel,
                "signature": {
                    **dict.fromkeys(("qkv", "q_weight", "k_weight", "keys", "values", "out"), f"*{dtype}"),
                    **dict.fromkeys(("cos", "sin", "partial_out", "partial_lse"), "*fp32"),
                    **dict.fromkeys(("positions", "slot_mapping"), "*i64"),
                    **dict.fromkeys(("block_tables", "items", "first_items", "arrivals"), "*i32"),
                    **dict.fromkeys(("qkv_stride", "rows", "capacity", "table_stride"), "i32"),
                    **dict.fromkeys(("eps", "scale_log2"), "fp32"),
                    **dict.fromkeys(constexprs, "constexpr"),
                },
                "constexprs": constexprs,
                "num_warps": num_warps,
                "num_stages": 1,
                "label": f"{dtype} {kv_heads}x{group}x{head_dim}",
            }
        )
    return cases
