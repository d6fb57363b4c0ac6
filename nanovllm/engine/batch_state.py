"""What the device remembers of each resident sequence between steps.

The host tells it only changes (a :class:`StepPlan`) and where in their sequences a step's tokens are; what they are,
and where their keys and values go, is looked up here in tables that stay on the device, so that a sampled token never
has to travel to the host before the next step can run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nanovllm.attention.base import AttentionMetadata
from nanovllm.engine.logit_rules import LogitRules, has_rules
from nanovllm.engine.step_plan import SlotEntry, StepPlan
from nanovllm.layers import temperature as schedules
from nanovllm.layers.sampler import SamplingRows
from nanovllm.utils.transfer import to_device, upload

# Columns of ``BatchState.params``: floats by their bits, then integers.
_TEMPERATURE, _TOP_P, _MIN_P, _TOP_K, _NOISE_KEY, NUM_PARAMS = 0, 1, 2, 3, 4, 6


@dataclass(slots=True)
class SamplePlaces:
    """Where the tokens that are sampled after a step belong.

    Args:
        slots: Each sampling row's slot.
        slot_index: The same, int64 [sampling rows].
        positions: int64 [sampling rows], those of the tokens.
        longest: At least the largest of them.
    """

    slots: list[int]
    slot_index: torch.Tensor
    positions: torch.Tensor
    longest: int


@dataclass(slots=True)
class SampleInput:
    """How they are sampled.

    Args:
        rows: The sampling rows' parameters.
        logprobs: By sampling row, how many log-probabilities it asks for, if it does.
        asking: int64, those rows; None if there are none.
    """

    rows: SamplingRows
    logprobs: dict[int, int]
    asking: torch.Tensor | None


@dataclass(slots=True)
class SpecialRows:
    """Rows of a step that ask for more than a fixed temperature.

    Args:
        rows: Their numbers among the sampling rows.
        slots: Their slots.
        index: int64, their numbers on the device.
        slot_index: int64, their slots on the device.
    """

    rows: list[int]
    slots: list[int]
    index: torch.Tensor
    slot_index: torch.Tensor


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
    any_unbounded: bool
    logprobs: dict[int, int]
    asking: torch.Tensor | None
    scheduled: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # rows, their prompts' lengths, their pieces


@dataclass(slots=True)
class StepInput:
    """One step as the model takes it.

    Args:
        token_ids: int64 [tokens].
        positions: int64 [tokens].
        attention: Rows, contexts and where keys and values go.
        places: Of the tokens that are sampled after it; None if no row samples.
        hidden_rows: int64 [sampling rows], the tokens whose hidden states give the logits.
        prompt_logprobs: Rows whose prompt tokens' log-probabilities are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    places: SamplePlaces | None
    hidden_rows: torch.Tensor
    prompt_logprobs: list[PromptLogprobsInput]


def is_special(entry: SlotEntry) -> bool:
    """Whether a sequence asks for more than a fixed temperature."""
    if entry.special is not None:
        return entry.special
    params = entry.params
    return (
        not isinstance(params.temperature, (int, float))
        or params.top_k > 0
        or params.top_p < 1
        or params.min_p > 0
        or params.logprobs is not None
        or has_rules(entry)
    )


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
        # Tokens whose KV is computed once all steps launched so far are done: the position of the next one.
        self.num_computed = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.params = torch.zeros(num_slots, NUM_PARAMS, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._ones = torch.ones(num_slots, dtype=torch.float32, device=device)
        self.entries: dict[int, SlotEntry] = {}  # by slot, on the host; without their tokens and blocks
        self.rules = LogitRules(vocab_size, device)
        self._wanting_prompt_logprobs: set[int] = set()
        # Of the last batch: most have the same rows.
        self._batch: tuple[list[int], _BatchParams] | None = None
        self._special: tuple[list[int], SpecialRows | None] | None = None

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
        if plan.entered:
            for entry in plan.entered:
                self._enter(entry)
            self._write(self.token_ids, [(entry.slot, entry.token_ids) for entry in plan.entered])
            self._write(self.block_tables, [(entry.slot, entry.block_ids) for entry in plan.entered])
            lines = to_device([_params_line(entry) for entry in plan.entered], torch.int32, self.device)
            self.params[lines[:, 0].long()] = lines[:, 1:]
        if plan.appended_blocks:
            columns = list(zip(*plan.appended_blocks, strict=True))
            slots, indices, blocks = to_device(columns, torch.int64, self.device).unbind()
            self.block_tables[slots, indices] = blocks.to(torch.int32)

    def _write(self, table: torch.Tensor, lines: list[tuple[int, Sequence[int]]]) -> None:
        """Write values to the beginnings of lines of a table: (line, values)."""
        places = [np.arange(len(values)) + line * table.shape[1] for line, values in lines]
        self._scatter(table, np.concatenate(places), np.concatenate([np.asarray(values) for _, values in lines]))

    def _scatter(self, table: torch.Tensor, places: np.ndarray, values: np.ndarray) -> None:
        """Write values to places of a flattened table, in one copy."""
        where, written = to_device(np.stack([places, values]), torch.int64, self.device)
        table.view(-1)[where] = written.to(table.dtype)

    def step_input(self, plan: StepPlan) -> StepInput:
        """The model's input for the rows of ``plan``, whose changes have been applied."""
        by_row, by_token = _places(plan, self.block_size)
        some_wait = not all(plan.samples)
        rows, tokens, *sampling = upload(
            [by_row, by_token, *([by_row[:, plan.samples]] if some_wait else [])], self.device
        )
        slots, computed, _ = rows.unbind()
        token_slots, positions, columns, offsets = tokens.unbind()
        sampling_slots, next_positions, last_tokens = (sampling[0] if some_wait else rows).unbind()
        self.num_computed[slots] = computed.to(torch.int32)
        contexts = by_row[1].tolist()
        attention = AttentionMetadata(
            query_lengths=plan.lengths,
            context_lengths=contexts,
            block_tables=self.block_tables,
            slot_mapping=self.block_tables[token_slots, columns].long() * self.block_size + offsets,
            slots=slots,
            offsets=offsets,
        )
        sampled = [slot for slot, samples in zip(plan.slots, plan.samples, strict=True) if samples]
        return StepInput(
            token_ids=self.token_ids[token_slots, positions].long(),
            positions=positions,
            attention=attention,
            places=SamplePlaces(sampled, sampling_slots, next_positions, max(contexts)) if sampled else None,
            hidden_rows=last_tokens,
            prompt_logprobs=self._prompt_logprobs_input(plan) if self._wanting_prompt_logprobs else [],
        )

    def append(self, places: SamplePlaces, tokens: torch.Tensor) -> None:
        """Note the sampled ``tokens`` [sampling rows], for later steps to start from and for the rows' rules."""
        self.write(places, tokens)
        self.rules.record(places.slots, tokens)

    def write(self, places: SamplePlaces, tokens: torch.Tensor) -> None:
        """Note sampled ``tokens`` [sampling rows] for later steps to start from; they may be written over."""
        # A row that failed has -1, which a step planned before that is known must not take for a token.
        self.token_ids[places.slot_index, places.positions] = tokens.clamp(min=0).to(torch.int32)

    def sample_input(self, places: SamplePlaces) -> SampleInput:
        """What sampling needs to know of the sequences whose tokens belong in ``places``."""
        slots, positions = places.slots, places.positions
        batch = self._batch[1] if self._batch is not None and self._batch[0] == slots else self._collect(slots)
        self._batch = (slots, batch)
        params = self.params[places.slot_index]
        floats = params.view(torch.float32)
        temperature = floats[:, _TEMPERATURE]
        if batch.scheduled is not None:
            rows, prompt_lengths, pieces = batch.scheduled
            temperature[rows] = schedules.evaluate(pieces, positions[rows] - prompt_lengths)
        return SampleInput(
            rows=SamplingRows(
                temperature=temperature,
                top_k=params[:, _TOP_K].long(),
                top_p=floats[:, _TOP_P],
                min_p=floats[:, _MIN_P],
                keys=params[:, _NOISE_KEY:],
                positions=positions,
                all_greedy=batch.all_greedy,
                any_greedy=batch.any_greedy,
                any_truncated=batch.any_truncated,
                any_min_p=batch.any_min_p,
                num_candidates=batch.num_candidates,
                any_unbounded=batch.any_unbounded,
            ),
            logprobs=batch.logprobs,
            asking=batch.asking,
        )

    def special_rows(self, slots: list[int]) -> SpecialRows | None:
        """The rows whose sequences ask for more than a fixed temperature; None if there are none."""
        if self._special is None or self._special[0] != slots:
            rows = [row for row, slot in enumerate(slots) if is_special(self.entries[slot])]
            special = None
            if rows:
                special_slots = [slots[row] for row in rows]
                special = SpecialRows(rows, special_slots, *self._tensor([rows, special_slots]).unbind(dim=0))
            self._special = (slots, special)
        return self._special[1]

    def plain_rows(self, params: torch.Tensor, positions: torch.Tensor) -> SamplingRows:
        """Sampling parameters of rows of which only the temperature counts; the host need not know which rows.

        Args:
            params: int32 [rows, columns], the rows' lines of ``params``.
            positions: int32 or int64 [rows], positions of the tokens to be sampled.
        """
        floats = params.view(torch.float32)
        return SamplingRows(
            temperature=floats[:, _TEMPERATURE],
            top_k=self._zeros[: len(positions)],
            top_p=self._ones[: len(positions)],
            keys=params[:, _NOISE_KEY:],
            positions=positions,
            all_greedy=False,
            any_greedy=True,
            any_truncated=False,
        )

    def _enter(self, entry: SlotEntry) -> None:
        slot = entry.slot
        self.rules.release(slot)
        self.rules.enter(entry)
        self.entries[slot] = replace(entry, token_ids=[], block_ids=[])
        self._batch = self._special = None
        if entry.first_logprob is None:
            self._wanting_prompt_logprobs.discard(slot)
        else:
            self._wanting_prompt_logprobs.add(slot)

    def _collect(self, slots: list[int]) -> _BatchParams:
        """What the parameters of these slots' sequences have in common."""
        entries = [self.entries[slot] for slot in slots]
        scheduled = [
            (row, entry.num_prompt_tokens, entry.params.temperature.pieces())
            for row, entry in enumerate(entries)
            if not isinstance(entry.params.temperature, (int, float))  # the protocol takes 16 us to check
        ]
        asking = [row for row, entry in enumerate(entries) if entry.params.logprobs is not None]
        greedy = [entry.params.temperature == 0 for entry in entries]
        sampled = [entry.params for entry, is_greedy in zip(entries, greedy, strict=True) if not is_greedy]
        vocab_size = self.rules.vocab_size  # a top_k of that many is none
        top_ks = [p.top_k for p in sampled if 0 < p.top_k < vocab_size]
        unbounded = [p for p in sampled if p.top_p < 1 and not 0 < p.top_k < vocab_size]
        return _BatchParams(
            all_greedy=all(greedy),
            any_greedy=any(greedy) or bool(scheduled),  # a schedule may reach 0
            any_truncated=bool(top_ks or unbounded),
            any_min_p=any(p.min_p > 0 for p in sampled),
            num_candidates=max(top_ks, default=0),
            any_unbounded=bool(unbounded),
            logprobs={row: entries[row].params.logprobs or 0 for row in asking},
            asking=self._tensor(asking) if asking else None,
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
        return to_device(values, dtype, self.device)


def _places(plan: StepPlan, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows and tokens of a step belong.

    Returns:
        [3, rows]: each row's slot, tokens computed when the step is done, and last token among those of the step;
        [4, tokens]: each token's slot, position, number of its block in its sequence, and place in that block.
    """
    slots, starts, lengths = np.array([plan.slots, plan.starts, plan.lengths])
    computed, ends = starts + lengths, lengths.cumsum()
    token_slots, positions = slots, starts
    if plan.num_tokens > len(slots):
        rows = np.repeat(np.arange(len(slots)), lengths)  # of each token
        token_slots, positions = slots[rows], (computed - ends)[rows] + np.arange(len(rows))
    blocks = positions // block_size  # here rather than on the device: MPS divides integers as floats
    offsets = positions - blocks * block_size
    return np.array([slots, computed, ends - 1]), np.array([token_slots, positions, blocks, offsets])


def _params_line(entry: SlotEntry) -> np.ndarray:
    """A slot, and its line of ``BatchState.params``."""
    params = entry.params
    line = np.zeros(1 + NUM_PARAMS, dtype=np.int32)
    line[0], columns = entry.slot, line[1:]
    floats = columns.view(np.float32)
    if isinstance(params.temperature, (int, float)):  # schedules are evaluated at each step
        lowest = schedules.MIN_TEMPERATURE if params.temperature > 0 else 0.0  # float32 must not make it 0
        floats[_TEMPERATURE] = min(max(params.temperature, lowest), schedules.MAX_TEMPERATURE)
    floats[_TOP_P], floats[_MIN_P] = params.top_p, params.min_p
    columns[_TOP_K] = min(max(params.top_k, 0), 2**31 - 1)
    columns.view(np.uint32)[_NOISE_KEY:] = entry.noise_key & 0xFFFFFFFF, entry.noise_key >> 32
    return line
