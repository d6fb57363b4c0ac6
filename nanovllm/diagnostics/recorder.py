"""Records what a scheduler and its block manager do, and checks their books meanwhile.

While a run is recorded, methods of these two objects are replaced by ones that call them and take notes. Nothing
in the engine knows of it, so it costs nothing when it is off.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.diagnostics.books import Books, Event
from nanovllm.diagnostics.run_record import Row, RunRecord, Segment, Step, TracedSequence
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.step_plan import StepPlan, StepResult
from nanovllm.llm import LLM
from nanovllm.utils.model_name import model_name

logger = logging.getLogger(__name__)

MOST_PROMPT_CHARACTERS = 120  # of a prompt's text that are kept
MOST_VIOLATIONS = 100

_OF_SCHEDULER = ("add", "schedule", "update", "finish", "finish_all", "take_back", "reset")
_OF_MANAGER = ("take_prefix", "allocate", "publish", "free", "reset_prefix_cache")


@contextmanager
def record(llm: LLM, check: bool = False) -> Iterator[RunRecord]:
    """Record what an engine does until the end of the context.

    Args:
        llm: Whose run; any of its calls may be made meanwhile, from any thread.
        check: Check all of the block manager's books after every operation, which takes time in proportion to the
            number of blocks. What an operation touched is checked in any case, and everything at the end.

    Yields:
        The record, which grows; it is complete once the context has ended.

    Raises:
        RuntimeError: The engine is being recorded already.
    """
    engine = llm.engine

    def text_of(seq: Sequence) -> str | None:
        request = engine._requests.get(seq.request_id)
        return None if request is None else request.prompt

    recorder = Recorder(engine.scheduler, check=check, text_of=text_of)
    metrics = llm.get_metrics()
    names = ("device", "dtype", "quantization", "attention_backend", "num_threads", "kvcache_bytes")
    recorder.record.engine |= {
        "model": "demo" if engine.config.model == DEMO_MODEL_PATH else model_name(engine.config.model),
        **{name: metrics[name] for name in names},
        "enable_prefix_caching": engine.config.enable_prefix_caching,
        "max_model_len": engine.max_model_len,
    }
    with engine.turns.lock:  # not in the middle of a step
        recorder.start()
    try:
        yield recorder.record
    finally:
        with engine.turns.lock:
            recorder.stop()


class Recorder:
    """Takes notes of what a scheduler does, from :meth:`start` to :meth:`stop`.

    Args:
        scheduler: Whose methods are replaced meanwhile, and its block manager's.
        check: Whether everything is checked after every operation.
        text_of: The text of a sequence's prompt, if it has one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        check: bool = False,
        text_of: Callable[[Sequence], str | None] = lambda seq: None,
    ) -> None:
        self.scheduler, self.manager = scheduler, scheduler.block_manager
        self.check, self.text_of = check, text_of
        self.books = Books()
        self.record = RunRecord(
            engine={
                "num_blocks": self.manager.num_blocks,
                "block_size": self.manager.block_size,
                "max_num_seqs": scheduler.max_num_seqs,
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            },
            is_checked=check,
        )
        self._segment = Segment("between", -1)  # where events go; it is in the record once it has any
        self._is_planning = False  # whoever loses its blocks now is preempted
        self._steps: dict[int, Step] = {}  # in flight, by the identity of their plans
        self._plans: dict[int, StepPlan] = {}  # which must live so long
        self._live: dict[int, Sequence] = {}  # sequences that have not ended, by number
        self._started = 0.0

    def start(self) -> None:
        """Begin; RuntimeError if somebody records this scheduler already."""
        if "schedule" in vars(self.scheduler):
            raise RuntimeError("this engine is being recorded already; end that recording first")
        self._started = time.perf_counter()
        self._note_what_is_there()
        for owner, names in ((self.scheduler, _OF_SCHEDULER), (self.manager, _OF_MANAGER)):
            for name in names:
                setattr(owner, name, partial(getattr(self, f"_{name}"), getattr(owner, name)))

    def stop(self) -> None:
        """End, and check everything once more."""
        for owner, names in ((self.scheduler, _OF_SCHEDULER), (self.manager, _OF_MANAGER)):
            for name in names:
                vars(owner).pop(name, None)
        self.record.seconds = self._now()
        self._check_everything()
        for seq in self._live.values():
            self.record.sequences[seq.number].num_output_tokens = seq.num_output_tokens
        self._live.clear()
        self._steps.clear()
        self._plans.clear()

    # ---- what is called instead of the scheduler's methods

    def _add(self, original: Callable[..., None], seq: Sequence) -> None:
        original(seq)
        self._meet(seq, self._now())

    def _schedule(self, original: Callable[[], StepPlan | None]) -> StepPlan | None:
        begin, number = self._now(), len(self.record.steps)
        segment = self._open("plan", number)
        self._is_planning = True
        try:
            plan = original()
        except BaseException:
            segment.phase, segment.step = "between", number - 1  # there is no such step
            raise
        finally:
            self._is_planning = False
        launched = self._now()
        if plan is None:  # nothing runs, but somebody may have been preempted
            segment.phase, segment.step = "between", number - 1
            self._close()
            return None
        residents = {seq.slot: seq for seq in self.scheduler.running}
        entered = {entry.slot for entry in plan.entered}
        rows = []
        for slot, start, length, samples in zip(plan.slots, plan.starts, plan.lengths, plan.samples, strict=True):
            seq = residents[slot]
            is_prefill = slot in entered or length > 1 or not samples or start < seq.num_prompt_tokens
            rows.append(Row(seq.number, start, length, bool(samples), is_prefill))
            if slot in entered:
                self._note(Event("admitted", seq.number, value=start))
        books = self.books
        step = Step(
            number,
            rows,
            begin,
            launched,
            num_waiting=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            num_held=len(books.holders),
            num_cached=books.num_cached,
        )
        self.record.steps.append(step)
        self._steps[id(plan)], self._plans[id(plan)] = step, plan
        if self.manager.num_used_blocks != step.num_held:
            self._complain(f"{self.manager.num_used_blocks} blocks are in use; by what happened, {step.num_held} are")
        self._close()
        return plan

    def _update(self, original: Callable[..., list[Sequence]], plan: StepPlan, result: StepResult) -> list[Sequence]:
        step = self._steps.pop(id(plan), None)
        self._plans.pop(id(plan), None)
        if step is None:  # it was in flight when the recording began
            return original(plan, result)
        step.landed = self._now()
        self._open("land", step.number)
        advanced = original(plan, result)
        step.end = self._now()
        self._close()
        return advanced

    def _finish(self, original: Callable[..., None], seq: Sequence, reason: str) -> None:
        was_finished = seq.finished
        original(seq, reason)
        if not was_finished:
            self._note_end(seq)

    def _finish_all(self, original: Callable[..., None], sequences: Iterable[Sequence], reason: str) -> None:
        ending = [seq for seq in sequences if not seq.finished]
        original(ending, reason)
        for seq in ending:
            if seq.number in self._live:  # not one that ended by way of finish
                self._note_end(seq)
        self._check_if_asked()

    def _take_back(self, original: Callable[..., None], plan: StepPlan) -> None:
        self._is_planning = True
        try:
            original(plan)
        finally:
            self._is_planning = False
        step = self._steps.pop(id(plan), None)
        self._plans.pop(id(plan), None)
        if step is not None:
            step.was_taken_back = True
        self._check_if_asked()

    def _reset(self, original: Callable[[], None]) -> None:
        original()
        self._segment = Segment("between", len(self.record.steps) - 1)
        self._is_planning = False
        for number, table in list(self.books.tables.items()):
            self._note(Event("freed", number, tuple(table)))
        # What it was in the middle of may have been cut short before it was noted, or noted before it was cut short.
        known = {block for block in range(self.manager.num_blocks) if self.manager.is_published(block)}
        if lost := self.books.published - known:
            self._note(Event("forgotten", blocks=tuple(sorted(lost))))
        if found := known - self.books.published:
            self._note(Event("published", blocks=tuple(sorted(found))))
        for seq in list(self._live.values()):
            self._note_end(seq)
        self._steps.clear()
        self._plans.clear()
        self._check_if_asked()

    # ---- and instead of the block manager's

    def _take_prefix(self, original: Callable[..., None], seq: Sequence, matched: list[int]) -> None:
        original(seq, matched)
        if matched:
            self._note(Event("shared", seq.number, tuple(matched)))
            self._compare(seq, matched)

    def _allocate(self, original: Callable[..., list[int]], seq: Sequence, num_tokens: int) -> list[int]:
        added = original(seq, num_tokens)
        if added:
            evicted = tuple(block for block in added if block in self.books.published)
            if evicted:
                self._note(Event("evicted", seq.number, evicted))
            self._note(Event("allocated", seq.number, tuple(added)))
            self._compare(seq, added)
        return added

    def _publish(self, original: Callable[..., None], seq: Sequence, num_computed_tokens: int) -> None:
        first = seq.num_published_blocks
        original(seq, num_computed_tokens)
        full = seq.block_table[first : seq.num_published_blocks]  # a twin's block may have been first
        new = [block for block in full if self.manager.is_published(block) and block not in self.books.published]
        if new:
            self._note(Event("published", seq.number, tuple(new)))
            self._compare(seq, new)

    def _free(self, original: Callable[..., None], seq: Sequence) -> None:
        blocks = list(seq.block_table)
        original(seq)
        if self._is_planning:
            self._note(Event("preempted", seq.number))
        if blocks:
            self._note(Event("freed", seq.number, tuple(blocks)))
            self._compare(seq, blocks)

    def _reset_prefix_cache(self, original: Callable[[], None]) -> None:
        original()
        if self.books.published:
            self._note(Event("forgotten", blocks=tuple(sorted(self.books.published))))
        self._check_if_asked()

    # ---- notes

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _note_what_is_there(self) -> None:
        """Events that lead to what the engine holds when the recording begins."""
        published = tuple(block for block in range(self.manager.num_blocks) if self.manager.is_published(block))
        if published:
            self._note(Event("published", blocks=published))
        for seq in [*self.scheduler.running, *self.scheduler.waiting]:
            self._meet(seq, 0.0)
            if seq.status is SequenceStatus.RUNNING:
                for block in seq.block_table:
                    is_known = block in self.books.holders or block in self.books.published
                    self._note(Event("shared" if is_known else "allocated", seq.number, (block,)))
                self._note(Event("admitted", seq.number, value=0))

    def _meet(self, seq: Sequence, now: float) -> None:
        text = self.text_of(seq)
        self._live[seq.number] = seq
        self.record.sequences[seq.number] = TracedSequence(
            seq.number,
            seq.request_id,
            seq.index,
            seq.num_prompt_tokens,
            seq.max_output_tokens,
            now,
            None if text is None else text[:MOST_PROMPT_CHARACTERS],
        )
        self._note(Event("added", seq.number))

    def _note_end(self, seq: Sequence) -> None:
        traced = self.record.sequences.get(seq.number)
        if traced is None:
            return
        traced.num_output_tokens = seq.num_output_tokens
        traced.finished, traced.finish_reason = self._now(), seq.finish_reason or "abort"
        self._live.pop(seq.number, None)
        self._note(Event("finished", seq.number, value=traced.finish_reason))

    def _open(self, phase: str, step: int) -> Segment:
        self._segment = Segment(phase, step)
        return self._segment

    def _close(self) -> None:
        """End the segment of a plan or a landing; what follows is between steps."""
        if self._segment.events or self._segment.phase == "plan":
            self._keep(self._segment)
        self._segment = Segment("between", len(self.record.steps) - 1)
        self._check_if_asked()

    def _keep(self, segment: Segment) -> None:
        if not self.record.segments or self.record.segments[-1] is not segment:
            self.record.segments.append(segment)

    def _note(self, event: Event) -> None:
        self._segment.events.append(event)
        self._keep(self._segment)
        try:
            self.books.apply(event)
        except ValueError as error:
            self._complain(str(error))

    # ---- checks

    def _compare(self, seq: Sequence, blocks: Iterable[int]) -> None:
        """Complain if the manager's books of what was just touched differ from what events came to."""
        if self.books.tables.get(seq.number, []) != seq.block_table:
            self._complain(f"sequence {seq.number} holds {seq.block_table}, not {self.books.tables.get(seq.number)}")
        for block in blocks:
            self._compare_block(block)

    def _compare_block(self, block: int) -> None:
        counted, seen = self.manager.num_holders(block), self.books.holders.get(block, 0)
        if counted != seen:
            self._complain(f"block {block} is held {seen} times, but counted {counted}")
        if self.manager.is_published(block) != (block in self.books.published):
            self._complain(
                f"block {block}: the prefix cache {'knows' if self.manager.is_published(block) else 'lost'} it"
            )

    def _check_if_asked(self) -> None:
        if self.check:
            self._check_everything()

    def _check_everything(self) -> None:
        try:
            self.scheduler.check_integrity()
        except RuntimeError as error:
            self._complain(str(error))
        for seq in self.scheduler.running:
            self._compare(seq, ())
        for block in range(self.manager.num_blocks):
            self._compare_block(block)

    def _complain(self, what: str) -> None:
        """Note a violation: the run goes on, as it would without a witness."""
        message = f"step {len(self.record.steps) - 1}: {what}"
        logger.error("the KV cache's books are wrong: %s", message)
        if len(self.record.violations) < MOST_VIOLATIONS:
            self.record.violations.append(message)
