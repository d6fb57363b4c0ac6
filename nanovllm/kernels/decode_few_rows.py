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
    _END,
    _FIRST,
    _LOG2_E,
    _PARTS,
    _SLOT,
    _START,
    _TOKEN,
    REDUCE_TILE,
    DecodeWork,
    combine,
    multiprocessors,
    paged_decode_reference,
)
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store_reference

# Tokens of a program: their keys and values stay in registers.
TILE = 64
# Registers of a thread that hold them.
REGISTERS = 64
# Heads of a group that are computed one after another.
MOST_GROUP = 8
# Programs launched for a multiprocessor at most, as many as run at a time; each takes every so manieth item.
PROGRAMS_PER_SM = 2


@triton.jit
def _normalise_and_rotate(
    line, own_weight, other_weight, eps, cosines, sines, dim, partner, mask, HEAD_DIM: tl.constexpr
):
    """A head [dim], float32 but rounded like its dtype wherever the layers round; ``partner``: what turns with dim."""
    own = tl.load(line + dim, mask=mask, other=0.0)
    other = tl.load(line + partner, mask=mask, other=0.0).to(tl.float32)
    dtype = own.dtype
    own = own.to(tl.float32)
    scale = tl.rsqrt(tl.sum(own * own, axis=0) / HEAD_DIM + eps)
    own = ((own * scale).to(dtype).to(tl.float32) * own_weight).to(dtype).to(tl.float32)
    other = ((other * scale).to(dtype).to(tl.float32) * other_weight).to(dtype).to(tl.float32)
    return (own * cosines + other * sines).to(dtype).to(tl.float32)


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
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    REDUCE_TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_kernel_start(OVERLAPS)
    dim = tl.arange(0, PADDED_DIM)
    real_dim = dim < HEAD_DIM
    half: tl.constexpr = HEAD_DIM // 2
    partner = tl.where(dim < half, dim + half, dim - half)
    q_own = tl.load(q_weight + dim, mask=real_dim, other=0.0).to(tl.float32)
    q_other = tl.load(q_weight + partner, mask=real_dim, other=0.0).to(tl.float32)
    k_own = tl.load(k_weight + dim, mask=real_dim, other=0.0).to(tl.float32)
    k_other = tl.load(k_weight + partner, mask=real_dim, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    # Lengths, tables and the keys of earlier steps are older than the step's first layer: they can be read at once.
    # Programs that find no item end without waiting: the first one always has an item, and waits.
    num_items = tl.load(first_items + rows)
    for index in range(tl.program_id(0), num_items * KV_HEADS, tl.num_programs(0)):
        item = index // KV_HEADS
        kv_head = index % KV_HEADS
        token = tl.load(items + _TOKEN * capacity + item).to(tl.int64)
        slot = tl.load(items + _SLOT * capacity + item).to(tl.int64)
        start = tl.load(items + _START * capacity + item)
        end = tl.load(items + _END * capacity + item)
        first_item = tl.load(items + _FIRST * capacity + item).to(tl.int64)
        parts = tl.load(items + _PARTS * capacity + item)
        is_last = (item == first_item + parts - 1) & (end > start)  # with the step's own token, which is not cached yet
        position = start + tl.arange(0, TILE)
        cached = position < tl.where(is_last, end - 1, end)
        block = tl.load(block_tables + slot * table_stride + position // BLOCK_SIZE, mask=cached, other=0)
        place = block.to(tl.int64) * BLOCK_STRIDE + (position % BLOCK_SIZE) * TOKEN_STRIDE + kv_head * HEAD_STRIDE
        offset = place[:, None] + dim[None, :]
        mask = cached[:, None] & real_dim[None, :]
        key = tl.load(keys + offset, mask=mask, other=0.0)  # [tokens, dim]
        value = tl.load(values + offset, mask=mask, other=0.0)
        target = tl.load(slot_mapping + token)
        angle = tl.load(positions + token) * half + dim % half
        cosines = tl.load(cos + angle, mask=real_dim, other=0.0)
        sines = tl.load(sin + angle, mask=real_dim, other=0.0)
        sines = tl.where(dim < half, -sines, sines)
        wait_for_previous_kernel(OVERLAPS)

        line = qkv + token * qkv_stride
        key_line = line + (KV_HEADS * GROUP + kv_head) * HEAD_DIM
        new_key = _normalise_and_rotate(key_line, k_own, k_other, eps, cosines, sines, dim, partner, real_dim, HEAD_DIM)
        new_value = tl.load(key_line + KV_HEADS * HEAD_DIM + dim, mask=real_dim, other=0.0)
        if is_last & (target >= 0):
            new_place = (target // BLOCK_SIZE) * BLOCK_STRIDE + (target % BLOCK_SIZE) * TOKEN_STRIDE
            new_place += kv_head * HEAD_STRIDE
            tl.store(keys + new_place + dim, new_key.to(dtype), mask=real_dim)
            tl.store(values + new_place + dim, new_value, mask=real_dim)
        target_line = out + token * (KV_HEADS * GROUP * HEAD_DIM)
        wide = item.to(tl.int64) * (KV_HEADS * GROUP)
        for member in tl.static_range(GROUP):
            head = kv_head * GROUP + member
            query = _normalise_and_rotate(
                line + head * HEAD_DIM, q_own, q_other, eps, cosines, sines, dim, partner, real_dim, HEAD_DIM
            )
            scores = tl.sum(key.to(tl.float32) * query[None, :], axis=1) * scale_log2
            scores = tl.where(cached, scores, float("-inf"))
            new_score = tl.where(is_last, tl.sum(new_key * query, axis=0) * scale_log2, float("-inf"))
            largest = tl.maximum(tl.max(scores, axis=0), new_score)
            largest = tl.where(end > start, largest, 0.0)  # a row without a context gets zeros
            weights = tl.exp2(scores - largest)
            new_weight = tl.exp2(new_score - largest)
            total = tl.sum(weights, axis=0) + new_weight
            attended = tl.sum(value.to(tl.float32) * weights[:, None], axis=0) + new_value.to(tl.float32) * new_weight
            attended = attended / tl.where(end > start, total, 1.0)
            if parts == 1:
                tl.store(target_line + head * HEAD_DIM + dim, attended.to(dtype), mask=real_dim)
            else:
                tl.store(partial_out + (wide + head) * HEAD_DIM + dim, attended, mask=real_dim)
                tl.store(partial_lse + wide + head, largest + tl.log2(total))
        if parts > 1:
            tl.debug_barrier()  # the whole program has stored, before any of it says so
            arrival = arrivals + first_item * KV_HEADS + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == parts - 1:  # the last one: all others are there
                tl.store(arrival, 0)  # for the next layer
                for member in tl.static_range(GROUP):
                    head = kv_head * GROUP + member
                    attended = combine(
                        partial_out, partial_lse, first_item, parts, head, KV_HEADS * GROUP, HEAD_DIM, dim, REDUCE_TILE
                    )
                    tl.store(target_line + head * HEAD_DIM + dim, attended.to(dtype), mask=real_dim)


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
    programs = min(capacity * num_kv_heads, multiprocessors(qkv.device) * PROGRAMS_PER_SM)
    padded_dim = triton.next_power_of_2(head_dim)
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
        PADDED_DIM=padded_dim,
        TILE=TILE,
        REDUCE_TILE=REDUCE_TILE,
        **launch_options(qkv.device),
        num_warps=_num_warps(padded_dim, qkv.element_size()),
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


def _num_warps(padded_dim: int, itemsize: int) -> int:
    return min(max(2 * TILE * padded_dim * itemsize // (32 * 4 * REGISTERS), 4), 16)


def compile_cases() -> list[dict[str, Any]]:
    """The variants worth compiling ahead of time; see tools/compile_kernels.py."""
    cases = []
    for dtype, kv_heads, group, head_dim in (("bf16", 8, 2, 128), ("bf16", 8, 8, 80), ("fp32", 8, 2, 128)):
        constexprs = {
            "BLOCK_STRIDE": kv_heads * 32 * head_dim,
            "HEAD_STRIDE": 32 * head_dim,
            "TOKEN_STRIDE": head_dim,
            "BLOCK_SIZE": 32,
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "PADDED_DIM": triton.next_power_of_2(head_dim),
            "TILE": TILE,
            "REDUCE_TILE": REDUCE_TILE,
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
                "num_warps": _num_warps(constexprs["PADDED_DIM"], 4 if dtype == "fp32" else 2),
                "num_stages": 1,
                "label": f"{dtype} {kv_heads}x{group}x{head_dim}",
            }
        )
    return cases
