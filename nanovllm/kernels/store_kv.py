"""Keys and values into the paged cache."""

import torch
import triton
import triton.language as tl

from nanovllm.kernels import is_interpreted

# Tokens a program: few, so that a decode step's rows occupy all of a GPU. For the interpreter programs are what costs.
TOKENS = 32 if is_interpreted() else 2


@triton.jit(do_not_specialize=["num_tokens"])
def _store_kv_kernel(
    k,
    v,
    keys,
    values,
    slot_mapping,
    num_tokens,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    line = tl.arange(0, TOKENS * PADDED_HEADS)
    token = (tl.program_id(0) * TOKENS + line // PADDED_HEADS).to(tl.int64)
    head = line % PADDED_HEADS
    dim = tl.arange(0, PADDED_DIM)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    mask = ((slot >= 0) & (head < HEADS))[:, None] & (dim < HEAD_DIM)[None, :]
    target = slot // BLOCK_SIZE * BLOCK_STRIDE + slot % BLOCK_SIZE * TOKEN_STRIDE + head * HEAD_STRIDE
    source = token * K_STRIDE + head * HEAD_DIM
    key = tl.load(k + source[:, None] + dim[None, :], mask=mask)
    source = token * V_STRIDE + head * HEAD_DIM
    value = tl.load(v + source[:, None] + dim[None, :], mask=mask)
    tl.store(keys + target[:, None] + dim[None, :], key, mask=mask)
    tl.store(values + target[:, None] + dim[None, :], value, mask=mask)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write a step's keys and values to their places in a layer's cache.

    Args:
        k: [tokens, kv_heads, head_dim]; a token's heads lie packed, tokens may lie apart.
        v: The same.
        keys: [blocks, kv_heads, block_size, head_dim], the last dimension packed; written.
        values: The same, with the same strides.
        slot_mapping: [tokens], int64: ``block * block_size + offset``; -1 for a token that goes nowhere.
    """
    tokens, heads, head_dim = k.shape
    if tokens > 0:
        _store_kv_kernel[(triton.cdiv(tokens, TOKENS),)](
            k,
            v,
            keys,
            values,
            slot_mapping,
            tokens,
            K_STRIDE=k.stride(0),
            V_STRIDE=v.stride(0),
            BLOCK_STRIDE=keys.stride(0),
            HEAD_STRIDE=keys.stride(1),
            TOKEN_STRIDE=keys.stride(2),
            BLOCK_SIZE=keys.shape[2],
            HEADS=heads,
            HEAD_DIM=head_dim,
            PADDED_HEADS=triton.next_power_of_2(heads),
            PADDED_DIM=triton.next_power_of_2(head_dim),
            TOKENS=TOKENS,
            num_warps=4,
        )


def store_kv_reference(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """:func:`store_kv` in torch's operators."""
    kept = slot_mapping >= 0
    slots, block_size = slot_mapping[kept], keys.shape[2]
    keys[slots // block_size, :, slots % block_size] = k[kept]
    values[slots // block_size, :, slots % block_size] = v[kept]
