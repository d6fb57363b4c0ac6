"""Step plans as messages to the other ranks: only what they cannot tell by themselves.

Most steps decode the rows of the step before, each one token further, less those that were released: then rows need
not be named at all. Whatever the length of the contexts and the size of the batch, such a message is a few bytes and
twelve for each new block.
"""

import pickle
from array import array
from dataclasses import replace

from nanovllm.engine.batch_state import is_special
from nanovllm.engine.step_plan import SlotEntry, StepPlan
from nanovllm.sampling_params import SamplingParams

_GOES_ON, _WHOLE = b"+", b"="


class PlanEncoder:
    """The sender's side; remembers the last plan."""

    def __init__(self) -> None:
        self._last = StepPlan()

    def encode(self, plan: StepPlan) -> bytes:
        """The message that makes a :class:`PlanDecoder`, given all messages before it, return ``plan``."""
        slots, starts = _next_rows(self._last, plan.released)
        goes_on = plan.slots == slots and plan.starts == starts and not plan.entered and not plan.num_prefill_tokens
        self._last = plan
        if goes_on and all(plan.samples) and plan.num_tokens == len(slots):
            numbers = array("i", [len(plan.released), *plan.released])
            for block in plan.appended_blocks:
                numbers.extend(block)
            return _GOES_ON + numbers.tobytes()
        return _WHOLE + pickle.dumps(
            (
                plan.released,
                [_without_what_rank_0_decides(entry) for entry in plan.entered],
                plan.appended_blocks,
                array("i", plan.slots),
                array("i", plan.starts),
                array("i", plan.lengths),
                bytes(plan.samples),
                plan.num_prefill_tokens,
            ),
            protocol=5,
        )


class PlanDecoder:
    """The receiver's side; remembers the last plan."""

    def __init__(self) -> None:
        self._last = StepPlan()

    def decode(self, message: bytes) -> StepPlan:
        """The plan of a message of :meth:`PlanEncoder.encode`; entries lack what only rank 0 needs."""
        if message[:1] == _GOES_ON:
            numbers = array("i", message[1:]).tolist()
            released, blocks = numbers[1 : 1 + numbers[0]], numbers[1 + numbers[0] :]
            slots, starts = _next_rows(self._last, released)
            appended = list(zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True))
            count = len(slots)
            plan = StepPlan(released, [], appended, slots, starts, [1] * count, [True] * count)
        else:
            released, entered, appended, slots, starts, lengths, samples, num_prefill_tokens = pickle.loads(message[1:])
            rows = slots.tolist(), starts.tolist(), lengths.tolist(), [bool(flag) for flag in samples]
            plan = StepPlan(released, entered, appended, *rows, num_prefill_tokens)
        self._last = plan
        return plan


def _next_rows(last: StepPlan, released: list[int]) -> tuple[list[int], list[int]]:
    """Slots and starts of a step in which whatever computed tokens before decodes on."""
    gone = set(released)
    rows = [
        (slot, start + length)
        for slot, start, length in zip(last.slots, last.starts, last.lengths, strict=True)
        if slot not in gone
    ]
    return [slot for slot, _ in rows], [start for _, start in rows]


def _without_what_rank_0_decides(entry: SlotEntry) -> SlotEntry:
    """``entry`` as the other ranks need it: a request's callables cannot travel, and are nobody else's to call."""
    params, special = entry.params, is_special(entry)
    plain = SamplingParams(temperature=params.temperature if not special else 1.0, detokenize=False)
    if entry.first_logprob is not None:
        plain.prompt_logprobs = params.prompt_logprobs
    return replace(entry, params=plain, stop_token_ids=(), bad_words=(), special=special)
