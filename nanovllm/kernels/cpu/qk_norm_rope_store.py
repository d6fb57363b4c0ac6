"""QK-norm, rotation, and the writing of keys and values to the cache, on the CPU."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, types

from nanovllm.kernels.cpu.kv_cache import store_key, store_value, value_columns
from nanovllm.kernels.cpu.launch import Kernel, as_float, as_integer, integers, new, next_task, num_tasks
from nanovllm.kernels.cpu.vectors import as_float32, as_int32, as_int64, read, rounded, scratch, write

MOST_TOKENS_A_TASK = 16


class _Heads(NamedTuple):
    """What all tokens have in common; addresses as int64."""

    heads: Any
    kv_heads: Any
    head_dim: Any
    block_size: Any
    columns: Any  # of a block of values
    width: Any  # bytes of an element


@njit(inline="always")
def _next_block(slots: Any, token: Any, tokens: Any, block_size: Any) -> Any:
    """The first token from ``token`` on whose key goes into another block than that of the token before it.

    A block is written by one thread: two would take its lines of cache from one another, and spoil each other's halves
    of pairs of values.
    """
    while 0 < token < tokens and slots[token] // block_size == slots[token - 1] // block_size:
        token += 1
    return token


@njit(inline="always")
def _normalise_and_rotate(
    source: Any, weight: Any, cosine: Any, sine: Any, eps: Any, normed: Any, rotated: Any, head_dim: Any, is_half: Any
) -> None:
    """RMSNorm of a head, rounded as torch's operators round it, then the rotation of its halves."""
    squares, half = types.float32(0), head_dim // 2
    for d in range(head_dim):
        value = read(source, d, is_half)
        squares += value * value
    scale = types.float32(1) / np.sqrt(squares / types.float32(head_dim) + eps)
    for d in range(head_dim):
        value = rounded(read(source, d, is_half) * scale, is_half)
        normed[d] = rounded(value * read(weight, d, is_half), is_half)
    for d in range(half):
        rotated[d] = normed[d] * cosine[d] - normed[half + d] * sine[d]
        rotated[half + d] = normed[half + d] * cosine[d] + normed[d] * sine[d]


@njit(inline="always")
def _store_values(source: Any, values: Any, slot: Any, sizes: Any, is_half: Any) -> Any:
    """Write a token's values to the cache; whether all of them are finite."""
    block, offset = slot // sizes.block_size, slot % sizes.block_size
    head_bytes, finite = sizes.columns * sizes.block_size * sizes.width, True
    for head in range(sizes.kv_heads):
        place = values + (block * sizes.kv_heads + head) * head_bytes
        value = source + head * sizes.head_dim * sizes.width
        finite &= store_value(place, offset, sizes.columns, value, sizes.head_dim, is_half)
    return finite


def _qk_norm_rope_store(arguments: Any) -> None:
    (
        qkv,
        stride,
        q_weight,
        k_weight,
        cosines,
        sines,
        position_table,
        keys,
        values,
        slot_mapping,
        out,
        heads,
        kv_heads,
        head_dim,
        block_size,
        columns,
        half_precision,
        overflow,
        eps_bits,
        tokens,
        tokens_a_task,
    ) = integers(arguments, 21)
    positions, slots = as_int64(position_table), as_int64(slot_mapping)
    is_half, eps = half_precision != 0, as_float(eps_bits)
    width = 2 if is_half else 4
    sizes = _Heads(heads, kv_heads, head_dim, block_size, columns, width)
    head_bytes = head_dim * width
    normed, rotated_address = as_float32(scratch(256)), scratch(256)
    rotated = as_float32(rotated_address)
    task = next_task(arguments)
    while task < num_tasks(arguments):
        first = _next_block(slots, task * tokens_a_task, tokens, block_size)
        end = _next_block(slots, min(tokens, (task + 1) * tokens_a_task), tokens, block_size)
        for token in range(first, end):
            slot, row = slots[token], qkv + token * stride * width
            cosine = as_float32(cosines + positions[token] * head_dim * 2)
            sine = as_float32(sines + positions[token] * head_dim * 2)
            for head in range(heads + kv_heads):
                weight = q_weight if head < heads else k_weight
                source = row + head * head_bytes
                _normalise_and_rotate(source, weight, cosine, sine, eps, normed, rotated, head_dim, is_half)
                if head < heads:
                    target = out + (token * heads + head) * head_bytes
                    for d in range(head_dim):
                        write(target, d, is_half, rotated[d])
                elif slot >= 0:
                    place = slot // block_size * kv_heads + head - heads
                    block = keys + place * head_bytes * block_size
                    store_key(block, slot % block_size, block_size, rotated_address, head_dim, is_half)
            if slot >= 0 and not _store_values(row + (heads + kv_heads) * head_bytes, values, slot, sizes, is_half):
                as_int32(overflow)[0] = types.int32(1)
        task = next_task(arguments)


_kernel = Kernel(_qk_norm_rope_store)


def qk_norm_rope_store(
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
    overflow: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """Normalise and rotate queries and keys head by head; write the keys and the values, as they are, to the cache.

    Args:
        qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim], bfloat16 or float32; the last dimension is packed,
            rows may be strided.
        q_weight: [head_dim], of the queries' RMSNorm, of qkv's dtype.
        k_weight: [head_dim], of the keys' RMSNorm, of qkv's dtype.
        eps: Added to the mean squares.
        cos: [max_len, head_dim / 2], float32, contiguous.
        sin: The same.
        positions: [tokens], int64, each below max_len.
        keys: A layer's keys, laid out as ``kv_cache`` says, of qkv's dtype.
        values: A layer's values.
        slot_mapping: [tokens], int64: where each token's key and value go, ``block * block_size + offset``; -1 stores
            nothing.
        overflow: int32 [1], set to 1 if a value is not finite.
        num_heads: Query heads.
        num_kv_heads: Key-value heads.

    Returns:
        The queries, [tokens, num_heads, head_dim].
    """
    tokens, head_dim = qkv.shape[0], q_weight.shape[0]
    tokens_a_task = min(MOST_TOKENS_A_TASK, -(-tokens // (4 * torch.get_num_threads())))
    q = new((tokens, num_heads, head_dim), qkv.dtype)
    _kernel(
        -(-tokens // max(1, tokens_a_task)),
        qkv.data_ptr(),
        qkv.stride(0),
        q_weight.data_ptr(),
        k_weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        positions.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        slot_mapping.data_ptr(),
        q.data_ptr(),
        num_heads,
        num_kv_heads,
        head_dim,
        keys.shape[3],
        value_columns(head_dim),
        qkv.dtype == torch.bfloat16,
        overflow.data_ptr(),
        as_integer(eps),
        tokens,
        tokens_a_task,
    )
    return q
