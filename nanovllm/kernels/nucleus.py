"""Draws from the nucleus of top_p where it is large, by rejection, without the host waiting for any attempt.

A draw is kept if the tokens ahead of it, those more likely, do not reach top_p; otherwise the next one is among those
ahead. What ``layers/sampler.py`` does for rows whose top_p the most likely tokens do not reach, with the same noise.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels import LOG2_E
from nanovllm.kernels.sample import block_noise, inverse_temperature, row_words, token_noise
from nanovllm.layers.noise import GOLDEN, block_words, exponential_noise, signed_word, token_words
from nanovllm.layers.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE
from nanovllm.layers.top_tokens import BLOCK, in_blocks

_TILE = 32  # blocks at a time

_GOLDEN = tl.constexpr(GOLDEN & 0xFFFFFFFF)
# Every rejection leaves a uniform share of what was left, on average, so n of them take place with a probability of
# about log(1 / top_p)^n / n!: for 64 and the top_p of 0.0004 that 64 of 152,000 tokens always reach, 10^-32.
_MOST_ATTEMPTS = tl.constexpr(64)


@triton.jit
def _weights_ahead(line, ids, vocab_size, peak, scale, least, pivot, token, HAS_MIN_P: tl.constexpr):
    """Weights of tokens of a row; 0 for those not ahead of ``token``, whose logit is ``pivot``."""
    x = tl.load(line + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    weights = tl.exp2((x - peak) * scale)
    if HAS_MIN_P:
        weights = tl.where(weights >= least, weights, 0.0)
    return tl.where((x > pivot) | ((x == pivot) & (ids < token)), weights, 0.0)


@triton.jit(do_not_specialize=["temperature_stride", "min_p_stride", "top_p_stride", "keys_stride", "positions_stride"])
def _nucleus_kernel(
    logits,
    logits_stride,
    sums,
    sums_stride,
    peaks,
    temperature,
    temperature_stride,
    min_p,
    min_p_stride,
    top_p,
    top_p_stride,
    keys,
    keys_stride,
    positions,
    positions_stride,
    pending,
    tokens,
    vocab_size,
    HAS_MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    infinity = float("inf")
    peak = tl.load(peaks + row)
    is_pending = tl.load(pending + row).to(tl.int32)
    # A row from which nothing can be drawn stays as it is.
    attempt = tl.where((is_pending != 0) & (tl.abs(peak) < infinity), 0, _MOST_ATTEMPTS)
    if attempt == 0:
        line = logits + row * logits_stride
        scale = inverse_temperature(tl.load(temperature + row * temperature_stride))
        least = tl.load(min_p + row * min_p_stride)
        position = tl.load(positions + row * positions_stride)
        key = tl.load(keys + row * keys_stride)
        other_key = tl.load(keys + row * keys_stride + 1).to(tl.uint32)
        second, factor = row_words(position, key, other_key)
        inside = tl.arange(0, BLOCK)

        blocks = tl.arange(0, BLOCKS)
        whole = tl.load(sums + row * sums_stride + blocks, mask=blocks < NUM_BLOCKS, other=0.0)
        target = tl.load(top_p + row * top_p_stride) * tl.sum(whole, axis=0)
        block = tl.argmax(whole / block_noise(blocks, second, factor), axis=0)
        pivot = peak - infinity  # the logit and the id of the last draw: at first, everything is ahead
        token = tl.zeros_like(block) + vocab_size

        while attempt < _MOST_ATTEMPTS:
            places = block * BLOCK + inside
            weights = _weights_ahead(line, places, vocab_size, peak, scale, least, pivot, token, HAS_MIN_P)
            token = block * BLOCK + tl.argmax(weights / token_noise(places, second, factor), axis=0)
            pivot = tl.load(line + token).to(tl.float32)

            # One walk over the row: the sums of what is ahead by block, their total, and the next draw among them.
            attempt += 1
            second, factor = row_words(position, key, other_key ^ (attempt.to(tl.uint32) * _GOLDEN))
            totals = tl.zeros([TILE], tl.float32)
            best_scores = tl.full([TILE], -1.0, tl.float32)
            best_blocks = tl.zeros([TILE], tl.int32)
            for first in range(0, NUM_BLOCKS, TILE):
                tile = first + tl.arange(0, TILE)
                ids = tile[:, None] * BLOCK + inside[None, :]
                left = _weights_ahead(line, ids, vocab_size, peak, scale, least, pivot, token, HAS_MIN_P)
                found = tl.sum(left, axis=1)
                scores = found / block_noise(tile, second, factor)
                totals += found
                best_blocks = tl.where(scores > best_scores, tile, best_blocks)
                best_scores = tl.maximum(scores, best_scores)
            best = tl.max(best_scores, axis=0)
            block = tl.min(tl.where(best_scores == best, best_blocks, NUM_BLOCKS), axis=0)
            ahead = tl.sum(totals, axis=0)
            attempt = tl.where((ahead >= target) & (ahead > 0), attempt, _MOST_ATTEMPTS)
        tl.store(tokens + row, token.to(tl.int64))


def nucleus(
    logits: torch.Tensor,
    sums: torch.Tensor,
    peaks: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor | None,
    top_p: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    pending: torch.Tensor,
    tokens: torch.Tensor,
    vocab_size: int,
) -> None:
    """Draw a token for each row that is pending, from the smallest set of most likely tokens that reaches top_p.

    Args:
        logits: [rows, at least vocab_size], any float dtype up to float32; what is beyond the vocabulary is ignored.
            The last dimension is packed, rows may be strided.
        sums: float32 [rows, blocks], sums by block of the weights exp((logit - peak) / temperature) that min_p keeps.
        peaks: float32 [rows], largest logits. Rows where they are not finite stay as they are.
        temperature: float32 [rows], more than 0.
        min_p: float32 [rows], the least weight that is kept; None keeps all.
        top_p: float32 [rows].
        keys: int32 [rows, 2], noise keys; the last dimension is packed.
        positions: Integers [rows], positions of the tokens to be sampled.
        pending: bool [rows], which rows.
        tokens: int64 [rows], packed, written where rows are pending.
        vocab_size: Token ids.
    """
    rows, num_blocks = sums.shape
    if rows > 0:
        least = top_p if min_p is None else min_p
        _nucleus_kernel[(rows,)](
            logits,
            logits.stride(0),
            sums,
            sums.stride(0),
            peaks,
            temperature,
            temperature.stride(0),
            least,
            least.stride(0),
            top_p,
            top_p.stride(0),
            keys,
            keys.stride(0),
            positions,
            positions.stride(0),
            pending,
            tokens,
            vocab_size,
            HAS_MIN_P=min_p is not None,
            BLOCK=BLOCK,
            NUM_BLOCKS=num_blocks,
            BLOCKS=triton.next_power_of_2(num_blocks),
            TILE=_TILE,
            num_warps=8,
        )


def nucleus_reference(
    logits: torch.Tensor,
    sums: torch.Tensor,
    peaks: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor | None,
    top_p: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    pending: torch.Tensor,
    tokens: torch.Tensor,
    vocab_size: int,
) -> None:
    """:func:`nucleus` by torch's operators, row by row."""
    blocks = in_blocks(logits[:, :vocab_size].float())
    num_blocks, device = blocks.shape[1], logits.device
    of_blocks = block_words(num_blocks, device)
    of_tokens = token_words(num_blocks * BLOCK, device).view(num_blocks, BLOCK)
    ids = torch.arange(num_blocks * BLOCK, device=device).view(num_blocks, BLOCK)
    for row in (pending & peaks.isfinite()).nonzero()[:, 0].tolist():
        scale = LOG2_E / temperature[row].clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
        weights = ((blocks[row] - peaks[row]) * scale).exp2()
        if min_p is not None:
            weights = weights * (weights >= min_p[row])
        left, target = sums[row], top_p[row] * sums[row].sum()
        for attempt in range(_MOST_ATTEMPTS.value):
            change = torch.tensor([0, signed_word(attempt * GOLDEN & 0xFFFFFFFF)], dtype=torch.int32, device=device)
            key, position = (keys[row] ^ change)[None], positions[row : row + 1]
            block = (left / exponential_noise(key, position, of_blocks)[0]).argmax()
            token = block * BLOCK + (weights[block] / exponential_noise(key, position, of_tokens[block])[0]).argmax()
            pivot = blocks[row].flatten()[token]
            weights = weights * ((blocks[row] > pivot) | ((blocks[row] == pivot) & (ids < token)))
            left = weights.sum(dim=-1)
            if not left.sum() >= target or not left.any():
                break
        tokens[row] = token
