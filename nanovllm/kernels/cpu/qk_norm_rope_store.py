"""QK-norm, rotation, and the writing of keys and values to the cache, on the CPU."""

from typing import Any

import numpy as np
import torch
from numba import types

from nanovllm.kernels.cpu.kv_cache import store_key, store_value, value_columns
from nanovllm.kernels.cpu.launch import Kernel, as_float, as_integer, integers, new, next_task, num_tasks
from nanovllm.kernels.cpu.vectors import as_float32, as_int32, as_int64, read, rounded, scratch, write

MAX_HEAD_DIM = 256


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
    ) = integers(arguments, 19)
    positions, slots = as_int64(position_table), as_int64(slot_mapping)
    is_half, eps = half_precision != 0, as_float(eps_bits)
    width, half = 2 if is_half else 4, head_dim // 2
    normed_address, rotated_address = scratch(256), scratch(256)
    normed, rotated = as_float32(normed_address), as_float32(rotated_address)
    task = next_task(arguments)
    while task < num_tasks(arguments):
        token, slot = task, slots[task]
        block, offset = slot // block_size, slot % block_size
        cosine = as_float32(cosines + positions[token] * half * 4)
        sine = as_float32(sines + positions[token] * half * 4)
        for head in range(heads + kv_heads):
            source = qkv + (token * stride + head * head_dim) * width
            weight = q_weight if head < heads else k_weight
            squares = types.float32(0)
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
            if head < heads:
                target = out + (token * heads + head) * head_dim * width
                for d in range(head_dim):
                    write(target, d, is_half, rotated[d])
            elif slot >= 0:
                here = keys + (block * kv_heads + head - heads) * head_dim * block_size * width
                store_key(here, offset, block_size, rotated_address, head_dim, is_half)
        if slot >= 0:
            for head in range(kv_heads):
                source = qkv + (token * stride + (heads + kv_heads + head) * head_dim) * width
                here = values + (block * kv_heads + head) * columns * block_size * width
                if not store_value(here, offset, columns, source, head_dim, is_half):
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
    q = new((tokens, num_heads, head_dim), qkv.dtype)
    _kernel(
        tokens,
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
    )
    return q
