"""Sampling: from logits to token ids, all rows at once.

The noise of a draw is a pure function of (key of the request, position of the token, token id). So a request gets
the same tokens whatever else is in its batch, however its prompt was cut up, and on however many ranks it runs.
Adding Gumbel noise to the scaled logits and taking the argmax draws from their softmax (Gumbel, 1954; Maddison et
al., 2014, https://arxiv.org/abs/1411.0030). It needs no normalisation, and maxima of parts can be combined.
"""

from dataclasses import dataclass

import torch
from torch import nn

# Noise that fits a core's cache besides its input: 512 KiB.
CACHED_ELEMENTS = 1 << 17


def _signed(word: int) -> int:
    """A 32-bit word as a Python int that an int32 tensor accepts."""
    return word - (1 << 32) if word >= 1 << 31 else word


# Odd multipliers of a 32-bit avalanche function: xor-shift and multiply, twice.
_MULTIPLIER_A = _signed(0x7FEB352D)
_MULTIPLIER_B = _signed(0x846CA68B)
_GOLDEN = _signed(0x9E3779B1)  # 2^32 / golden ratio, to spread consecutive integers


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int32: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words in which every input bit flips about half of the output bits."""
    x = (x ^ _shift_right(x, 16)) * _MULTIPLIER_A
    x = (x ^ _shift_right(x, 15)) * _MULTIPLIER_B
    return x ^ _shift_right(x, 16)


def token_words(vocab_size: int, device: torch.device) -> torch.Tensor:
    """A well-mixed word for each token id, int32 [vocab_size]."""
    return _mix(torch.arange(vocab_size, dtype=torch.int32, device=device) * _GOLDEN)


def exponential_noise(keys: torch.Tensor, positions: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Counter-based draws from the exponential distribution of rate 1.

    Args:
        keys: int32 [rows, 2], the requests' 64-bit keys.
        positions: int64 [rows], positions of the tokens to be sampled.
        words: int32 [vocab_size], the token ids' words (:func:`token_words`).

    Returns:
        float32 [rows, vocab_size], each in [2^-32, 17].
    """
    first = _mix(positions.to(torch.int32) * _GOLDEN + keys[:, 0])
    second = _mix(first ^ keys[:, 1])
    # Two words a row, so that rows whose first words collide still differ.
    bits = (words ^ second[:, None]) * (_mix(first + second)[:, None] | 1)
    bits ^= _shift_right(bits, 16)
    bits *= _MULTIPLIER_A
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


@dataclass(slots=True)
class SamplingRows:
    """How each row of logits is sampled. The flags are known on the host, so that no row pays for what none asks.

    Args:
        temperature: float32 [rows]; 0 is greedy.
        top_k: int64 [rows]; 0 keeps all.
        top_p: float32 [rows].
        keys: int32 [rows, 2], noise keys.
        positions: int64 [rows], positions of the tokens to be sampled.
        all_greedy: Every temperature is 0.
        any_greedy: Some temperature is 0.
        any_truncated: Some row has a top_k or a top_p.
        num_candidates: The largest top_k if every truncated row has one, else 0.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    all_greedy: bool
    any_greedy: bool
    any_truncated: bool
    num_candidates: int = 0


class Sampler(nn.Module):
    """Samples a token id for each row of logits.

    Args:
        vocab_size: Columns of the logits.
        device: Where they are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        super().__init__()
        self.words = token_words(vocab_size, device)

    def forward(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """logits float32 [rows, vocab_size], which it may overwrite -> token ids int64 [rows]."""
        if rows.all_greedy:
            return logits.argmax(dim=-1)
        greedy_tokens = logits.argmax(dim=-1) if rows.any_greedy else None
        scores = logits.div_(rows.temperature.masked_fill(rows.temperature == 0, 1.0)[:, None])
        if rows.any_truncated:
            scores = truncate(scores, rows.top_k, rows.top_p, rows.num_candidates)
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        # On the CPU a few rows at a time: the noise takes a dozen passes, which should find their data in the cache.
        step = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else logits.shape[0]
        for first in range(0, logits.shape[0], step):
            part = slice(first, first + step)
            noise = exponential_noise(rows.keys[part], rows.positions[part], self.words)
            tokens[part] = scores[part].sub_(noise.log_()).argmax(dim=-1)
        return tokens if greedy_tokens is None else torch.where(rows.temperature == 0, greedy_tokens, tokens)


def truncate(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, num_candidates: int = 0) -> torch.Tensor:
    """Set to -inf what top-k, then top-p leave out.

    Of equally likely tokens on the edge, those with the lower ids are kept. So what is kept depends on the row alone.

    Args:
        scores: Logits over temperature, float32 [rows, vocab_size].
        top_k: int64 [rows]; 0 keeps all.
        top_p: float32 [rows]; the smallest set of the most likely tokens whose probability reaches it is kept.
        num_candidates: At least every truncated row's top_k; 0 if one has none, for then all tokens must be sorted.
    """
    if 0 < num_candidates < scores.shape[-1]:
        ordered = scores.topk(num_candidates, dim=-1).values
    else:
        ordered = scores.sort(dim=-1, descending=True).values
    rank = torch.arange(ordered.shape[-1], device=scores.device)
    inside = (top_k[:, None] == 0) | (rank < top_k[:, None])
    probabilities = ordered.masked_fill(~inside, float("-inf")).softmax(dim=-1)
    # A token is kept while the more likely ones do not yet reach top_p; 1 keeps all, whatever the sum rounds to.
    before = probabilities.cumsum(dim=-1) - probabilities
    inside &= (before < top_p[:, None]) | (top_p[:, None] >= 1.0) | (rank == 0)
    kept = inside.sum(dim=-1, keepdim=True)
    edge = ordered.gather(-1, kept - 1)
    above, at_edge = scores > edge, scores == edge
    above |= at_edge & (at_edge.cumsum(dim=-1, dtype=torch.int32) <= kept - above.sum(dim=-1, keepdim=True))
    above |= ((top_k == 0) & (top_p >= 1.0))[:, None]  # a row that asks for nothing keeps everything
    return scores.masked_fill(~above, float("-inf"))
