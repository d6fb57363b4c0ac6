"""The inputs of a decode step, from tables that stay on the device: the host need not know the tokens yet."""

import torch
import triton
import triton.language as tl

_BLOCK = 128


@triton.jit(do_not_specialize=["rows"])
def _decode_inputs_kernel(
    slots,
    num_computed,
    token_ids,
    token_ids_stride,
    max_len,
    block_tables,
    block_tables_stride,
    max_blocks,
    param_table,  # not "params", a name that Triton's launcher has for itself
    input_ids,
    positions,
    slot_mapping,
    context_lengths,
    row_params,
    rows,
    BLOCK_SIZE: tl.constexpr,
    PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(slots + row, mask=inside, other=-1).to(tl.int64)
    mask = slot >= 0
    found = tl.load(num_computed + slot, mask=mask, other=0)
    # A released slot may count on past the end of its lines for a step, until the host hears of it.
    last = tl.minimum(max_len, max_blocks * BLOCK_SIZE) - 1
    position = tl.maximum(tl.minimum(found, last), 0)
    token = tl.load(token_ids + slot * token_ids_stride + position, mask=mask, other=0)
    block = tl.load(block_tables + slot * block_tables_stride + position // BLOCK_SIZE, mask=mask, other=0)
    target = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(input_ids + row, token.to(tl.int64), mask=inside)
    tl.store(positions + row, position.to(tl.int64), mask=inside)
    tl.store(slot_mapping + row, tl.where(mask & (found == position), target, -1), mask=inside)
    tl.store(context_lengths + row, tl.where(mask, position + 1, 0), mask=inside)
    for column in tl.static_range(PARAMS):
        param = tl.load(param_table + slot * PARAMS + column, mask=mask, other=0)
        tl.store(row_params + row * PARAMS + column, param, mask=inside)


def decode_inputs(
    slots: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    params: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    context_lengths: torch.Tensor,
    row_params: torch.Tensor,
) -> None:
    """Fill the inputs of a step that computes the next token of every row.

    A row whose position lies beyond the tables gets the last one that does not, and stores nothing.

    Args:
        slots: [rows], int32: each row's line of the tables; -1 for a row that is none, which gets token 0 at position
            0, a context of length 0, and stores nothing.
        num_computed: [slots], int32: tokens in the cache, which is the position of the next.
        token_ids: [slots, max_len + 1], int32; the last column takes a token, but is never an input.
        block_tables: [slots, blocks], int32: KV blocks in order.
        block_size: Tokens a KV block.
        params: [slots, parameters], int32, packed: the lines' sampling parameters.
        input_ids: [rows], int64, written.
        positions: [rows], int64, written.
        slot_mapping: [rows], int64, written: ``block * block_size + offset``; -1 where nothing is to be stored.
        context_lengths: [rows], int32, written: tokens to attend to, this step's included.
        row_params: [rows, parameters], int32, packed, written: the rows'; zeros for one that is none.
    """
    rows = slots.shape[0]
    if rows > 0:
        _decode_inputs_kernel[(triton.cdiv(rows, _BLOCK),)](
            slots,
            num_computed,
            token_ids,
            token_ids.stride(0),
            token_ids.shape[1] - 1,
            block_tables,
            block_tables.stride(0),
            block_tables.shape[1],
            params,
            input_ids,
            positions,
            slot_mapping,
            context_lengths,
            row_params,
            rows,
            BLOCK_SIZE=block_size,
            PARAMS=params.shape[1],
            BLOCK=_BLOCK,
            num_warps=_BLOCK // 32,
        )


def decode_inputs_reference(
    slots: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    params: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    context_lengths: torch.Tensor,
    row_params: torch.Tensor,
) -> None:
    """:func:`decode_inputs` by torch's operators."""
    is_row = slots >= 0
    lines = slots.long().clamp(min=0)
    found = num_computed[lines].long()
    limit = min(token_ids.shape[1] - 1, block_tables.shape[1] * block_size)
    position = found.clamp(max=limit - 1).clamp(min=0)
    target = block_tables[lines, position // block_size].long() * block_size + position % block_size
    input_ids.copy_(token_ids[lines, position].masked_fill(~is_row, 0))
    positions.copy_(position.masked_fill(~is_row, 0))
    slot_mapping.copy_(target.masked_fill(~is_row | (found != position), -1))
    context_lengths.copy_((position + 1).masked_fill(~is_row, 0))
    row_params.copy_(params[lines].masked_fill(~is_row[:, None], 0))
