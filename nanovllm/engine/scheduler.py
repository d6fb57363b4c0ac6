"""Which tokens of which sequence run next. Policy only: no tensors, no model.

First come, first served: sequences are admitted in the order of their arrival, the oldest get the token budget
first, and when blocks run out the youngest resident gives its own up and is computed again later. So the oldest
always advances, and nobody starves.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from nanovllm.engine.admission import AdmissionPolicy, Gathering
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.step_plan import SlotEntry, StepPlan, StepResult

logger = logging.getLogger(__name__)

# A sequence is admitted while every resident can still grow by this many tokens: without the reserve, one would be
# admitted into the last free blocks only to be preempted a step later.
HEADROOM_TOKENS = 16
# Steps that were too large for the device's memory are halved down to this many tokens.
MIN_STEP_TOKENS = 256
# Preemptions are warned of, once, when there have been so many and one for so many admissions.
MANY_PREEMPTIONS, ADMISSIONS_EACH = 16, 8


@dataclass(slots=True)
class _InFlight:
    """A plan handed out by ``schedule`` whose tokens ``update`` has not seen yet."""

    plan: StepPlan
    sequences: list[Sequence]  # a row each
    num_preemptions: int  # that came before: of who is preempted later, the KV is gone


class Scheduler:
    """Plans steps, and follows what they did.

    ``schedule`` may be called again before ``update`` was told the tokens of the previous plan: a sampled token
    whose id is not known yet can already be scheduled, because its id lives on the device.

    Args:
        block_manager: Owner of the KV blocks.
        max_num_seqs: Most resident sequences, and the number of slots.
        max_num_batched_tokens: Token budget of a step.
        policy: When waiting sequences join.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: AdmissionPolicy | None = None,
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_running = max_num_seqs  # lower than the number of slots once a step was too large for the device
        self._full_limits = max_num_batched_tokens, max_num_seqs
        self.policy = policy or AdmissionPolicy()
        self._gathering = Gathering()
        self.waiting: deque[Sequence] = deque()  # by arrival; all are younger than any in ``running``
        self.running: list[Sequence] = []  # by arrival
        self.num_preemptions = 0
        self._num_admissions = 0
        self._has_warned = False
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._in_flight: deque[_InFlight] = deque()
        self._released: list[int] = []  # slots to name in the next plan
        # The head of the queue that did not fit, and how many blocks it could share: it is not asked again before
        # somebody gives blocks back, or publishes the next one that it could share.
        self._refused: tuple[Sequence, int] | None = None

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence still waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def num_in_flight(self) -> int:
        """Plans handed out whose tokens are not known yet."""
        return len(self._in_flight)

    def max_tokens_per_sequence(self) -> int:
        """Longest sequence that the KV cache holds, its last token included (whose KV is never needed)."""
        return self.block_manager.num_blocks * self.block_manager.block_size + 1

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Its full length must fit the KV cache (see ``max_tokens_per_sequence``)."""
        self.waiting.append(seq)

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None if nothing can run before a step in flight is done."""
        plan = StepPlan()
        rows: list[Sequence] = []
        budget = self.max_num_batched_tokens
        num_preempted = self.num_preemptions
        if self.policy.mixed:
            budget = self._continue(plan, rows, budget)
        else:
            budget = self._continue(plan, rows, budget, only_prefills=True)
        if self.num_preemptions == num_preempted and self._may_admit():
            self._admit(plan, rows, budget)
        if not rows and not self.policy.mixed:
            self._continue(plan, rows, budget)
        if not rows:
            return None
        plan.released, self._released = self._released, []
        self._in_flight.append(_InFlight(plan, rows, self.num_preemptions))
        return plan

    def _continue(self, plan: StepPlan, rows: list[Sequence], budget: int, only_prefills: bool = False) -> int:
        """Schedule the residents, or those that prefill, the oldest first; returns what is left of the budget."""
        block_size = self.block_manager.block_size
        for seq in self.running:  # _grow preempts from the end of the list: whom it takes away is not reached
            if budget <= 0:
                break
            num_left = seq.num_tokens_to_compute
            # A row that decodes computes the token that was sampled last, and no other.
            is_prefill = num_left > 1 or seq.num_computed_tokens < seq.num_prompt_tokens
            if num_left == 0 or (only_prefills and not is_prefill):
                continue
            length = num_left if num_left < budget else budget
            num_computed = seq.num_computed_tokens + length
            # Its last block has room in nearly every decode step.
            if num_computed > len(seq.block_table) * block_size and not self._grow(seq, num_computed, plan):
                break  # it preempted itself: it was the youngest, so nobody comes after it
            self._add_row(plan, rows, seq, length, length == num_left, is_prefill)
            budget -= length
        return budget

    def update(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Take in what the oldest plan in flight gave.

        Args:
            plan: The plan, now done.
            result: Its tokens and log-probabilities.

        Returns:
            The sequences that got a token or an error, those that ended with it included.
        """
        batch = self._in_flight.popleft()
        if batch.plan is not plan:
            raise RuntimeError("steps must be finished in the order in which they were planned")
        if len(result.tokens) != sum(plan.samples):
            raise RuntimeError(
                f"{sum(plan.samples)} rows of the plan sample, but {len(result.tokens)} tokens came back"
            )
        for row, (first, prompt_logprobs) in result.prompt_logprobs.items():
            batch.sequences[row].prompt_logprobs.update(enumerate(prompt_logprobs, first))
        advanced: list[Sequence] = []
        tokens, logprobs, block_size = result.tokens, result.logprobs, self.block_manager.block_size
        sampling_row = -1
        for seq, start, length, samples in zip(batch.sequences, plan.starts, plan.lengths, plan.samples, strict=True):
            sampling_row += samples
            if seq.finish_reason is not None:
                continue  # it ended while this step was in flight: a surplus token
            num_computed = start + length
            if samples:
                advanced.append(seq)
                token = tokens[sampling_row]
                if token < 0:
                    seq.error = result.errors[sampling_row]
                    self.finish(seq, "error")
                    continue
                seq.token_ids.append(token)
                if logprobs and sampling_row in logprobs:
                    seq.logprobs.append(logprobs[sampling_row])
            if num_computed // block_size > seq.num_published_blocks and seq.last_preemption <= batch.num_preemptions:
                self.block_manager.publish(seq, num_computed)
            if samples and (token in seq.stop_token_ids or num_computed >= seq.max_computed_tokens):
                self._end(seq, token)
        return advanced

    def _end(self, seq: Sequence, token: int) -> None:
        """Finish ``seq`` if its newest token ends it."""
        if token in seq.stop_token_ids and seq.num_output_tokens > seq.params.min_tokens:
            seq.stop_reason = None if token == seq.main_eos_token_id else token
            self.finish(seq, "stop")
        elif seq.num_output_tokens >= seq.max_output_tokens:
            self.finish(seq, "length")

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence, wherever it is; ending it twice does nothing.

        Its blocks can be handed out at once even if a step in flight still writes them: steps run in order on the
        device, so that write comes before any of the next owner's.
        """
        if seq.finished:
            return
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._vacate(seq)
            self._gathering.note_ended()
        elif seq in self.waiting:  # compared by identity
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

    def finish_all(self, sequences: Iterable[Sequence], reason: str) -> None:
        """End several; the queue is gone through once."""
        for seq in sequences:
            if seq.status is SequenceStatus.WAITING:
                seq.status = SequenceStatus.FINISHED
                seq.finish_reason = reason
            else:
                self.finish(seq, reason)
        self.waiting = deque(seq for seq in self.waiting if not seq.finished)

    def take_back(self, plan: StepPlan) -> None:
        """Forget the newest plan, which was never run, and preempt every resident: the device starts afresh."""
        batch = self._in_flight.pop()
        if batch.plan is not plan:
            raise RuntimeError("only the newest plan can be taken back")
        for seq, samples in zip(batch.sequences, plan.samples, strict=True):
            if not seq.finished:
                seq.num_expected_tokens -= samples
        while self.running:
            self._preempt(self.running[-1])
        entered = {entry.slot for entry in plan.entered}  # as far as the device knows, these never were
        self._released = [*plan.released, *(slot for slot in self._released if slot not in entered)]

    def back_off(self, plan: StepPlan) -> bool:
        """Plan smaller steps than ``plan`` from now on; returns False if they cannot become smaller."""
        tokens, rows = plan.num_tokens, len(plan.slots)
        if tokens <= MIN_STEP_TOKENS and rows == 1:
            return False
        if tokens > MIN_STEP_TOKENS:
            self.max_num_batched_tokens = max(MIN_STEP_TOKENS, tokens // 2)
        if rows > 1:
            self.max_num_running = rows // 2
        return True

    def restore_limits(self) -> None:
        """Plan steps of full size again, after :meth:`back_off`."""
        self.max_num_batched_tokens, self.max_num_running = self._full_limits

    def forget_surplus(self) -> None:
        """Forget the plans in flight, none of whose sequences is still wanted."""
        if any(not seq.finished for batch in self._in_flight for seq in batch.sequences):
            raise RuntimeError("a step in flight computes a sequence that has not ended")
        self._in_flight.clear()

    def reset(self) -> None:
        """Drop every sequence and every plan in flight; the prefix cache stays. Safe after an interrupt anywhere."""
        for seq in [*self.waiting, *self.running]:
            seq.status = SequenceStatus.FINISHED
            seq.finish_reason = seq.finish_reason or "abort"
            seq.block_table.clear()
        self.waiting.clear()
        self.running.clear()
        self._in_flight.clear()
        self._released.clear()
        self._free_slots = list(range(self.max_num_seqs - 1, -1, -1))
        self._refused = None
        self._gathering.end()
        self.block_manager.release_everything()

    def check_integrity(self) -> None:
        """Raise RuntimeError if the books are wrong. For tests, between any two operations."""
        self.block_manager.check_integrity(self.running)
        if len(self.running) > self.max_num_seqs:
            raise RuntimeError(f"{len(self.running)} sequences are resident; max_num_seqs is {self.max_num_seqs}")
        slots = [seq.slot for seq in self.running] + self._free_slots
        if sorted(slots) != list(range(self.max_num_seqs)):
            raise RuntimeError(f"slots are lost or shared: {sorted(slots)}")
        numbers = [seq.number for seq in self.running] + [seq.number for seq in self.waiting]
        if numbers != sorted(set(numbers)):
            raise RuntimeError(f"arrival order is broken: {numbers}")
        for seq in self.waiting:
            if seq.block_table or seq.slot != -1 or seq.num_computed_tokens:
                raise RuntimeError(f"{seq.request_id} waits but holds blocks, a slot or computed tokens")
        for seq in self.running:
            if len(seq.block_table) < self.block_manager.blocks_needed(seq.num_computed_tokens):
                raise RuntimeError(f"{seq.request_id} has computed tokens without a block")

    def _may_admit(self) -> bool:
        """Whether it is time for waiting sequences to join."""
        if not self.waiting:
            self._gathering.end()
            return False
        if self._num_vacancies() <= 0:
            self._gather()
            return False
        return self._gathering.step_passes(self.policy, len(self.waiting), len(self.running))

    def _gather(self) -> None:
        """Slots or blocks have run out: let several sequences end before others are admitted."""
        if self.policy.vacancies > 1:
            self._gathering.begin()

    def _num_vacancies(self) -> int:
        return self.max_num_running - len(self.running)

    def _admit(self, plan: StepPlan, rows: list[Sequence], budget: int) -> None:
        """Make waiting sequences resident, in order, while slots, blocks and budget last."""
        manager = self.block_manager
        headroom: int | None = None  # summed up only if somebody is asked: a head that waits costs nothing
        while self.waiting and budget > 0 and self._num_vacancies() > 0 and not self._must_wait(self.waiting[0]):
            seq = self.waiting[0]
            if headroom is None:
                headroom = sum(self._headroom(resident) for resident in self.running)
            matched = self._shareable_blocks(seq)
            needed = manager.blocks_needed(seq.num_tokens) - len(matched) + headroom
            if self.running and needed > manager.num_allocatable_after(matched):
                self._refused = (seq, len(matched))
                self._gather()
                return
            self.waiting.popleft()
            manager.take_prefix(seq, matched)
            manager.allocate(seq, seq.num_tokens)
            seq.num_computed_tokens = len(matched) * manager.block_size
            if not seq.metrics.num_preemptions:
                seq.num_cached_tokens = seq.num_computed_tokens
            seq.slot = self._free_slots.pop()
            seq.status = SequenceStatus.RUNNING
            if seq.metrics.first_scheduled_time is None:
                seq.metrics.first_scheduled_time = time.perf_counter()
            self.running.append(seq)
            self._num_admissions += 1
            plan.entered.append(
                SlotEntry(
                    seq.slot,
                    seq.token_ids[:],
                    list(seq.block_table),
                    seq.params,
                    seq.noise_key,
                    seq.num_prompt_tokens,
                    seq.first_logprob,
                    tuple(seq.stop_token_ids) if seq.num_output_tokens < seq.params.min_tokens else (),
                    seq.bad_words,
                )
            )
            headroom += self._headroom(seq)
            num_left = seq.num_tokens_to_compute
            length = min(num_left, budget)
            self._add_row(plan, rows, seq, length, length == num_left, is_prefill=True)
            budget -= length

    def _must_wait(self, seq: Sequence) -> bool:
        """Whether the head of the queue cannot run now, as far as is known without asking for its blocks."""
        if seq.num_in_flight:
            return True  # preempted while its next token was being sampled: the device no longer holds it
        leader = seq.leader
        if leader and leader.status is SequenceStatus.RUNNING and leader.num_computed_tokens < seq.num_shared_tokens:
            return True  # soon it will have computed what they share
        if self._refused is None or self._refused[0] is not seq:
            return False
        return not self.block_manager.can_match_more(*self._refused)

    def _shareable_blocks(self, seq: Sequence) -> list[int]:
        """Blocks that hold the beginning of ``seq``: its leader's, or cached ones if those are more; takes nothing."""
        matched = self.block_manager.match_prefix(seq)
        # A step in flight may still have to write the leader's blocks, or this very step: steps run in order, and each
        # layer writes before it attends, so it is there when we read.
        leader, size = seq.leader, self.block_manager.block_size
        if leader and leader.status is SequenceStatus.RUNNING:
            shared = min(leader.num_computed_tokens, seq.num_shared_tokens, seq.num_prompt_tokens - 1) // size
            if shared > len(matched):
                matched = leader.block_table[:shared]
        if seq.first_logprob is not None:
            matched = matched[: (seq.first_logprob - 1) // size]
        return matched

    def _headroom(self, seq: Sequence) -> int:
        """Blocks that a resident needs to grow by ``HEADROOM_TOKENS`` tokens, or to its end."""
        length = min(seq.num_tokens + HEADROOM_TOKENS, seq.max_computed_tokens)
        return max(0, self.block_manager.blocks_needed(length) - len(seq.block_table))

    def _add_row(
        self, plan: StepPlan, rows: list[Sequence], seq: Sequence, length: int, samples: bool, is_prefill: bool
    ) -> None:
        """Schedule the next ``length`` tokens of a resident sequence; it ``samples`` if they are all it has left."""
        plan.slots.append(seq.slot)
        plan.starts.append(seq.num_computed_tokens)
        plan.lengths.append(length)
        plan.samples.append(samples)
        if is_prefill:
            plan.num_prefill_tokens += length
        rows.append(seq)
        seq.num_computed_tokens += length
        if samples:
            seq.num_expected_tokens += 1

    def _grow(self, seq: Sequence, num_tokens: int, plan: StepPlan) -> bool:
        """Get blocks for ``num_tokens`` tokens, preempting the youngest while there are none.

        Returns whether ``seq`` itself is still resident.
        """
        manager = self.block_manager
        while manager.blocks_needed(num_tokens) - len(seq.block_table) > manager.num_free_blocks:
            victim = self.running[-1]
            num_lost = victim.num_computed_tokens
            self._preempt(victim)
            self._tell_of_preemption(victim, num_lost)
            if victim is seq:
                return False
        first = len(seq.block_table)
        for offset, block in enumerate(manager.allocate(seq, num_tokens)):
            plan.appended_blocks.append((seq.slot, first + offset, block))
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take everything from the youngest resident and put it at the head of the queue."""
        self.running.pop()
        self._vacate(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed_tokens = 0
        seq.metrics.num_preemptions += 1
        self.num_preemptions += 1
        seq.last_preemption = self.num_preemptions
        self.waiting.appendleft(seq)

    def _tell_of_preemption(self, seq: Sequence, num_lost: int) -> None:
        """Log that ``seq`` had to give up the KV of so many tokens for want of blocks."""
        logger.info(
            "preempted request %s, the youngest of %d: no block is free; %d tokens are computed again unless cached",
            seq.request_id,
            len(self.running) + 1,
            num_lost,
        )
        number = self.num_preemptions
        if not self._has_warned and number >= MANY_PREEMPTIONS and number * ADMISSIONS_EACH >= self._num_admissions:
            self._has_warned = True
            logger.warning(
                "%d preemptions in %d admissions: %d KV blocks of %d tokens are few for what runs at once, and work is "
                "done twice (raise num_kvcache_blocks or gpu_memory_utilization, or lower max_num_seqs)",
                number,
                self._num_admissions,
                self.block_manager.num_blocks,
                self.block_manager.block_size,
            )

    def _vacate(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        self._refused = None
        self._free_slots.append(seq.slot)
        self._released.append(seq.slot)
        seq.slot = -1
