"""From the projection to what is attended to in one kernel, for decode steps of few rows.

Such a step has so little to compute that it waits, above all, for one thing after another: for the kernel before, for
lengths, for block tables, for keys. So each program holds the keys and values of one piece of one context. It asks for
them before the kernel that computes its queries has ended, and once that has, only normalises, rotates and multiplies.
What becomes of the pieces is as in ``paged_decode``.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels import LOG2_E, MOST_TILE_BYTES
from nanovllm.kernels.decode_work import DecodeWork, load_item, multiprocessors
from nanovllm.kernels.dependent_launch import (
    SINCE_TRITON_3_5,
    launch_options,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from nanovllm.kernels.paged_decode import paged_decode_reference
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store_reference

# Tokens of a program: their keys and values stay in registers.
TILE = 64
# Registers of a thread that hold them: half as many of float32, whose products take more of the others.
REGISTERS = 128
# Partial results of a head that are combined at a time, to begin with.
PARTS = 4
# Lines of a tile at least: no earlier Triton multiplies fewer than 16.
LEAST_LINES = 8 if SINCE_TRITON_3_5 else 16
# Heads that may share a key-value head.
MOST_GROUP = 8
# Programs launched for a multiprocessor at most, fewer than could run at a time; each goes on that many items.
PROGRAMS_PER_SM = 2

# Scores of what is not there: finite, so that their differences are numbers.
_LOWEST = tl.constexpr(-1e30)

# Where what other kernels write is read. A multiprocessor's own cache is emptied when a kernel starts; that it is when
# one starts beside others is said nowhere, and it may hold what was at an address before.
_L2 = tl.constexpr(".cg")


@triton.jit
def _normalise_and_rotate(own, other, own_weight, other_weight, eps, cosines, sines, HEAD_DIM: tl.constexpr):
    """Lines [lines, dim], rounded like their dtype wherever the layers round; ``other``: what turns with ``own``."""
    dtype = own.dtype
    own = own.to(tl.float32)
    other = other.to(tl.float32)
    scale = tl.rsqrt(tl.sum(own * own, axis=1) / HEAD_DIM + eps)[:, None]
    own = ((own * scale).to(dtype).to(tl.float32) * own_weight.to(tl.float32)).to(dtype).to(tl.float32)
    other = ((other * scale).to(dtype).to(tl.float32) * other_weight.to(tl.float32)).to(dtype).to(tl.float32)
    return (own * cosines[None, :] + other * sines[None, :]).to(dtype)


@triton.jit
def _repeated(x, LINES: tl.constexpr):
    """``x`` [lines, elements] below itself until it has ``LINES`` lines."""
    repeats: tl.constexpr = LINES // x.shape[0]
    return tl.reshape(tl.broadcast_to(x[None, :, :], (repeats, x.shape[0], x.shape[1])), (LINES, x.shape[1]))


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
    # Parts that lie TILE apart are added up first, then all of them: one exchange among threads instead of one a tile.
    largest = tl.full([TILE, GROUP], _LOWEST, dtype=tl.float32)
    total = tl.zeros([TILE, GROUP], dtype=tl.float32)
    attended = tl.zeros([TILE, GROUP, DIM], dtype=tl.float32)
    for first_part in range(0, parts, TILE):
        part = first_part + tl.arange(0, TILE)
        inside = (part < parts)[:, None] & real[None, :]
        place = (first + part)[:, None] * HEADS + head[None, :]  # [parts, heads]
        lse = tl.load(partial_lse + place, mask=inside, other=_LOWEST, cache_modifier=_L2)
        partial = tl.load(
            partial_out + place[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=inside[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=_L2,
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
    HEAD_DIM: tl.constexpr,
    LINES: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    REDUCE_TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_kernel_start(OVERLAPS)
    half: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, PADDED_DIM)
    real_dim = dim < HEAD_DIM
    partner = tl.where(dim < half, dim + half, dim - half)  # what turns with it
    member = tl.arange(0, PADDED_GROUP)  # of the heads that share a key-value head
    real_line = (member < GROUP)[:, None] & real_dim[None, :]
    line = tl.arange(0, LINES)  # of a tile of their queries, which are repeated where a tile needs more
    is_query = line < GROUP
    own_weight = tl.load(q_weight + dim, mask=real_dim, other=0.0)[None, :]
    other_weight = tl.load(q_weight + partner, mask=real_dim, other=0.0)[None, :]
    own_key_weight = tl.load(k_weight + dim, mask=real_dim, other=0.0)[None, :]
    other_key_weight = tl.load(k_weight + partner, mask=real_dim, other=0.0)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    # Lengths, tables and the keys of earlier steps are older than the step's first layer: they can be read at once.
    # Programs that find no item end without waiting: the first one always has an item, and waits.
    index = tl.program_id(0)
    num_items = tl.load(first_items + rows, cache_modifier=_L2)
    # The first item is asked for before it is known to be one: the one load need not wait for the other.
    token, slot, start, end, first_item, parts = load_item(items, capacity, index // KV_HEADS, capacity, _L2)
    while index < num_items * KV_HEADS:
        item = index // KV_HEADS
        kv_head = index % KV_HEADS
        is_last = (item == first_item + parts - 1) & (end > start)  # with the step's own token, which is not cached yet
        position = start + tl.arange(0, TILE)
        cached = position < tl.where(is_last, end - 1, end)
        table = block_tables + slot * table_stride
        block = tl.load(table + position // BLOCK_SIZE, mask=cached, other=0, cache_modifier=_L2)
        cached_at = block.to(tl.int64) * BLOCK_STRIDE + (position % BLOCK_SIZE) * TOKEN_STRIDE + kv_head * HEAD_STRIDE
        offset = cached_at[:, None] + dim[None, :]
        mask = cached[:, None] & real_dim[None, :]
        key = tl.load(keys + offset, mask=mask, other=0.0, cache_modifier=_L2)  # [tokens, dim]
        value = tl.load(values + offset, mask=mask, other=0.0, cache_modifier=_L2)
        target = tl.load(slot_mapping + token, cache_modifier=_L2)
        angle = tl.load(positions + token, cache_modifier=_L2) * half
        cosines = tl.load(cos + angle + dim % half, mask=real_dim, other=0.0)
        sines = tl.load(sin + angle + dim % half, mask=real_dim, other=0.0)
        sines = tl.where(dim < half, -sines, sines)
        stores = is_last & (target >= 0)
        new_place = (target // BLOCK_SIZE) * BLOCK_STRIDE + (target % BLOCK_SIZE) * TOKEN_STRIDE + kv_head * HEAD_STRIDE
        wait_for_previous_kernel(OVERLAPS)

        source = qkv + token * qkv_stride
        queries = source + (kv_head * GROUP + member)[:, None] * HEAD_DIM
        query = tl.load(queries + dim[None, :], mask=real_line, other=0.0)
        other_query = tl.load(queries + partner[None, :], mask=real_line, other=0.0)
        key_source = source + (KV_HEADS * GROUP + kv_head) * HEAD_DIM
        new_key = tl.load(key_source + dim[None, :], mask=real_dim[None, :], other=0.0)  # [1, dim]
        other_key = tl.load(key_source + partner[None, :], mask=real_dim[None, :], other=0.0)
        new_value = tl.load(key_source + KV_HEADS * HEAD_DIM + dim, mask=real_dim, other=0.0)
        # The value is stored here because loads have to come before a store in the machine's code as well. Else the
        # compiler puts some of them off until others have come, to save registers, and a program waits twice.
        if stores:
            tl.store(values + new_place + dim, new_value, mask=real_dim)
        query = _normalise_and_rotate(query, other_query, own_weight, other_weight, eps, cosines, sines, HEAD_DIM)
        new_key = _normalise_and_rotate(
            new_key, other_key, own_key_weight, other_key_weight, eps, cosines, sines, HEAD_DIM
        )
        if stores:
            tl.store(keys + new_place + dim[None, :], new_key, mask=real_dim[None, :])
        new_score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale_log2
        new_score = tl.reshape(_repeated(tl.where(is_last, new_score, _LOWEST)[:, None], LINES), (LINES,))
        lines = _repeated(query, LINES)

        if dtype == tl.float32:
            tl.debug_barrier()  # keys and values are not brought to where products want them before: they would spill
        # Everything is transposed, [tokens, lines]: tokens fill the rows of a product.
        scores = tl.dot(key, tl.trans(lines), input_precision="ieee") * scale_log2
        scores = tl.where(cached[:, None], scores, _LOWEST)
        largest = tl.maximum(tl.max(scores, axis=0), new_score)
        weights = tl.where(cached[:, None], tl.exp2(scores - largest[None, :]), 0.0)
        new_weight = tl.where(is_last, tl.exp2(new_score - largest), 0.0)
        total = tl.sum(weights, axis=0) + new_weight
        attended = tl.dot(tl.trans(value), weights.to(dtype), input_precision="ieee")  # [dim, lines]
        attended += new_value.to(tl.float32)[:, None] * new_weight[None, :]
        attended = attended * (1.0 / tl.where(end > start, total, 1.0))[None, :]  # zeros of a row without a context

        place = (kv_head * GROUP + line)[None, :] * HEAD_DIM + dim[:, None]
        wanted = is_query[None, :] & real_dim[:, None]
        target_line = out + token * (KV_HEADS * GROUP * HEAD_DIM)
        if parts == 1:
            tl.store(target_line + place, attended.to(dtype), mask=wanted)
        else:
            first_head = item.to(tl.int64) * (KV_HEADS * GROUP)
            tl.store(partial_out + first_head * HEAD_DIM + place, attended, mask=wanted)
            tl.store(partial_lse + first_head + kv_head * GROUP + line, largest + tl.log2(total), mask=is_query)
            tl.debug_barrier()  # the whole program has stored, before any of it says so
            arrival = arrivals + first_item * KV_HEADS + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == parts - 1:  # the last one: all others are there
                tl.store(arrival, 0)  # for the next layer
                own_head = kv_head * GROUP + member
                combined = _combine(
                    partial_out,
                    partial_lse,
                    first_item,
                    parts,
                    own_head,
                    member < GROUP,
                    dim,
                    KV_HEADS * GROUP,
                    HEAD_DIM,
                    REDUCE_TILE,
                )
                tl.store(
                    target_line + own_head[:, None] * HEAD_DIM + dim[None, :],
                    combined.to(dtype),
                    mask=(member < GROUP)[:, None] & real_dim[None, :],
                )
        index += tl.num_programs(0)
        token, slot, start, end, first_item, parts = load_item(items, capacity, index // KV_HEADS, num_items, _L2)


def suits(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel is for heads of these numbers and sizes."""
    held = 2 * TILE * triton.next_power_of_2(head_dim) * dtype.itemsize  # products of float32 share it
    return num_heads // num_kv_heads <= MOST_GROUP and held <= MOST_TILE_BYTES


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
    the one before it: this one reads it without waiting.

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
        num_heads: Query heads; with the other sizes, of what ``suits``.
        num_kv_heads: Key-value heads.

    Returns:
        [rows, num_heads, head_dim]; zeros for rows without a context.
    """
    rows, head_dim, block_size = qkv.shape[0], q_weight.shape[0], keys.shape[2]
    out = torch.empty((rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    capacity = work.items.shape[1]
    sizes, num_warps = _launch_sizes(num_heads // num_kv_heads, head_dim, qkv.element_size())
    programs = min(capacity * num_kv_heads, multiprocessors(qkv.device) * PROGRAMS_PER_SM)
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
        scale * LOG2_E,
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
    padded_group, padded_dim = triton.next_power_of_2(group), triton.next_power_of_2(head_dim)
    registers = REGISTERS if itemsize < 4 else REGISTERS // 2
    num_warps = min(max(2 * TILE * padded_dim * itemsize // (32 * 4 * registers), 2), 16)
    sizes = {
        "LINES": max(padded_group, LEAST_LINES),
        "PADDED_GROUP": padded_group,
        "PADDED_DIM": max(padded_dim, 16),
        "TILE": TILE,
        "REDUCE_TILE": PARTS,
    }
    return sizes, num_warps
