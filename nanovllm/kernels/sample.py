"""A token for each row of logits, drawn from the whole vocabulary at a temperature, or the most likely one.

What ``layers/sampler.py`` does for rows without top_k, top_p and min_p, with the same noise, reading the logits once.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels import LOG2_E
from nanovllm.kernels.dependent_launch import launch_options, let_next_kernel_start, wait_for_previous_kernel
from nanovllm.layers import noise
from nanovllm.layers.noise import block_words, exponential_noise, token_words
from nanovllm.layers.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE
from nanovllm.layers.top_tokens import BLOCK, in_blocks

_TILE = 32  # blocks a program measures: 32 elements a thread of 4 warps

# Kernels see no other globals. The words are unsigned there: shifts are logical, products wrap around.
_GOLDEN = tl.constexpr(noise.GOLDEN & 0xFFFFFFFF)
_MULTIPLIER_A = tl.constexpr(noise.MULTIPLIER_A & 0xFFFFFFFF)
_MULTIPLIER_B = tl.constexpr(noise.MULTIPLIER_B & 0xFFFFFFFF)
_UNIT = tl.constexpr(2.0**-31 * (1 - 2.0**-24))
_LOWEST = tl.constexpr(MIN_TEMPERATURE)
_HIGHEST = tl.constexpr(MAX_TEMPERATURE)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MULTIPLIER_A
    x = (x ^ (x >> 15)) * _MULTIPLIER_B
    return x ^ (x >> 16)


@triton.jit
def row_words(position, key, other_key):
    """The two words that a row's noise depends on, from its position and the two of its key."""
    first = _mix(position.to(tl.uint32) * _GOLDEN + key.to(tl.uint32))
    second = _mix(first ^ other_key.to(tl.uint32))
    return second, _mix(first + second) | 1


@triton.jit
def _exponential(words, second, factor):
    bits = (words ^ second) * factor
    bits = (bits ^ (bits >> 16)) * _MULTIPLIER_A
    bits = bits ^ (bits >> 15)
    u = ((bits >> 1).to(tl.int32).to(tl.float32) + 0.5) * _UNIT
    # -log(1 - u): near 0, where the draws that win are, by the series of 2 artanh(u / (2 - u)). Above 1/2, 1 - u is
    # exact, and not even an approximate logarithm is far off.
    t = u / (2.0 - u)
    s = t * t
    series = 1.0 / 13 + s * (1.0 / 15)
    series = 1.0 / 11 + s * series
    series = 1.0 / 9 + s * series
    series = 1.0 / 7 + s * series
    series = 1.0 / 5 + s * series
    series = 1.0 / 3 + s * series
    return tl.where(u < 0.5, 2.0 * (t + t * (s * series)), -tl.log(1.0 - u))


@triton.jit
def block_noise(blocks, second, factor):
    """``exponential_noise`` of the words of blocks."""
    return _exponential(_mix((blocks.to(tl.uint32) ^ 0xFFFFFFFF) * _GOLDEN), second, factor)


@triton.jit
def token_noise(tokens, second, factor):
    """``exponential_noise`` of the words of tokens."""
    return _exponential(_mix(tokens.to(tl.uint32) * _GOLDEN), second, factor)


@triton.jit
def inverse_temperature(temperature):
    """What differences of logits are multiplied by to get weights as powers of 2."""
    return _LOG2_E / tl.minimum(tl.maximum(temperature, _LOWEST), _HIGHEST)


# Strides of what rows have one or two of are not worth a variant; those of logits decide how wide loads are.
@triton.jit(do_not_specialize=["temperature_stride"])
def _measure_kernel(
    logits,
    logits_stride,
    temperature,
    temperature_stride,
    maxima,
    sums,
    measures_stride,
    vocab_size,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Largest logits of some blocks of a row, inf if one is NaN, and sums of weights relative to these."""
    let_next_kernel_start(OVERLAPS)
    wait_for_previous_kernel(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    infinity = float("inf")
    x = tl.load(logits + row * logits_stride + column, mask=column < vocab_size, other=-infinity).to(tl.float32)
    x = tl.where(x == x, x, infinity)  # maxima pass over NaN
    highest = tl.max(x, axis=1)
    base = tl.where(tl.abs(highest) < infinity, highest, 0.0)  # -inf - -inf would be NaN
    scale = inverse_temperature(tl.load(temperature + row * temperature_stride))
    weights = tl.exp2((x - base[:, None]) * scale)
    # Rows of measures hold whole tiles.
    tl.store(maxima + row * measures_stride + block, highest)
    tl.store(sums + row * measures_stride + block, tl.sum(weights, axis=1))


@triton.jit(do_not_specialize=["temperature_stride", "keys_stride", "positions_stride"])
def _draw_kernel(
    logits,
    logits_stride,
    temperature,
    temperature_stride,
    keys,
    keys_stride,
    positions,
    positions_stride,
    maxima,
    sums,
    measures_stride,
    tokens,
    vocab_size,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A block of a row, then a token of it."""
    let_next_kernel_start(OVERLAPS)
    wait_for_previous_kernel(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    infinity = float("inf")
    blocks = tl.arange(0, BLOCKS)
    measured = blocks < measures_stride
    highest = tl.load(maxima + row * measures_stride + blocks, mask=measured, other=-infinity)
    total = tl.load(sums + row * measures_stride + blocks, mask=measured, other=0.0)
    heat = tl.load(temperature + row * temperature_stride)
    scale = inverse_temperature(heat)
    greedy = heat == 0
    position = tl.load(positions + row * positions_stride)
    key = tl.load(keys + row * keys_stride)
    other_key = tl.load(keys + row * keys_stride + 1)
    second, factor = row_words(position, key, other_key)

    peak = tl.max(highest, axis=0)
    valid = tl.abs(peak) < infinity
    base = tl.where(valid, peak, 0.0)
    weights = total * tl.exp2((highest - base) * scale)
    block = tl.argmax(tl.where(greedy, highest, weights / block_noise(blocks, second, factor)), axis=0)

    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * logits_stride + token, mask=token < vocab_size, other=-infinity).to(tl.float32)
    weights = tl.exp2((x - base) * scale)
    place = tl.argmax(tl.where(greedy, x, weights / token_noise(token, second, factor)), axis=0)
    tl.store(tokens + row, tl.where(valid, block * BLOCK + place, -1).to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """Draw a token for each row.

    Args:
        logits: [rows, at least vocab_size], any float dtype up to float32; what is beyond the vocabulary is ignored.
            The last dimension is packed, rows may be strided.
        temperature: float32 [rows]; 0 is greedy: the most likely token, the lowest id of several.
        keys: int32 [rows, 2], noise keys; the last dimension is packed.
        positions: Integers [rows], positions of the tokens to be sampled.
        vocab_size: Token ids.

    Returns:
        int64 [rows], token ids; -1 if a logit is NaN or inf, or all are -inf.
    """
    rows = logits.shape[0]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows > 0:
        tiles = triton.cdiv(vocab_size, BLOCK * _TILE)
        measures = torch.empty((2, rows, tiles * _TILE), dtype=torch.float32, device=logits.device)
        maxima, sums = measures[0], measures[1]
        stride, heat_stride = logits.stride(0), temperature.stride(0)
        options = launch_options(logits.device)
        _measure_kernel[(rows, tiles)](
            logits,
            stride,
            temperature,
            heat_stride,
            maxima,
            sums,
            tiles * _TILE,
            vocab_size,
            BLOCK=BLOCK,
            TILE=_TILE,
            num_warps=4,
            **options,
        )
        _draw_kernel[(rows,)](
            logits,
            stride,
            temperature,
            heat_stride,
            keys,
            keys.stride(0),
            positions,
            positions.stride(0),
            maxima,
            sums,
            tiles * _TILE,
            tokens,
            vocab_size,
            BLOCK=BLOCK,
            BLOCKS=triton.next_power_of_2(tiles * _TILE),
            num_warps=4,
            **options,
        )
    return tokens


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """:func:`sample` by torch's operators."""
    blocks = in_blocks(logits[:, :vocab_size].float())  # [rows, blocks, BLOCK]
    num_blocks, every = blocks.shape[1], torch.arange(len(blocks), device=blocks.device)
    maxima = blocks.amax(dim=-1)
    peaks = maxima.amax(dim=-1, keepdim=True)
    scale = (LOG2_E / temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE))[:, None]
    weights = ((blocks - peaks[:, :, None]) * scale[:, :, None]).exp2()
    greedy = (temperature == 0)[:, None]

    words = block_words(num_blocks, blocks.device)
    drawn = weights.sum(dim=-1) / exponential_noise(keys, positions, words)
    block = maxima.where(greedy, drawn).argmax(dim=-1)
    words = token_words(num_blocks * BLOCK, blocks.device).view(num_blocks, BLOCK)[block]
    drawn = weights[every, block] / exponential_noise(keys, positions, words)
    place = blocks[every, block].where(greedy, drawn).argmax(dim=-1)
    return (block * BLOCK + place).masked_fill(~peaks[:, 0].isfinite(), -1)
