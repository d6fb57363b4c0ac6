"""Sampling: from logits to token ids, all rows at once.

With s the logits over temperature, the weight of a token is e = exp(s - max s), 1 for the most likely one. Dividing
weights by exponential noise and taking the argmax draws in proportion to them (the Gumbel-max trick; Gumbel, 1954;
Maddison et al., 2014, https://arxiv.org/abs/1411.0030). It needs no normalisation, and maxima of parts can be combined.
How a row's token is drawn depends on that row alone:

- **Of the whole vocabulary**, two such draws: among blocks of 128 consecutive ids by the sums of their weights, then
  among the tokens of the block. A vocabulary of 151,936 takes 1,315 draws of noise.
- **With top_k, or top_p that the 64 most likely tokens reach**, one draw among the kept ones of the most likely tokens.
- **With top_p that these do not reach**, a draw of the whole vocabulary, which is kept if the tokens ahead of it do not
  reach top_p yet; otherwise the next draw is among those ahead. No search for the edge: most first draws are kept.

The noise is a pure function of (key of the request, position of the token, block or token id). So a request gets the
same tokens whatever else is in its batch, however its prompt was cut up, and on however many ranks it runs.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 128
SUBBLOCK = 32
# Tokens among which top_p is tried first. A constant, so that a row's draw does not depend on other rows' top_k.
CANDIDATES = 64

# float32 elements of a temporary. On the CPU a few rows at a time: each pass then finds its data in the cache.
CACHED_ELEMENTS = 1 << 17
DEVICE_ELEMENTS = 1 << 24


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


def block_words(num_blocks: int, device: torch.device) -> torch.Tensor:
    """A well-mixed word for each block, int32 [num_blocks]; none is a token's, for _mix is a bijection."""
    return _mix((-1 - torch.arange(num_blocks, dtype=torch.int32, device=device)) * _GOLDEN)


def exponential_noise(keys: torch.Tensor, positions: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Counter-based draws from the exponential distribution of rate 1.

    Args:
        keys: int32 [rows, 2], the requests' 64-bit keys.
        positions: int64 [rows], positions of the tokens to be sampled.
        words: int32 [words] or [rows, words], of tokens or blocks (:func:`token_words`, :func:`block_words`).

    Returns:
        float32 [rows, words], each in [2^-32, 17].
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
        top_k: int64 [rows]; the k most likely tokens are kept, 0 keeps all.
        top_p: float32 [rows]; of these, the smallest set of the most likely ones whose probability reaches it.
        keys: int32 [rows, 2], noise keys.
        positions: int64 [rows], positions of the tokens to be sampled.
        all_greedy: Every temperature is 0.
        any_greedy: Some temperature is 0.
        any_truncated: Some row has a top_k or a top_p.
        num_candidates: The largest top_k if every truncated row has one, else 0. If 0, a GPU is waited for.
        any_min_p: Some row has a min_p.
        min_p: float32 [rows]; before top_k and top_p, tokens this many times as likely as the most likely one or more
            are kept. None if no row has one.
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
    any_min_p: bool = False
    min_p: torch.Tensor | None = None


def in_blocks(logits: torch.Tensor) -> torch.Tensor:
    """[rows, vocab_size] as [rows, blocks, BLOCK], with -inf after the last token: a view if BLOCK divides it."""
    if logits.shape[1] % BLOCK:
        logits = F.pad(logits, (0, -logits.shape[1] % BLOCK), value=float("-inf"))
    return logits.reshape(len(logits), -1, BLOCK)


def rows_at_a_time(logits: torch.Tensor) -> int:
    """Rows that temporaries as large as the logits should hold."""
    limit = CACHED_ELEMENTS if logits.device.type == "cpu" else DEVICE_ELEMENTS
    return max(1, limit // (logits.numel() // len(logits)))


def most_likely(
    blocks: torch.Tensor, maxima: torch.Tensor, rows: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens of some rows, without sorting the others.

    A token is preferred for its logit, then for its lower id. If k blocks are preferred to a token's block, each for
    its preferred token, k tokens are preferred to that token. So the k first blocks hold the k first tokens.

    Args:
        blocks: float32 [all rows, blocks, BLOCK].
        maxima: float32 [all rows, blocks], their largest logits.
        rows: int64 [rows], which of the rows.
        count: How many a row.

    Returns:
        Logits float32 and token ids int64, [rows, count] each, in the order of preference.
    """
    num_blocks = blocks.shape[1]
    values = maxima[rows]
    ids = torch.arange(num_blocks, device=blocks.device).expand_as(values)
    ids = ids.gather(1, _preferred(values, ids, min(count, num_blocks)))  # [rows, chosen blocks]
    parts = blocks.reshape(-1, BLOCK).index_select(0, (rows[:, None] * num_blocks + ids).flatten())
    for width in (SUBBLOCK, 1):  # each time cut up what is left, and keep as many parts as tokens are wanted
        pieces = parts.shape[1] // width
        parts = parts.view(-1, width)
        values = parts.amax(dim=1).view(len(rows), -1)
        ids = (ids[:, :, None] * pieces + torch.arange(pieces, device=ids.device)).flatten(1)
        chosen = _preferred(values, ids, min(count, ids.shape[1]))
        offsets = torch.arange(len(rows), device=ids.device)[:, None] * ids.shape[1]
        parts = parts.index_select(0, (chosen + offsets).flatten())
        ids = ids.gather(1, chosen)
    return parts.view(len(rows), -1), ids


def _preferred(values: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Where the ``count`` largest of [rows, n] are, the lower id first among equals. (topk alone takes any.)"""
    bits = (values + 0.0).view(torch.int32)  # 0.0 rather than -0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    return ((ordered.long() << 31) - ids).topk(count, dim=-1).indices


class Sampler(nn.Module):
    """Samples a token id for each row of logits.

    Args:
        vocab_size: Columns of the logits.
        device: Where they are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        super().__init__()
        num_blocks = -(-vocab_size // BLOCK)
        self.vocab_size = vocab_size
        self.block_words = block_words(num_blocks, device)
        self.token_words = token_words(num_blocks * BLOCK, device).view(num_blocks, BLOCK)

    def forward(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """logits float32 [rows, vocab_size] -> token ids int64 [rows]; -1 if a logit is NaN or inf, or all are -inf."""
        batch = _Batch(self, logits, rows)
        if rows.all_greedy:
            tokens = batch.greedy()
        else:
            tokens = batch.sample()
            if rows.any_greedy:
                tokens = torch.where(rows.temperature == 0, batch.greedy(), tokens)
        return tokens.masked_fill_(~batch.peaks.isfinite(), -1)


class _Batch:
    """One call of the sampler."""

    def __init__(self, sampler: Sampler, logits: torch.Tensor, rows: SamplingRows) -> None:
        self.sampler = sampler
        self.rows = rows
        self.blocks = in_blocks(logits)
        self.on_cpu = logits.device.type == "cpu"
        self.everything = torch.arange(len(logits), device=logits.device)
        temperature = rows.temperature.clamp(1e-20, 1e20)  # what float32 quotients stand
        self.scale = math.log2(math.e) / temperature  # 2^x costs a third of e^x on the CPU
        self.top_k = rows.top_k.where(rows.top_k < sampler.vocab_size, 0)
        self.truncated = (rows.temperature > 0) & ((self.top_k > 0) | (rows.top_p < 1))
        self._measure()

    def greedy(self) -> torch.Tensor:
        """The most likely tokens, the lowest id of several."""
        block = self.maxima.argmax(dim=-1)
        return block * BLOCK + self.blocks[self.everything, block].argmax(dim=-1)

    def sample(self) -> torch.Tensor:
        """Draws for all rows; greedy ones get any token."""
        tokens = torch.zeros_like(self.everything)
        index = self._select((self.rows.temperature > 0) & ~self.truncated)
        if len(index):
            tokens[index] = self._draw(index)
        if self.rows.any_truncated:
            for index, count in self._candidate_groups():
                drawn, settled = self._draw_candidates(index, count)
                tokens[index] = drawn.where(self.truncated[index], tokens[index])
                if self.rows.num_candidates == 0:
                    index = index[self.truncated[index] & ~settled]
                    for part in index.split(rows_at_a_time(self.blocks)):
                        tokens[part] = self._draw_nucleus(part)
        return tokens

    def _select(self, mask: torch.Tensor) -> torch.Tensor:
        """Rows of a mask. A GPU takes all, and the mask later, lest the host wait for it."""
        return mask.nonzero()[:, 0] if self.on_cpu else self.everything

    def _candidate_groups(self) -> list[tuple[torch.Tensor, int]]:
        """Truncated rows, and how many of their most likely tokens hold what top_k leaves."""
        vocab_size = self.sampler.vocab_size
        if not self.on_cpu:
            largest = self.rows.num_candidates or int(self.top_k.max())
            return [(self.everything, max(CANDIDATES, min(largest, vocab_size)))]
        groups: dict[int, list[int]] = {}  # by power of two: a row with a large top_k is no burden to the others
        for row, (cut, top_k) in enumerate(zip(self.truncated.tolist(), self.top_k.tolist(), strict=True)):
            if cut:
                count = 1 << (top_k - 1).bit_length() if top_k > CANDIDATES else CANDIDATES
                groups.setdefault(count, []).append(row)
        most = max(CANDIDATES, vocab_size)
        return [(torch.tensor(group), min(count, most)) for count, group in groups.items()]

    def _measure(self) -> None:
        """One walk over the logits: maxima and sums of weights of all blocks, [rows, blocks]; maxima of rows."""
        rows, count = self.rows, len(self.blocks)
        needed = [not rows.all_greedy] * count
        if self.on_cpu and not rows.all_greedy:  # neither do rows with a top_k need the sums
            needed = ((rows.temperature > 0) & (self.top_k == 0)).tolist()
        self.maxima = self.blocks.new_empty(self.blocks.shape[:2])
        self.sums = torch.zeros_like(self.maxima)
        step = rows_at_a_time(self.blocks)
        scratch = torch.empty_like(self.blocks[:step])
        for first in range(0, count, step):
            part = slice(first, first + step)
            torch.amax(self.blocks[part], dim=-1, out=self.maxima[part])
            if any(needed[part]):
                weights = self._weights(self.blocks[part], part, self.maxima[part].amax(dim=-1), scratch)
                torch.sum(weights, dim=-1, out=self.sums[part])
        self.peaks = self.maxima.amax(dim=-1)

    def _weights(
        self,
        logits: torch.Tensor,
        index: torch.Tensor | slice,
        peaks: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights of the logits [rows, ...] of the rows ``index``; 0 for what min_p leaves out."""
        shape = (-1,) + (1,) * (logits.dim() - 1)
        out = torch.empty_like(logits) if out is None else out[: len(logits)]
        torch.sub(logits, peaks.view(shape), out=out)
        out.mul_(self.scale[index].view(shape)).exp2_()
        if self.rows.any_min_p and self.rows.min_p is not None:
            limit = self.rows.min_p[index].view(shape)
            if not self.on_cpu or limit.any():
                out.mul_(torch.ge(out, limit, out=torch.empty_like(out)))  # a float mask: far faster than bool
        return out

    def _noise(self, index: torch.Tensor, words: torch.Tensor, attempt: int = 0) -> torch.Tensor:
        first, second = self.rows.keys[index].unbind(dim=1)
        keys = torch.stack([first, second ^ _signed(attempt * _GOLDEN & 0xFFFFFFFF)], dim=1)
        return exponential_noise(keys, self.rows.positions[index], words)

    def _draw(self, index: torch.Tensor) -> torch.Tensor:
        """From the whole vocabulary: a block, then a token of it."""
        block = (self.sums[index] / self._noise(index, self.sampler.block_words)).argmax(dim=-1)
        weights = self._weights(self.blocks[index, block], index, self.peaks[index])
        noise = self._noise(index, self.sampler.token_words[block])
        return block * BLOCK + (weights / noise).argmax(dim=-1)

    def _draw_candidates(self, index: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """From what top_k and top_p keep of the most likely tokens, and whether these hold all that is kept."""
        values, ids = most_likely(self.blocks, self.maxima, index, count)
        top_k, top_p = self.top_k[index, None], self.rows.top_p[index, None]
        weights = self._weights(values, index, self.peaks[index])
        weights = weights.masked_fill_((top_k > 0) & (torch.arange(count, device=ids.device) >= top_k), 0)
        total = torch.where(top_k > 0, weights.sum(dim=-1, keepdim=True), self.sums[index].sum(dim=-1, keepdim=True))
        cumulative = weights.cumsum(dim=-1)
        # A token is kept while those before it do not reach top_p; 1 keeps all, whatever the sums round to.
        reached = (cumulative >= top_p * total) & (top_p < 1)
        settled = (top_k[:, 0] > 0) | reached[:, CANDIDATES - 1] | (weights[:, CANDIDATES - 1] == 0)
        weights[:, 1:].masked_fill_(reached[:, :-1], 0)
        noise = self._noise(index, self.sampler.token_words.flatten()[ids])
        return ids.gather(1, (weights / noise).argmax(dim=-1, keepdim=True))[:, 0], settled

    def _draw_nucleus(self, index: torch.Tensor) -> torch.Tensor:
        """By rejection, for rows with top_p whose kept tokens are many."""
        logits, every = self.blocks[index], torch.arange(len(index), device=index.device)
        everything = self._weights(logits, index, self.peaks[index])
        weights, sums = everything, self.sums[index]
        target = self.rows.top_p[index] * sums.sum(dim=-1)
        tokens, pending = torch.zeros_like(index), torch.ones_like(index, dtype=torch.bool)
        for attempt in itertools.count():
            block = (sums / self._noise(index, self.sampler.block_words, attempt)).argmax(dim=-1)
            noise = self._noise(index, self.sampler.token_words[block], attempt)
            inside = (weights[every, block] / noise).argmax(dim=-1)
            tokens = torch.where(pending, block * BLOCK + inside, tokens)
            # Weights of the tokens ahead: larger logits, and equal ones of lower ids.
            pivot = logits[every, block, inside][:, None]
            just_below = torch.nextafter(pivot, torch.full_like(pivot, float("-inf")))
            earlier = torch.arange(logits.shape[1], device=index.device) < block[:, None]
            ahead = torch.gt(logits, just_below.where(earlier, pivot)[:, :, None], out=torch.empty_like(logits))
            own, before = logits[every, block], torch.arange(BLOCK, device=index.device) < inside[:, None]
            ahead[every, block] = ((own > pivot) | ((own == pivot) & before)).to(ahead.dtype)
            weights = ahead.mul_(everything)
            sums = weights.sum(dim=-1)
            pending = pending & (sums.sum(dim=-1) >= target)
            if not pending.any():
                return tokens
        raise AssertionError  # the most likely token is always kept
