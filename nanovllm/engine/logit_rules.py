"""What requests ask of their logits before sampling: allowed tokens, biases, bad words, penalties, callables.

Rows that ask for nothing cost nothing. What the others ask for touches single logits: those named by the request, or
those of the tokens that its text holds, so that nothing here passes over the vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanovllm.engine.step_plan import SlotEntry
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.transfer import to_device, upload

_ALWAYS = 2**31 - 1
# Repetition penalties beyond these decide by themselves, and float32 would hold them as 0 or inf: 0 * inf is NaN.
_LEAST_REPETITION, _MOST_REPETITION = 1e-20, 1e20


@dataclass(slots=True)
class _SlotRules:
    """The rules of one resident sequence, on the host."""

    params: SamplingParams
    num_prompt_tokens: int
    biases: list[tuple[int, float, int]] = field(default_factory=list)  # token, added to its logit, before position
    bad_words: list[tuple[int, ...]] = field(default_factory=list)  # of several tokens
    count_row: int = -1  # of ``LogitRules.counts``; -1 without penalties
    processors: list[tuple[Callable[..., Any], bool]] = field(default_factory=list)  # and whether it takes the prompt


@dataclass(slots=True)
class _BatchRules:
    """The rules of a batch's rows, on the device."""

    processors: list[tuple[int, _SlotRules]]  # row
    allowed: tuple[list[int], torch.Tensor, torch.Tensor] | None  # rows; row and id of each allowed token
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None  # row, token, value, before position
    # row, last token, [words, most tokens - 1] others, where the output begins
    bad_words: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    penalties: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # row, row of counts, [3, rows] penalties


class LogitRules:
    """The rules of all resident sequences.

    Args:
        vocab_size: Columns of the logits.
        device: Where they are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._slots: dict[int, _SlotRules] = {}
        # A row for each resident with penalties: how often its output holds each token.
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free_count_rows: list[int] = []
        self._batch: tuple[Sequence[int], _BatchRules] | None = None  # of the last batch: most have the same rows

    def enter(self, entry: SlotEntry) -> None:
        """Note the rules of a sequence that enters a slot."""
        if not has_rules(entry):
            return
        params, rules = entry.params, _SlotRules(entry.params, entry.num_prompt_tokens)
        rules.processors = [(processor, takes_prompt(processor)) for processor in params.logits_processors or ()]
        rules.biases = [(token, bias, _ALWAYS) for token, bias in (params.logit_bias or {}).items()]
        end = min(entry.num_prompt_tokens + params.min_tokens, _ALWAYS)
        rules.biases += [(token, float("-inf"), end) for token in entry.stop_token_ids]
        rules.biases += [(word[0], float("-inf"), _ALWAYS) for word in entry.bad_words if len(word) == 1]
        rules.bad_words = [word for word in entry.bad_words if len(word) > 1]
        if has_penalties(params):
            rules.count_row = self._count(entry)
        self._slots[entry.slot] = rules
        self._batch = None

    def release(self, slot: int) -> None:
        """Forget the rules of a slot's sequence."""
        rules = self._slots.pop(slot, None)
        if rules is not None:
            self._batch = None
            if rules.count_row >= 0:
                self._free_count_rows.append(rules.count_row)

    def concerns(self, slots: Sequence[int]) -> bool:
        """Whether any of the slots' sequences has rules."""
        return bool(self._slots) and any(slot in self._slots for slot in slots)

    def apply(
        self,
        logits: torch.Tensor,
        slots: Sequence[int],
        slot_index: torch.Tensor,
        positions: torch.Tensor,
        longest: int,
        token_ids: torch.Tensor,
    ) -> dict[int, str]:
        """Apply the rules of the rows, in place.

        Args:
            logits: float32 [rows, vocab_size].
            slots: Each row's slot.
            slot_index: The same, int64 [rows].
            positions: int64 [rows], positions of the tokens to be sampled.
            longest: At least the largest of them.
            token_ids: int32 [slots, positions], the tokens of all residents.

        Returns:
            By row, what went wrong in a logits processor; such a row's logits are NaN.
        """
        if not self.concerns(slots):
            return {}
        batch = self._batch[1] if self._batch is not None and self._batch[0] == slots else self._collect(slots)
        self._batch = (slots, batch)
        errors: dict[int, str] = {}
        for row, rules in batch.processors:
            known = token_ids[slots[row], : int(positions[row])].tolist()
            try:
                logits[row] = _process(rules, known, logits[row].clone())  # which it may keep
            except Exception as error:  # whatever a user's callable raises ends its request and no other
                errors[row] = f"logits processor: {type(error).__name__}: {error}"
                logits[row] = float("nan")
        if batch.allowed is not None:
            rows, at, token = batch.allowed
            kept = logits[at, token]
            for row in rows:
                logits[row].fill_(float("-inf"))
            logits[at, token] = kept
        if batch.biases is not None:
            at, token, value, until = batch.biases
            value = torch.where(positions[at] < until, value, 0.0)
            logits.index_put_((at, token), value, accumulate=True)
        if batch.bad_words is not None:
            at, token, others, output = batch.bad_words
            offsets = torch.arange(-others.shape[1], 0, device=self.device)
            places = positions[at][:, None] + offsets
            before = token_ids[slot_index[at][:, None], places.clamp(min=0)]
            completes = ((before == others) & (places >= output[:, None]) | (others < 0)).all(dim=1)
            value = torch.where(completes, float("-inf"), 0.0)
            logits.index_put_((at, token), value, accumulate=True)
        if batch.penalties is not None:
            self._penalize(logits, batch.penalties, slot_index, positions, longest, token_ids)
        return errors

    def record(self, slots: Sequence[int], tokens: torch.Tensor) -> None:
        """Count the tokens [rows] sampled for ``slots``."""
        if not self._slots:
            return
        rows = [(i, self._slots[slot].count_row) for i, slot in enumerate(slots) if slot in self._slots]
        rows = [(i, count_row) for i, count_row in rows if count_row >= 0]
        if rows:
            index, count_rows = self._tensor(rows).unbind(dim=1)
            self.counts[count_rows, tokens[index].clamp(min=0)] += 1

    def _count(self, entry: SlotEntry) -> int:
        """A row of counts for the output of ``entry``: after a preemption it has one already."""
        if not self._free_count_rows:
            size = self.counts.shape[0]
            grown = torch.zeros(max(4, 2 * size), self.vocab_size, dtype=torch.int32, device=self.device)
            grown[:size] = self.counts
            self.counts = grown
            self._free_count_rows = list(range(grown.shape[0] - 1, size - 1, -1))
        row = self._free_count_rows.pop()
        self.counts[row].zero_()
        tokens, numbers = np.unique(
            np.array(entry.token_ids[entry.num_prompt_tokens :], dtype=np.int64), return_counts=True
        )
        if len(tokens):
            where, written = upload([tokens, numbers], self.device)
            self.counts[row, where] = written.to(torch.int32)
        return row

    def _penalize(
        self,
        logits: torch.Tensor,
        penalties: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        slot_index: torch.Tensor,
        positions: torch.Tensor,
        longest: int,
        token_ids: torch.Tensor,
    ) -> None:
        """Penalise the tokens that prompt and output hold: each place of the text looks up its token's count."""
        row, count_row, values = penalties
        repetition, presence, frequency = values[:, :, None]
        held = token_ids[slot_index[row], :longest].long()  # [rows, longest]
        inside = torch.arange(longest, device=self.device) < positions[row][:, None]
        held = torch.where(inside, held, held[:, :1])
        places = count_row[:, None] * self.vocab_size + held  # eight times as fast as two indices, on the CPU
        count = self.counts.view(-1).index_select(0, places.view(-1)).view_as(held)
        old = logits[row[:, None], held]
        new = torch.where(old > 0, old / repetition, old * repetition)
        new = new - frequency * count - presence * (count > 0)
        logits[row[:, None], held] = new  # the places of one token write the same value

    def _collect(self, slots: Sequence[int]) -> _BatchRules:
        rules = [(row, self._slots[slot]) for row, slot in enumerate(slots) if slot in self._slots]
        allowed = [(row, token) for row, r in rules for token in r.params.allowed_token_ids or ()]
        biases = [(row, *bias) for row, r in rules for bias in r.biases]
        words = [(row, word, r.num_prompt_tokens) for row, r in rules for word in r.bad_words]
        penalised = [(row, r) for row, r in rules if r.count_row >= 0]
        batch = _BatchRules([(row, r) for row, r in rules if r.processors], None, None, None, None)
        if allowed:
            row, token = self._tensor(allowed).unbind(dim=1)
            batch.allowed = (sorted({row for row, _ in allowed}), row, token)
        if biases:
            rows, tokens, values, until = map(list, zip(*biases, strict=True))
            batch.biases = (
                self._tensor(rows),
                self._tensor(tokens),
                self._tensor(values, torch.float32),
                self._tensor(until),
            )
        if words:
            width = max(len(word) for _, word, _ in words) - 1
            others = [[-1] * (width + 1 - len(word)) + list(word[:-1]) for _, word, _ in words]
            batch.bad_words = (
                self._tensor([row for row, _, _ in words]),
                self._tensor([word[-1] for _, word, _ in words]),
                self._tensor(others),
                self._tensor([output for _, _, output in words]),
            )
        if penalised:
            params = [r.params for _, r in penalised]
            values = [
                [min(max(p.repetition_penalty, _LEAST_REPETITION), _MOST_REPETITION) for p in params],
                [p.presence_penalty for p in params],
                [p.frequency_penalty for p in params],
            ]
            batch.penalties = (
                self._tensor([row for row, _ in penalised]),
                self._tensor([r.count_row for _, r in penalised]),
                self._tensor(values, torch.float32),
            )
        return batch

    def _tensor(self, values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return to_device(values, dtype, self.device)


def has_penalties(params: SamplingParams) -> bool:
    """Whether a request penalises tokens it has seen."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def has_rules(entry: SlotEntry) -> bool:
    """Whether a sequence asks anything of its logits."""
    params = entry.params
    return has_penalties(params) or bool(
        params.logit_bias
        or params.allowed_token_ids
        or params.logits_processors
        or entry.stop_token_ids
        or entry.bad_words
    )


def takes_prompt(processor: Callable[..., Any]) -> bool:
    """Whether a logits processor needs three arguments, the prompt's tokens first; one content with two gets two."""
    try:
        signature = inspect.signature(processor)
    except Exception:  # a builtin without a signature; a callable whose own is none
        return False
    return not _accepts(signature, 2) and _accepts(signature, 3)


def _accepts(signature: inspect.Signature, number: int) -> bool:
    try:
        signature.bind(*[None] * number)
    except TypeError:
        return False
    return True


def _process(rules: _SlotRules, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Run a request's logits processors on its row."""
    prompt, output = token_ids[: rules.num_prompt_tokens], token_ids[rules.num_prompt_tokens :]
    shape = logits.shape
    for processor, prompted in rules.processors:  # each gets lists of its own
        logits = processor([*prompt], [*output], logits) if prompted else processor([*output], logits)
        if not isinstance(logits, torch.Tensor) or logits.shape != shape:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"it must return logits of shape {tuple(shape)}, not {found}")
    return logits
