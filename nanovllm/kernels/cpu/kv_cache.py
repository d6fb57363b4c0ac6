"""The layout of the CPU's KV cache, in which a block of keys or values is the right factor of a tile as it lies.

All is in elements of 4 bytes: a float32, or a pair of bfloat16.

- A block of keys, for each KV head: [head_dim / pair, block_size] elements, pairs along head_dim. The scores of 16
  tokens are the lanes of one vector, and no sum over lanes is ever taken.
- A block of values, for each KV head: [block_size / pair, columns] elements, pairs along the tokens; ``columns`` is
  head_dim, padded to whole tiles.
"""

from typing import Any

import torch
from numba import njit, types

from nanovllm.kernels.cpu.tiles import COLUMNS
from nanovllm.kernels.cpu.vectors import LANES, as_float32, as_int32, as_uint16, narrow

BLOCK_MULTIPLE = LANES  # block sizes are multiples of this


def value_columns(head_dim: int) -> int:
    """head_dim, padded to whole tiles."""
    return -(-head_dim // COLUMNS) * COLUMNS


def cache_shapes(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a layer's keys and values, in elements of ``dtype``."""
    pair = pair_of(dtype)
    keys = (num_blocks, num_kv_heads, head_dim // pair, block_size, pair)
    return keys, (num_blocks, num_kv_heads, block_size // pair, value_columns(head_dim), pair)


def pair_of(dtype: torch.dtype) -> int:
    """Elements of ``dtype`` in 4 bytes."""
    return 4 // dtype.itemsize


def store(
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
) -> None:
    """Write keys and values [tokens, kv_heads, head_dim] to their slots, by torch's operators."""
    block_size, pair, head_dim = keys.shape[3], keys.shape[4], new_keys.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    keys[block, :, :, offset] = new_keys.unflatten(2, (-1, pair))
    values[block, :, offset // pair, :head_dim, offset % pair] = new_values


def plain_keys(keys: torch.Tensor) -> torch.Tensor:
    """A copy of a layer's keys, [blocks, kv_heads, block_size, head_dim]. For tests and references."""
    return keys.permute(0, 1, 3, 2, 4).flatten(3)


def plain_values(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A copy of a layer's values, [blocks, kv_heads, block_size, head_dim]. For tests and references."""
    return values.transpose(3, 4).flatten(2, 3)[..., :head_dim]


@njit(inline="always")
def store_key(block: Any, offset: Any, block_size: Any, key: Any, head_dim: Any, is_half: Any) -> None:
    """Write a key, float32 at the address ``key``, to a head's block of keys."""
    source = as_float32(key)
    if is_half:
        pairs = as_int32(block)
        for d in range(head_dim // 2):
            first, second = types.int32(narrow(source[2 * d])), types.int32(narrow(source[2 * d + 1]))
            pairs[d * block_size + offset] = first | (second << types.int32(16))
    else:
        target = as_float32(block)
        for d in range(head_dim):
            target[d * block_size + offset] = source[d]


@njit(inline="always")
def store_value(block: Any, offset: Any, columns: Any, value: Any, head_dim: Any, is_half: Any) -> Any:
    """Write a value, of the cache's dtype at the address ``value``, to a head's block of values.

    The other value of a pair of bfloat16 is read and written again, so nobody else may write it at the same time.

    Returns:
        Whether it is finite. (Beside a weight of 0, what is not makes NaN of a sum.)
    """
    largest = types.int32(0)
    if is_half:
        halves, target = as_uint16(value), as_int32(block + offset // 2 * columns * 4)
        shift = types.int32(16 * (offset % 2))
        kept = types.int32(-1) ^ (types.int32(0xFFFF) << shift)
        for d in range(head_dim):
            half = types.int32(halves[d])
            target[d] = (target[d] & kept) | (half << shift)
            largest = max(largest, half & types.int32(0x7F80))
        return largest != types.int32(0x7F80)
    words, whole = as_int32(value), as_int32(block + offset * columns * 4)
    for d in range(head_dim):
        whole[d] = words[d]
        largest = max(largest, words[d] & types.int32(0x7F800000))
    return largest != types.int32(0x7F800000)
