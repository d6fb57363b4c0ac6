"""Attention of one query a row over the paged cache, the work split evenly whatever the context lengths are.

Programs take items of ``decode_work``. The last one to end of a row's items combines their partial results.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels import LOG2_E, decode_work, is_interpreted
from nanovllm.kernels.decode_work import DecodeWork, load_item, multiprocessors
from nanovllm.kernels.dependent_launch import launch_options, let_next_kernel_start, wait_for_previous_kernel

# Tokens of float32 loaded at a time, instead of ``decode_work.TILE``: tensor cores do not multiply them exactly, and
# products of larger tiles exceed the registers.
EXACT_TILE = 16
# Programs launched for a multiprocessor, beside one a row and head; each takes every so manieth item. Those that find
# none cost time as well: where there is little work, they are the most.
PROGRAMS_PER_SM = 4
NUM_WARPS = 4
NUM_STAGES = 3
# Partial results of a head that are combined at a time.
REDUCE_TILE = 32

_ANY_CACHE = tl.constexpr("")


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
        work: The rows, from ``decode_work.plan_decode``.
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
        slot = work.items[decode_work.SLOT.value, firsts[row]]
        end = int(work.items[decode_work.END.value, firsts[row + 1] - 1])
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
    return {"TILE": decode_work.TILE, "num_warps": NUM_WARPS if padded_group < 64 else 8, "num_stages": NUM_STAGES}
