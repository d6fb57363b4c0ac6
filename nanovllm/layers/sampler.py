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
  (Without a kernel for it, and where the host must not look, a number of draws is made that always suffices.)

The noise is a pure function of (key of the request, position of the token, block or token id). So a request gets the
same tokens whatever else is in its batch, however its prompt was cut up, and on however many ranks it runs.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from nanovllm import kernels
from nanovllm.layers.noise import GOLDEN, block_words, exponential_noise, signed_word, token_words
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE
from nanovllm.layers.top_tokens import BLOCK, in_blocks, most_likely, rows_at_a_time

# Tokens among which top_p is tried first. A constant, so that a row's draw does not depend on other rows' top_k.
CANDIDATES = 64

# Draws after which a row with a wide top_p takes its most likely token, where the host does not look whether any was
# kept. Draws that are not kept follow a Poisson distribution of mean -log(top_p): with top_p 0.1 one row in 10^16 gets
# there; with the least top_p that the candidates do not reach, 4e-4 of a flat distribution, one in 400,000.
BLIND_DRAWS = 24


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
        num_candidates: The largest top_k of the truncated rows; 0 if none has one.
        any_min_p: Some row has a min_p.
        min_p: float32 [rows]; before top_k and top_p, tokens this many times as likely as the most likely one or more
            are kept. None if no row has one.
        any_unbounded: Some truncated row has no top_k. (A top_k of at least the vocabulary is none.)
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
    any_unbounded: bool = False

    @classmethod
    def worst_case(cls, rows: int, device: torch.device) -> "SamplingRows":
        """What takes the most memory to sample by."""
        return cls(
            temperature=torch.ones(rows, device=device),
            top_k=torch.zeros(rows, dtype=torch.int64, device=device),
            top_p=torch.full((rows,), 0.9, device=device),
            keys=torch.zeros(rows, 2, dtype=torch.int32, device=device),
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            all_greedy=False,
            any_greedy=False,
            any_truncated=True,
            any_unbounded=True,
        )


class Sampler(nn.Module):
    """Samples a token id for each row of logits. Where that is not on the CPU, the host waits for nothing.

    Args:
        vocab_size: Token ids.
        device: Where the logits are.
        use_kernels: Of batches and rows that there are kernels for; otherwise torch's operators do everything.
        first_block: The logits are of ids from that block's first on.
    """

    def __init__(self, vocab_size: int, device: torch.device, use_kernels: bool = True, first_block: int = 0) -> None:
        super().__init__()
        self.sample_kernel = kernels.load("sample", device) if use_kernels else None
        self.nucleus_kernel = kernels.load("nucleus", device) if use_kernels else None
        self.block_sums_kernel = kernels.load("block_sums", device, torch.float32) if use_kernels else None
        end = first_block - (-vocab_size // BLOCK)
        self.vocab_size = vocab_size
        self.block_words = block_words(end, device)[first_block:]
        self.token_words = token_words(end * BLOCK, device).view(end, BLOCK)[first_block:]

    def forward(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """Logits to token ids.

        Args:
            logits: [rows, at least vocab_size], any float dtype up to float32; further columns are ignored.
            rows: How they are sampled.

        Returns:
            int64 [rows]; -1 if a logit is NaN or inf, or all are -inf.
        """
        if self.sample_kernel is not None and not rows.any_truncated and not rows.any_min_p:
            return self.sample_kernel(logits, rows.temperature, rows.keys, rows.positions, self.vocab_size)
        batch = _Batch(self, logits[:, : self.vocab_size].float(), rows)
        if rows.all_greedy:
            tokens = batch.greedy()
        else:
            tokens = batch.sample()
            if rows.any_greedy:
                tokens = torch.where(rows.temperature == 0, batch.greedy(), tokens)
        return tokens.masked_fill_(~batch.peaks.isfinite(), -1)


class ShardedSampler(Sampler):
    """The same by temperature alone, of logits that are spread over the ranks; all of them get the same token.

    A draw is the largest of weights over noise, so the largest of each rank's largest. They compare theirs instead of
    gathering the logits.

    Args:
        num_columns: Of each rank's share of the logits, a multiple of BLOCK.
        device: Where the logits are.
        parallel: This rank, which holds the columns from ``rank * num_columns`` on.
    """

    def __init__(self, num_columns: int, device: torch.device, parallel: ParallelGroup) -> None:
        self.first_id = parallel.rank * num_columns
        super().__init__(num_columns, device, first_block=self.first_id // BLOCK)
        self.sample_kernel = None
        self.parallel = parallel

    def forward(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """This rank's logits [rows, num_columns], any float dtype up to float32, to token ids as :class:`Sampler`'s."""
        batch = _Batch(self, logits.float(), rows)
        weight, token = batch.heaviest()
        found = torch.stack([batch.peaks, weight, self.first_id + token, self.first_id + batch.greedy()]).double()
        peaks, weights, drawn, greedy = torch.stack(self.parallel.gather(found), dim=1)  # [ranks, rows] each
        peak, best = peaks.max(dim=0)
        weights = (weights * torch.exp2(batch.scale * (peaks - peak))).nan_to_num(nan=0.0)  # NaN: a rank without ids
        chosen = torch.where(
            rows.temperature == 0, greedy.gather(0, best[None]), drawn.gather(0, weights.argmax(0)[None])
        )
        return chosen[0].long().masked_fill_(~peak.isfinite(), -1)


class _Batch:
    """One call of the sampler."""

    def __init__(self, sampler: Sampler, logits: torch.Tensor, rows: SamplingRows) -> None:
        self.sampler = sampler
        self.rows = rows
        self.blocks = in_blocks(logits)
        # Whether the host may look at what was computed: nobody waits for it. (With kernels, they are interpreted.)
        self.host_may_look = logits.device.type == "cpu" and sampler.nucleus_kernel is None
        self.everything = torch.arange(len(logits), device=logits.device)
        temperature = rows.temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
        self.scale = kernels.LOG2_E / temperature  # 2^x costs a third of e^x on the CPU
        self.top_k = rows.top_k.where(rows.top_k < sampler.vocab_size, 0)
        self.truncated = (rows.temperature > 0) & ((self.top_k > 0) | (rows.top_p < 1))
        self._measure()

    def greedy(self) -> torch.Tensor:
        """The most likely tokens, the lowest id of several."""
        block = self.maxima.argmax(dim=-1)
        return block * BLOCK + self.blocks[self.everything, block].argmax(dim=-1)

    def heaviest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws of all rows by temperature alone: the weights over noise of their blocks, and the tokens."""
        weight, block = (self.sums / self._noise(self.everything, self.sampler.block_words)).max(dim=-1)
        return weight, self._draw_within(block, self.everything)

    def sample(self) -> torch.Tensor:
        """Draws for all rows; greedy ones get any token."""
        tokens = torch.zeros_like(self.everything)
        index = self._select((self.rows.temperature > 0) & ~self.truncated)
        if len(index):
            tokens[index] = self._draw(index, self.sums[index])
        bounded = not self.rows.any_unbounded and 0 < self.rows.num_candidates < self.sampler.vocab_size
        if self.rows.any_truncated:
            for index, count in self._candidate_groups():
                drawn, settled = self._draw_candidates(index, count)
                tokens[index] = drawn.where(self.truncated[index], tokens[index])
                if bounded:
                    continue
                if self.sampler.nucleus_kernel is not None:
                    self._launch_nucleus(self.truncated & ~settled, tokens)
                    continue
                if not self.host_may_look:
                    tokens = self._draw_nucleus_blindly(self.truncated & ~settled, tokens)
                    continue
                index = index[self.truncated[index] & ~settled]
                if len(index):
                    tokens[index] = self._draw_nucleus(index)
        return tokens

    def _select(self, mask: torch.Tensor) -> torch.Tensor:
        """Rows of a mask. A GPU takes all, and the mask later, lest the host wait for it."""
        return mask.nonzero()[:, 0] if self.host_may_look else self.everything

    def _candidate_groups(self) -> list[tuple[torch.Tensor, int]]:
        """Truncated rows, and how many of their most likely tokens hold what top_k leaves."""
        vocab_size = self.sampler.vocab_size
        if not self.host_may_look:
            return [(self.everything, max(CANDIDATES, min(self.rows.num_candidates, vocab_size)))]
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
        wanted = (rows.temperature > 0) & (self.top_k == 0)  # rows with a top_k do not need the sums
        # With min_p, blocks and their tokens must be weighed by one and the same exponential: a block could else be
        # drawn for a token that is then left out.
        if self.host_may_look and self.sampler.block_sums_kernel is not None and not rows.any_min_p:
            self.maxima, self.sums = self.sampler.block_sums_kernel(self.blocks, self.scale, wanted)
            self.peaks = self.maxima.amax(dim=-1)
            return
        needed = wanted.tolist() if self.host_may_look else [not rows.all_greedy] * count
        self.maxima = self.blocks.new_empty(self.blocks.shape[:2])
        self.sums = torch.zeros_like(self.maxima)
        step = rows_at_a_time(self.blocks)
        scratch = torch.empty_like(self.blocks[:step])
        for first in range(0, count, step):
            part = slice(first, first + step)
            # Copied there, not computed there: before macOS 15, what MPS computes into a part of a tensor is lost.
            self.maxima[part] = self.blocks[part].amax(dim=-1)
            if any(needed[part]):
                weights = self._weights(self.blocks[part], part, self.maxima[part].amax(dim=-1), scratch)
                self.sums[part] = weights.sum(dim=-1)
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
            if not self.host_may_look:
                out.masked_fill_(out < limit, 0)
            elif limit.any():
                out.mul_(torch.ge(out, limit, out=torch.empty_like(out)))  # a float mask: far faster than bool
        return out

    def _noise(self, index: torch.Tensor, words: torch.Tensor, attempt: int = 0) -> torch.Tensor:
        first, second = self.rows.keys[index].unbind(dim=1)
        keys = torch.stack([first, second ^ signed_word(attempt * GOLDEN & 0xFFFFFFFF)], dim=1)
        return exponential_noise(keys, self.rows.positions[index], words)

    def _draw(
        self, index: torch.Tensor, sums: torch.Tensor, attempt: int = 0, ahead_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A block by the sums [rows, blocks], then a token of it; only of the tokens ahead of one, if it is given."""
        block = (sums / self._noise(index, self.sampler.block_words, attempt)).argmax(dim=-1)
        return self._draw_within(block, index, attempt, ahead_of)

    def _draw_within(
        self, block: torch.Tensor, index: torch.Tensor, attempt: int = 0, ahead_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A token of each row's block."""
        logits = self.blocks[index, block]
        weights = self._weights(logits, index, self.peaks[index])
        if ahead_of is not None:
            weights *= self._ahead(logits, block, index, ahead_of)
        noise = self._noise(index, self.sampler.token_words[block], attempt)
        return block * BLOCK + (weights / noise).argmax(dim=-1)

    def _ahead(
        self, logits: torch.Tensor, block: torch.Tensor, index: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Which tokens of a block, logits [rows, BLOCK], are ahead of others: larger logits, or equal and lower ids."""
        pivot = self.blocks[index, tokens // BLOCK, tokens % BLOCK][:, None]
        ids = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
        return (logits > pivot) | ((logits == pivot) & (ids < tokens[:, None]))

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
        weights.masked_fill_(torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], dim=1), 0)
        noise = self._noise(index, self.sampler.token_words.flatten()[ids])
        return ids.gather(1, (weights / noise).argmax(dim=-1, keepdim=True))[:, 0], settled

    def _launch_nucleus(self, pending: torch.Tensor, tokens: torch.Tensor) -> None:
        """Replace the tokens of pending rows by what :meth:`_draw_nucleus` gives, without waiting for them."""
        rows = self.rows
        assert self.sampler.nucleus_kernel is not None
        self.sampler.nucleus_kernel(
            self.blocks.flatten(1),
            self.sums,
            self.peaks,
            rows.temperature,
            rows.min_p if rows.any_min_p else None,
            rows.top_p,
            rows.keys,
            rows.positions,
            pending,
            tokens,
            self.sampler.vocab_size,
        )

    def _draw_nucleus_blindly(self, pending: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens``, those of pending rows replaced by what :meth:`_draw_nucleus` gives; the host looks at nothing."""
        index, sums, pivots = self.everything, self.sums, None
        targets = self.rows.top_p * sums.sum(dim=-1)
        for attempt in range(BLIND_DRAWS):
            pivots = self._draw(index, sums, attempt, pivots)
            sums = self._sums_ahead(index, pivots)
            rejected = pending & (sums.sum(dim=-1) >= targets)
            tokens = pivots.where(pending & ~rejected, tokens)
            pending = rejected
        return self.greedy().where(pending, tokens)

    def _draw_nucleus(self, index: torch.Tensor) -> torch.Tensor:
        """By rejection, for rows whose top_p keeps many tokens."""
        tokens = torch.zeros_like(index)
        pending, sums, pivots = torch.arange(len(index), device=index.device), self.sums[index], None
        targets = self.rows.top_p[index] * sums.sum(dim=-1)
        for attempt in itertools.count():
            pivots = self._draw(index, sums, attempt, pivots)
            tokens[pending] = pivots
            steps = rows_at_a_time(self.blocks)
            parts = zip(index.split(steps), pivots.split(steps), strict=True)
            sums = torch.cat([self._sums_ahead(rows, chosen) for rows, chosen in parts])
            rejected = sums.sum(dim=-1) >= targets
            if not rejected.any():
                break
            index, pending, sums = index[rejected], pending[rejected], sums[rejected]
            targets, pivots = targets[rejected], pivots[rejected]
        return tokens

    def _sums_ahead(self, index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Sums of weights by block, [rows, blocks], of the tokens ahead of the given ones."""
        logits, block = self.blocks.index_select(0, index), tokens // BLOCK
        every = torch.arange(len(index), device=index.device)
        # Larger logits; in earlier blocks equal ones too, and those of the own block token by token.
        pivot = logits[every, block, tokens % BLOCK][:, None]
        earlier = torch.arange(logits.shape[1], device=index.device) < block[:, None]
        if self.host_may_look:
            just_below = torch.nextafter(pivot, torch.full_like(pivot, float("-inf")))
            ahead = torch.gt(logits, just_below.where(earlier, pivot)[:, :, None], out=torch.empty_like(logits))
        else:
            ties = (logits == pivot[:, :, None]) & earlier[:, :, None]
            ahead = ((logits > pivot[:, :, None]) | ties).float()
        ahead[every, block] = self._ahead(logits[every, block], block, index, tokens).to(ahead.dtype)
        return ahead.mul_(self._weights(logits, index, self.peaks[index], out=logits)).sum(dim=-1)
