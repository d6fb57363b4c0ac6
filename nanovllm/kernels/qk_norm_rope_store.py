"""From the projection to attention in one pass: queries and keys normalised and rotated, keys and values cached."""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.dependent_launch import launch_options, let_next_kernel_start, wait_for_previous_kernel
from nanovllm.kernels.rms_norm import rms_norm_reference


@triton.jit
def _normalise_and_rotate(lines, weight, eps, columns, mask, cosines, sines, HEAD_DIM: tl.constexpr):
    """Both halves of some heads: ``lines`` [heads, 1] points to them, ``columns`` [1, half] are those of a half."""
    half: tl.constexpr = HEAD_DIM // 2
    first = tl.load(lines + columns, mask=mask, other=0.0)
    second = tl.load(lines + half + columns, mask=mask, other=0.0)
    dtype = first.dtype
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / HEAD_DIM + eps)[:, None]
    inside = columns < half
    first_weight = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + half + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded wherever the layers round: before the weight, after it, and after the rotation.
    first = ((first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
    return (first * cosines - second * sines).to(dtype), (second * cosines + first * sines).to(dtype)


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv,
    qkv_stride,
    q_weight,
    k_weight,
    eps,
    cos,
    sin,
    positions,
    keys,
    keys_block_stride,
    keys_head_stride,
    keys_token_stride,
    values,
    values_block_stride,
    values_head_stride,
    values_token_stride,
    slot_mapping,
    q,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF_TILE: tl.constexpr,
    Q_TILE: tl.constexpr,
    KV_TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program does one token's queries of ``Q_TILE`` heads, or its keys and values of ``KV_TILE`` heads."""
    let_next_kernel_start(OVERLAPS)
    wait_for_previous_kernel(OVERLAPS)
    half: tl.constexpr = HEAD_DIM // 2
    q_groups: tl.constexpr = (HEADS + Q_TILE - 1) // Q_TILE
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    line = qkv + token * qkv_stride
    columns = tl.arange(0, HALF_TILE)[None, :]
    inside = columns < half
    position = tl.load(positions + token)
    cosines = tl.load(cos + position * half + columns, mask=inside, other=0.0)
    sines = tl.load(sin + position * half + columns, mask=inside, other=0.0)
    if group < q_groups:
        heads = group * Q_TILE + tl.arange(0, Q_TILE)[:, None]
        mask = inside & (heads < HEADS)
        first, second = _normalise_and_rotate(
            line + heads * HEAD_DIM, q_weight, eps, columns, mask, cosines, sines, HEAD_DIM
        )
        target = q + token * (HEADS * HEAD_DIM) + heads * HEAD_DIM + columns
        tl.store(target, first, mask=mask)
        tl.store(target + half, second, mask=mask)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            heads = (group - q_groups) * KV_TILE + tl.arange(0, KV_TILE)[:, None]
            mask = inside & (heads < KV_HEADS)
            # Asked for first, so that both are under way while the keys are computed.
            value_lines = line + (HEADS + KV_HEADS + heads) * HEAD_DIM + columns
            first_value = tl.load(value_lines, mask=mask, other=0.0)
            second_value = tl.load(value_lines + half, mask=mask, other=0.0)
            first, second = _normalise_and_rotate(
                line + (HEADS + heads) * HEAD_DIM, k_weight, eps, columns, mask, cosines, sines, HEAD_DIM
            )
            block = slot // BLOCK_SIZE  # int64: a cache has more elements than an int32 counts
            offset = slot % BLOCK_SIZE
            heads = heads.to(tl.int64)
            target = keys + block * keys_block_stride + offset * keys_token_stride + heads * keys_head_stride + columns
            tl.store(target, first, mask=mask)
            tl.store(target + half, second, mask=mask)
            target = (
                values
                + block * values_block_stride
                + offset * values_token_stride
                + heads * values_head_stride
                + columns
            )
            tl.store(target, first_value, mask=mask)
            tl.store(target + half, second_value, mask=mask)


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
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """Normalise and rotate queries and keys head by head; write the keys and the values, as they are, to the cache.

    Args:
        qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim]; the last dimension is packed, rows may be strided.
        q_weight: [head_dim], of the queries' RMSNorm, of qkv's dtype.
        k_weight: [head_dim], of the keys' RMSNorm, of qkv's dtype.
        eps: Added to the mean squares.
        cos: [max_len, head_dim / 2], float32, contiguous.
        sin: The same.
        positions: [tokens], int64, each below max_len.
        keys: [blocks, num_kv_heads, block_size, head_dim], a layer's cache, of qkv's dtype; the last dimension is
            packed, the others may be strided.
        values: The same.
        slot_mapping: [tokens], int64: where each token's key and value go, ``block * block_size + offset``; -1 stores
            nothing.
        num_heads: Query heads.
        num_kv_heads: Key-value heads.

    Returns:
        The queries, [tokens, num_heads, head_dim].
    """
    tokens, head_dim = qkv.shape[0], q_weight.shape[0]
    q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens > 0:
        sizes, num_warps = _launch_sizes(num_heads, num_kv_heads, head_dim)
        groups = triton.cdiv(num_heads, sizes["Q_TILE"]) + triton.cdiv(num_kv_heads, sizes["KV_TILE"])
        _qk_norm_rope_store_kernel[(tokens, groups)](
            qkv,
            qkv.stride(0),
            q_weight,
            k_weight,
            eps,
            cos,
            sin,
            positions,
            keys,
            keys.stride(0),
            keys.stride(1),
            keys.stride(2),
            values,
            values.stride(0),
            values.stride(1),
            values.stride(2),
            slot_mapping,
            q,
            HEADS=num_heads,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=keys.shape[2],
            **sizes,
            **launch_options(qkv.device),
            num_warps=num_warps,
        )
    return q


def qk_norm_rope_store_reference(
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
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """:func:`qk_norm_rope_store` by torch's operators."""
    head_dim, block_size = q_weight.shape[0], keys.shape[2]
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    q = _rotate(rms_norm_reference(q, q_weight, eps)[0], cos[positions], sin[positions])
    k = _rotate(rms_norm_reference(k, k_weight, eps)[0], cos[positions], sin[positions])
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    keys[slots // block_size, :, slots % block_size] = k[stored]
    values[slots // block_size, :, slots % block_size] = v[stored]
    return q


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x`` [tokens, heads, head_dim] turned by angles of the given cosines and sines [tokens, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat(((first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)), dim=-1)
    return rotated.to(x.dtype)


def _launch_sizes(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[dict[str, int], int]:
    """Tile sizes and warps.

    Up to 16 heads a program: a decode step's tokens alone then fill the processors, a prefill's programs are not too
    many. Of a half head a thread loads 8 elements, 16 bytes of bfloat16.
    """
    half_tile = triton.next_power_of_2(head_dim // 2)
    sizes = {
        "HALF_TILE": half_tile,
        "Q_TILE": min(triton.next_power_of_2(num_heads), 16),
        "KV_TILE": min(triton.next_power_of_2(num_kv_heads), 16),
    }
    return sizes, min(max(sizes["Q_TILE"] * half_tile // 256, 1), 8)
