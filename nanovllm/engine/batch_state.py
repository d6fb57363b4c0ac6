"""What the device remembers of each resident sequence between steps.

The host tells it only changes (a :class:`StepPlan`); input ids, positions and slot mappings are derived here from
tables that stay on the device, so that a sampled token never has to travel to the host before the next step can run.
"""

from dataclasses import dataclass

import torch

from nanovllm.attention.base import AttentionMetadata
from nanovllm.engine.step_plan import SlotEntry, StepPlan
from nanovllm.layers.sampler import SamplingRows
from nanovllm.sampling_params import SamplingParams


@dataclass(slots=True)
class SampleInput:
    """What is sampled after a step.

    Args:
        hidden_rows: int64 [sampling rows], indices of the tokens whose hidden states give the logits.
        slots: int64 [sampling rows], where the sampled tokens belong.
        rows: How they are sampled.
    """

    hidden_rows: torch.Tensor
    slots: torch.Tensor
    rows: SamplingRows


@dataclass(slots=True)
class StepInput:
    """One step as the model takes it.

    Args:
        token_ids: int64 [tokens].
        positions: int64 [tokens].
        attention: Rows, contexts and where keys and values go.
        sample: What is sampled after it; None if no row samples.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    sample: SampleInput | None


class BatchState:
    """A row of tables a slot.

    Args:
        num_slots: Most resident sequences.
        max_model_len: Most tokens of a sequence.
        block_size: Tokens a KV block.
        device: Where the tables live.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = torch.zeros(num_slots, max_model_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.top_p = torch.ones(num_slots, dtype=torch.float32, device=device)
        self.noise_keys = torch.zeros(num_slots, 2, dtype=torch.int32, device=device)
        self.params: dict[int, SamplingParams] = {}  # by slot, on the host: for the flags of SamplingRows

    @staticmethod
    def num_bytes(num_slots: int, max_model_len: int, block_size: int) -> int:
        """Bytes of the tables that grow with ``max_model_len``; the others are negligible."""
        return 4 * num_slots * (max_model_len + 1 + -(-max_model_len // block_size))

    def apply(self, plan: StepPlan) -> None:
        """Take in what changed since the last step."""
        for slot in plan.released:
            self.params.pop(slot, None)
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
        blocks = self.block_tables[token_slots, positions // self.block_size].long()
        attention = AttentionMetadata(
            query_lengths=plan.lengths,
            context_lengths=contexts,
            block_tables=self.block_tables[slots, : -(-max(contexts) // self.block_size)].long(),
            slot_mapping=blocks * self.block_size + positions % self.block_size,
        )
        return StepInput(
            token_ids=self.token_ids[token_slots, positions].long(),
            positions=positions,
            attention=attention,
            sample=self._sample_input(plan, slots, ends - 1, starts + lengths),
        )

    def append(self, sample: SampleInput, tokens: torch.Tensor) -> None:
        """Note the sampled ``tokens`` [sampling rows], for later steps to start from."""
        self.token_ids[sample.slots, sample.rows.positions] = tokens.to(torch.int32)

    def _enter(self, entry: SlotEntry) -> None:
        slot, params = entry.slot, entry.params
        self.token_ids[slot, : len(entry.token_ids)] = self._tensor(entry.token_ids, torch.int32)
        self.block_tables[slot, : len(entry.block_ids)] = self._tensor(entry.block_ids, torch.int32)
        # Kept to what the device's types and the sampler's quotients hold. Long before these bounds, only the most
        # likely token is drawn, or all tokens alike, or the whole vocabulary is kept.
        self.temperature[slot] = min(max(float(params.temperature), 1e-20), 1e20) if params.temperature > 0 else 0.0
        self.top_k[slot] = min(max(params.top_k, 0), 2**31)
        self.top_p[slot] = float(params.top_p)
        words = [entry.noise_key & 0xFFFFFFFF, entry.noise_key >> 32]
        self.noise_keys[slot] = self._tensor([word - (1 << 32) if word >> 31 else word for word in words], torch.int32)
        self.params[slot] = params

    def _sample_input(
        self, plan: StepPlan, slots: torch.Tensor, last_tokens: torch.Tensor, next_positions: torch.Tensor
    ) -> SampleInput | None:
        """What the rows of ``plan`` that sample need; the tensors have an element a row of the plan."""
        sampling = [row for row, samples in enumerate(plan.samples) if samples]
        if not sampling:
            return None
        if len(sampling) < len(plan.slots):
            index = self._tensor(sampling)
            slots, last_tokens, next_positions = slots[index], last_tokens[index], next_positions[index]
        params = [self.params[plan.slots[row]] for row in sampling]
        truncated = [p for p in params if p.temperature > 0 and (p.top_k > 0 or p.top_p < 1)]
        rows = SamplingRows(
            temperature=self.temperature[slots],
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            keys=self.noise_keys[slots],
            positions=next_positions,
            all_greedy=all(p.temperature == 0 for p in params),
            any_greedy=any(p.temperature == 0 for p in params),
            any_truncated=bool(truncated),
            num_candidates=max((p.top_k for p in truncated), default=0) if all(p.top_k > 0 for p in truncated) else 0,
        )
        return SampleInput(last_tokens, slots, rows)

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)
