"""Counter-based noise: a pure function of (key of a request, position of a token, word of a token or block).

No generator is advanced, so that a draw does not depend on what else is in the batch, nor on what was drawn before.
The kernels have the same functions once more (``nanovllm/kernels/sample.py``): to the bit, up to the logarithm.
"""

import torch


def signed_word(word: int) -> int:
    """A 32-bit word as a Python int that an int32 tensor accepts."""
    return word - (1 << 32) if word >= 1 << 31 else word


# Odd multipliers of a 32-bit avalanche function: xor-shift and multiply, twice.
MULTIPLIER_A = signed_word(0x7FEB352D)
MULTIPLIER_B = signed_word(0x846CA68B)
GOLDEN = signed_word(0x9E3779B1)  # 2^32 / golden ratio, to spread consecutive integers


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int32: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words in which every input bit flips about half of the output bits."""
    x = (x ^ _shift_right(x, 16)) * MULTIPLIER_A
    x = (x ^ _shift_right(x, 15)) * MULTIPLIER_B
    return x ^ _shift_right(x, 16)


def token_words(vocab_size: int, device: torch.device) -> torch.Tensor:
    """A well-mixed word for each token id, int32 [vocab_size]."""
    return _mix(torch.arange(vocab_size, dtype=torch.int32, device=device) * GOLDEN)


def block_words(num_blocks: int, device: torch.device) -> torch.Tensor:
    """A well-mixed word for each block, int32 [num_blocks]; none is a token's, for _mix is a bijection."""
    return _mix((-1 - torch.arange(num_blocks, dtype=torch.int32, device=device)) * GOLDEN)


def exponential_noise(keys: torch.Tensor, positions: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Counter-based draws from the exponential distribution of rate 1.

    Args:
        keys: int32 [rows, 2], the requests' 64-bit keys.
        positions: int64 [rows], positions of the tokens to be sampled.
        words: int32 [words] or [rows, words], of tokens or blocks (:func:`token_words`, :func:`block_words`).

    Returns:
        float32 [rows, words], each in [2^-32, 17].
    """
    first = _mix(positions.to(torch.int32) * GOLDEN + keys[:, 0])
    second = _mix(first ^ keys[:, 1])
    # Two words a row, so that rows whose first words collide still differ.
    bits = (words ^ second[:, None]) * (_mix(first + second)[:, None] | 1)
    bits ^= _shift_right(bits, 16)
    bits *= MULTIPLIER_A
    bits ^= _shift_right(bits, 15)
    # -log(1 - u) with u in (0, 1) from 31 bits. The smallest draws decide who wins, and near 0 float32 tells all of
    # them apart; the factor keeps 1 - u, which rounds, above 0. No draw is 0 or infinite: that token would always win,
    # whatever its probability, or never, even if no other is left.
    negative = _shift_right(bits, 1).to(torch.float32).add_(0.5).mul_(-(2.0**-31) * (1 - 2.0**-24))
    return _negative_log1p(negative)


def _negative_log1p(x: torch.Tensor) -> torch.Tensor:
    """-log(1 + x) for x in (-1, 0), exact near 0; may overwrite ``x``."""
    if x.device.type != "mps":
        return x.log1p_().neg_()
    # Before torch 2.8, log1p on MPS was log(1 + x), which is 0 for the smallest x.
    return torch.where(x > -(2.0**-10), -x * (1 - x / 2 + x * x / 3), -torch.log(1 + x))
