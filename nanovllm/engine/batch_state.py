"""What the device remembers of each resident sequence between steps.

The host tells it only changes (a :class:`StepPlan`); input ids, positions and slot mappings are derived here from
tables that stay on the device, so that a sampled token never has to travel to the host before the next step can run.
"""

from dataclasses import dataclass, replace

import torch

from nanovllm.attention.base import AttentionMetadata
from nanovllm.engine.logit_rules import LogitRules
from nanovllm.engine.step_plan import SlotEntry, StepPlan
from nanovllm.layers import temperature as schedules
from nanovllm.layers.sampler import SamplingRows
from nanovllm.sampling_params import Schedule


@dataclass(slots=True)
class SampleInput:
    """What is sampled after a step.

    Args:
        hidden_rows: int64 [sampling rows], indices of the tokens whose hidden states give the logits.
        slots: Each sampling row's slot, where its token belongs.
        slot_index: The same, int64 [sampling rows].
        rows: How they are sampled.
        longest: At least the largest position of a token to be sampled.
        logprobs: By sampling row, how many log-probabilities it asks for, if it does.
    """

    hidden_rows: torch.Tensor
    slots: list[int]
    slot_index: torch.Tensor
    rows: SamplingRows
    longest: int
    logprobs: dict[int, int]


@dataclass(slots=True)
class PromptLogprobsInput:
    """A row whose prompt tokens' log-probabilities are wanted.

    Args:
        row: Of the plan.
        first: Position of the first such token in this step.
        hidden_rows: The tokens of the step whose hidden states give them, each the one before.
        targets: int64 [positions], the prompt tokens from ``first`` on.
        num_logprobs: How many of the most likely tokens are wanted besides; -1 for all.
    """

    row: int
    first: int
    hidden_rows: slice
    targets: torch.Tensor
    num_logprobs: int


@dataclass(slots=True)
class _BatchParams:
    """What the sampling parameters of a batch's rows have in common, known on the host."""

    all_greedy: bool
    any_greedy: bool
    any_truncated: bool
    any_min_p: bool
    num_candidates: int
    logprobs: dict[int, int]
    scheduled: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # rows, their prompts' lengths, their pieces


@dataclass(slots=True)
class StepInput:
    """One step as the model takes it.

    Args:
        token_ids: int64 [tokens].
        positions: int64 [tokens].
        attention: Rows, contexts and where keys and values go.
        sample: What is sampled after it; None if no row samples.
        prompt_logprobs: Rows whose prompt tokens' log-probabilities are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    sample: SampleInput | None
    prompt_logprobs: list[PromptLogprobsInput]


class BatchState:
    """A row of tables a slot.

    Args:
        num_slots: Most resident sequences.
        max_model_len: Most tokens of a sequence.
        block_size: Tokens a KV block.
        vocab_size: Token ids.
        device: Where the tables live.
    """

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = torch.zeros(num_slots, max_model_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.top_p = torch.ones(num_slots, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.noise_keys = torch.zeros(num_slots, 2, dtype=torch.int32, device=device)
        self.entries: dict[int, SlotEntry] = {}  # by slot, on the host; without their tokens and blocks
        self.rules = LogitRules(vocab_size, device)
        self._wanting_prompt_logprobs: set[int] = set()
        self._batch: tuple[list[int], _BatchParams] | None = None  # of the last batch: most have the same rows

    @staticmethod
    def num_bytes(num_slots: int, max_model_len: int, block_size: int) -> int:
        """Bytes of the tables that grow with ``max_model_len``; the others are negligible."""
        return 4 * num_slots * (max_model_len + 1 + -(-max_model_len // block_size))

    def apply(self, plan: StepPlan) -> None:
        """Take in what changed since the last step."""
        for slot in plan.released:
            self.entries.pop(slot, None)
            self.rules.release(slot)
            self._wanting_prompt_logprobs.discard(slot)
        for entry in plan.entered:
            self._enter(entry)
        if plan.appended_blocks:
            slots, indices, blocks = self._tensor(plan.appended_blocks).unbind(dim=1)
            self.block_tables[slots, indices] = blocks.to(torch.int32)

    def step_input(self, plan: StepPlan) -> StepInput:
        """The model's input for the rows of ``plan``, whose changes have been applied."""
        rows = self._tensor([plan.slots, plan.starts, plan.lengths])
        slots, starts, lengths = rows.unbind(dim=0)
        ends = lengths.cumsum(dim=0)
        if plan.num_tokens == len(plan.slots):  # one token a row
            token_slots, positions = slots, starts
        else:
            row_of_token = torch.repeat_interleave(lengths, output_size=plan.num_tokens)
            token_slots = slots[row_of_token]
            offsets = torch.arange(plan.num_tokens, device=self.device) - (ends - lengths)[row_of_token]
            positions = starts[row_of_token] + offsets
        contexts = [start + length for start, length in zip(plan.starts, plan.lengths, strict=True)]
        longest = max(contexts)
        blocks = self.block_tables[token_slots, positions // self.block_size].long()
        attention = AttentionMetadata(
            query_lengths=plan.lengths,
            context_lengths=contexts,
            block_tables=self.block_tables[slots, : -(-longest // self.block_size)].long(),
            slot_mapping=blocks * self.block_size + positions % self.block_size,
        )
        return StepInput(
            token_ids=self.token_ids[token_slots, positions].long(),
            positions=positions,
            attention=attention,
            sample=self._sample_input(plan, slots, ends - 1, starts + lengths, longest),
            prompt_logprobs=self._prompt_logprobs_input(plan) if self._wanting_prompt_logprobs else [],
        )

    def append(self, sample: SampleInput, tokens: torch.Tensor) -> None:
        """Note the sampled ``tokens`` [sampling rows], for later steps to start from."""
        # A row that failed has -1, which a step planned before that is known must not take for a token.
        self.token_ids[sample.slot_index, sample.rows.positions] = tokens.clamp(min=0).to(torch.int32)
        self.rules.record(sample.slots, tokens)

    def _enter(self, entry: SlotEntry) -> None:
        slot, params = entry.slot, entry.params
        self.rules.release(slot)
        self.rules.enter(entry)
        self.token_ids[slot, : len(entry.token_ids)] = self._tensor(entry.token_ids, torch.int32)
        self.block_tables[slot, : len(entry.block_ids)] = self._tensor(entry.block_ids, torch.int32)
        if not isinstance(params.temperature, Schedule):  # those are evaluated at each step
            lowest = schedules.MIN_TEMPERATURE if params.temperature > 0 else 0.0  # float32 must not make it 0
            self.temperature[slot] = min(max(params.temperature, lowest), schedules.MAX_TEMPERATURE)
        self.top_k[slot] = min(max(params.top_k, 0), 2**31)
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        words = [entry.noise_key & 0xFFFFFFFF, entry.noise_key >> 32]
        self.noise_keys[slot] = self._tensor([word - (1 << 32) if word >> 31 else word for word in words], torch.int32)
        self.entries[slot] = replace(entry, token_ids=[], block_ids=[])
        self._batch = None
        if entry.first_logprob is None:
            self._wanting_prompt_logprobs.discard(slot)
        else:
            self._wanting_prompt_logprobs.add(slot)

    def _sample_input(
        self,
        plan: StepPlan,
        slots: torch.Tensor,
        last_tokens: torch.Tensor,
        next_positions: torch.Tensor,
        longest: int,
    ) -> SampleInput | None:
        """What the rows of ``plan`` that sample need; the tensors have an element a row of the plan."""
        sampling = [row for row, samples in enumerate(plan.samples) if samples]
        if not sampling:
            return None
        if len(sampling) < len(plan.slots):
            index = self._tensor(sampling)
            slots, last_tokens, next_positions = slots[index], last_tokens[index], next_positions[index]
        row_slots = [plan.slots[row] for row in sampling]
        batch = self._batch[1] if self._batch is not None and self._batch[0] == row_slots else self._collect(row_slots)
        self._batch = (row_slots, batch)
        temperature = self.temperature[slots]
        if batch.scheduled is not None:
            rows, prompt_lengths, pieces = batch.scheduled
            temperature[rows] = schedules.evaluate(pieces, next_positions[rows] - prompt_lengths)
        return SampleInput(
            hidden_rows=last_tokens,
            slots=row_slots,
            slot_index=slots,
            rows=SamplingRows(
                temperature=temperature,
                top_k=self.top_k[slots],
                top_p=self.top_p[slots],
                min_p=self.min_p[slots],
                keys=self.noise_keys[slots],
                positions=next_positions,
                all_greedy=batch.all_greedy,
                any_greedy=batch.any_greedy,
                any_truncated=batch.any_truncated,
                any_min_p=batch.any_min_p,
                num_candidates=batch.num_candidates,
            ),
            longest=longest,
            logprobs=batch.logprobs,
        )

    def _collect(self, slots: list[int]) -> _BatchParams:
        """What the parameters of these slots' sequences have in common."""
        entries = [self.entries[slot] for slot in slots]
        scheduled = [
            (row, entry.num_prompt_tokens, entry.params.temperature.pieces())
            for row, entry in enumerate(entries)
            if isinstance(entry.params.temperature, Schedule)
        ]
        greedy = [entry.params.temperature == 0 for entry in entries]
        sampled = [entry.params for entry, is_greedy in zip(entries, greedy, strict=True) if not is_greedy]
        truncated = [p for p in sampled if p.top_k > 0 or p.top_p < 1]
        return _BatchParams(
            all_greedy=all(greedy),
            any_greedy=any(greedy) or bool(scheduled),  # a schedule may reach 0
            any_truncated=bool(truncated),
            any_min_p=any(p.min_p > 0 for p in sampled),
            num_candidates=max((p.top_k for p in truncated), default=0) if all(p.top_k > 0 for p in truncated) else 0,
            logprobs={
                row: entry.params.logprobs for row, entry in enumerate(entries) if entry.params.logprobs is not None
            },
            scheduled=self._pack_schedules(scheduled) if scheduled else None,
        )

    def _pack_schedules(self, scheduled: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        longest = max(len(pieces) for _, _, pieces in scheduled)
        padded = [pieces + pieces[-1:] * (longest - len(pieces)) for _, _, pieces in scheduled]
        return (
            self._tensor([row for row, _, _ in scheduled]),
            self._tensor([length for _, length, _ in scheduled]),
            self._tensor(padded, torch.float32),
        )

    def _prompt_logprobs_input(self, plan: StepPlan) -> list[PromptLogprobsInput]:
        found = []
        token = 0  # of the step: the row's first
        for row, (slot, start, length) in enumerate(zip(plan.slots, plan.starts, plan.lengths, strict=True)):
            if slot in self._wanting_prompt_logprobs:
                entry = self.entries[slot]
                first = max(entry.first_logprob or 1, start + 1)
                last = min(start + length, entry.num_prompt_tokens - 1)
                if first <= last:
                    hidden_rows = slice(token + first - 1 - start, token + last - start)
                    targets = self.token_ids[slot, first : last + 1].long()
                    number = entry.params.prompt_logprobs or 0
                    found.append(PromptLogprobsInput(row, first, hidden_rows, targets, number))
            token += length
        return found

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)
