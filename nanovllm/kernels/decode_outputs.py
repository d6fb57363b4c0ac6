"""The tokens of a decode step, back into the tables on the device that the next step is prepared from."""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.dependent_launch import launch_options, let_next_kernel_start, wait_for_previous_kernel

_BLOCK = 128


@triton.jit(do_not_specialize=["rows"])
def _decode_outputs_kernel(
    slots,
    tokens,
    num_computed,
    token_ids,
    token_ids_stride,
    token_ids_columns,
    sampled,
    rows,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_kernel_start(OVERLAPS)
    wait_for_previous_kernel(OVERLAPS)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(slots + row, mask=inside, other=-1).to(tl.int64)
    mask = slot >= 0
    token = tl.load(tokens + row, mask=mask, other=-1).to(tl.int32)
    tl.store(sampled + row, token, mask=inside)
    place = tl.load(num_computed + slot, mask=mask, other=0) + 1
    fits = mask & (place >= 0) & (place < token_ids_columns)
    tl.store(token_ids + slot * token_ids_stride + place, tl.maximum(token, 0), mask=fits)
    tl.store(num_computed + slot, place, mask=fits)


def decode_outputs(
    slots: torch.Tensor,
    tokens: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
    sampled: torch.Tensor,
) -> None:
    """Append every row's sampled token to its line of the tables, whose input has now been computed.

    A line that is full already stays as it is.

    Args:
        slots: [rows], int32: each row's line of the tables, no two the same; -1 for a row that is none.
        tokens: [rows], int64; -1 where none could be sampled, for which the tables get 0.
        num_computed: [slots], int32, written: one more than before.
        token_ids: [slots, max_len + 1], int32, written.
        sampled: [rows], int32, written: ``tokens``, and -1 for a row that is none.
    """
    rows = slots.shape[0]
    if rows > 0:
        _decode_outputs_kernel[(triton.cdiv(rows, _BLOCK),)](
            slots,
            tokens,
            num_computed,
            token_ids,
            token_ids.stride(0),
            token_ids.shape[1],
            sampled,
            rows,
            BLOCK=_BLOCK,
            num_warps=_BLOCK // 32,
            **launch_options(slots.device),
        )


def decode_outputs_reference(
    slots: torch.Tensor,
    tokens: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
    sampled: torch.Tensor,
) -> None:
    """:func:`decode_outputs` by torch's operators."""
    is_row = slots >= 0
    sampled.copy_(tokens.masked_fill(~is_row, -1))
    lines = slots.long().clamp(min=0)
    place = num_computed[lines].long() + 1
    fits = is_row & (place >= 0) & (place < token_ids.shape[1])
    place = place.clamp(0, token_ids.shape[1] - 1)
    # Differences are added, 0 for what is not written: a mask as an index would make the host wait for it.
    written = tokens.clamp(min=0).int() - token_ids[lines, place]
    token_ids.index_put_((lines, place), written.where(fits, 0), accumulate=True)
    num_computed.index_put_((lines,), fits.int(), accumulate=True)
