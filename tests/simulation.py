"""The scheduler in front of a device without a model, which does what plans say and checks everything it reads."""

import dis
import functools
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

import nanovllm
from nanovllm.engine.admission import AdmissionPolicy
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import StepPlan, StepResult
from nanovllm.sampling_params import SamplingParams

VOCAB_SIZE = 23
MASK = (1 << 64) - 1


def extend_hash(prefix_hash: int, token: int) -> int:
    """Hash of a prefix with one more token; it stands for everything that attention would see."""
    return ((prefix_hash ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & MASK


def next_token(prefix_hash: int, noise_key: int) -> int:
    """The token that the device samples after a prefix."""
    return (extend_hash(prefix_hash, noise_key) >> 40) % VOCAB_SIZE


def continuation(seq: Sequence) -> list[int]:
    """What ``seq`` generates if it runs to its end: the device's function, iterated without any scheduler."""
    prefix_hash = 0
    for token in seq.token_ids[: seq.num_prompt_tokens]:
        prefix_hash = extend_hash(prefix_hash, token)
    output: list[int] = []
    while len(output) < seq.max_output_tokens:
        output.append(next_token(prefix_hash, seq.noise_key))
        if output[-1] in seq.stop_token_ids:
            break
        prefix_hash = extend_hash(prefix_hash, output[-1])
    return output


class KV(NamedTuple):
    """What a key and value depend on."""

    token: int
    position: int
    prefix_hash: int  # of all tokens up to and including this one


@dataclass
class Slot:
    """A row of the device's tables."""

    tokens: list[int]
    blocks: list[int]
    noise_key: int
    computed: int | None = None  # unknown until its first row says where it starts
    prefix: list[KV] = field(default_factory=list)  # what its KV must be, by position

    def expected(self, length: int) -> list[KV]:
        """The right KV of the first ``length`` tokens."""
        for position in range(len(self.prefix), length):
            parent = self.prefix[-1].prefix_hash if self.prefix else 0
            token = self.tokens[position]
            self.prefix.append(KV(token, position, extend_hash(parent, token)))
        return self.prefix[:length]


class SimulatedDevice:
    """Knows nothing but the plans it is given, and asserts that each makes sense to it.

    A token can be computed only if the KV of all tokens before it is in the cache, written by earlier steps (or
    earlier in its own chunk), where the slot's block table says, and is of exactly this sequence's prefix.
    """

    def __init__(self, num_slots: int, num_blocks: int, block_size: int) -> None:
        self.num_slots, self.num_blocks, self.block_size = num_slots, num_blocks, block_size
        self.slots: dict[int, Slot] = {}
        self.cache: dict[tuple[int, int], KV] = {}  # (block, offset) -> what was written there last

    def execute(self, plan: StepPlan, sharing: frozenset[int] = frozenset()) -> list[int]:
        """Run a plan; returns a token a sampling row.

        Rows of the slots ``sharing`` may read what rows before them write in the same step, as each layer writes
        before it attends.
        """
        for number in plan.released:
            del self.slots[number]
        for entry in plan.entered:
            assert entry.slot not in self.slots, "a sequence enters a slot that is taken"
            assert 0 <= entry.slot < self.num_slots
            self.slots[entry.slot] = Slot(list(entry.token_ids), list(entry.block_ids), entry.noise_key)
        for number, index, block in plan.appended_blocks:
            assert index == len(self.slots[number].blocks), "a hole in a block table"
            self.slots[number].blocks.append(block)
        for slot in self.slots.values():
            assert all(0 <= block < self.num_blocks for block in slot.blocks)
        rows = list(zip(plan.slots, plan.starts, plan.lengths, plan.samples, strict=True))
        assert len(set(plan.slots)) == len(rows), "a slot has two rows"
        written: dict[tuple[int, int], KV] = {}
        for number, start, length, samples in rows:
            readable = {**self.cache, **written} if number in sharing else self.cache
            self._compute(self.slots[number], start, length, samples, written, readable)
        self.cache.update(written)
        sampled = []
        for number, _, _, samples in rows:
            if samples:
                slot = self.slots[number]
                sampled.append(next_token(slot.prefix[-1].prefix_hash, slot.noise_key))
                slot.tokens.append(sampled[-1])
        return sampled

    def _compute(
        self,
        slot: Slot,
        start: int,
        length: int,
        samples: bool,
        written: dict[tuple[int, int], KV],
        readable: dict[tuple[int, int], KV],
    ) -> None:
        end = start + length
        assert length > 0, "a zero-length query"
        assert slot.computed in (None, start), "a token is skipped or computed twice"
        assert end <= len(slot.tokens), "a token is computed before it is sampled"
        assert samples == (end == len(slot.tokens)), "the row samples too early, or forgets to"
        assert end <= len(slot.blocks) * self.block_size, "a token has no block"
        expected = slot.expected(end)
        places = [(slot.blocks[p // self.block_size], p % self.block_size) for p in range(end)]
        assert [readable.get(place) for place in places[:start]] == expected[:start], "somebody else's KV is read"
        for place, kv in zip(places[start:], expected[start:], strict=True):
            assert place not in written, "two rows write to one place"
            written[place] = kv
        slot.computed = end


class Simulation:
    """A scheduler and a simulated device, driven as the engine drives them; the books are checked after each call.

    Args:
        depth: Steps launched before the tokens of the first are known: 0, or 1 for overlap.
        policy: When waiting sequences join.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 2,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 64,
        enable_prefix_caching: bool = True,
        depth: int = 0,
        policy: AdmissionPolicy | None = None,
    ) -> None:
        self.depth = depth
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(self.manager, max_num_seqs, max_num_batched_tokens, policy)
        self.device = SimulatedDevice(max_num_seqs, num_blocks, block_size)
        self.in_flight: deque[tuple[StepPlan, list[int]]] = deque()
        self.sequences: list[Sequence] = []
        self.first_tokens: list[int] = []  # numbers of the sequences, in the order of their first tokens

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        *,
        eos: tuple[int, ...] = (),
        noise_key: int = 0,
        leader: Sequence | None = None,
        first_logprob: int | None = None,
    ) -> Sequence:
        """Queue a prompt, or another completion of the leader's."""
        number = len(self.sequences)
        seq = Sequence(
            f"request {number}",
            number,
            prompt,
            SamplingParams(max_tokens=max_tokens),
            max_output_tokens=max_tokens,
            eos_token_ids=eos,
            noise_key=noise_key,
            leader=leader,
            num_shared_tokens=len(prompt) if leader is not None else 0,
            first_logprob=first_logprob,
        )
        assert len(prompt) + max_tokens <= self.scheduler.max_tokens_per_sequence()
        self.sequences.append(seq)
        self.scheduler.add(seq)
        self.scheduler.check_integrity()
        return seq

    def launch(self) -> StepPlan | None:
        """Plan a step and run it, without telling the scheduler its tokens."""
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is not None:
            self._check(plan)
            sharing = frozenset(seq.slot for seq in self.scheduler.running if seq.leader is not None)
            self.in_flight.append((plan, self.device.execute(plan, sharing)))
        return plan

    def refuse(self) -> None:
        """Plan a step that turns out too large for the device, which runs none of it."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self._check(plan)
            self.scheduler.take_back(plan)
            self.scheduler.check_integrity()
            assert not self.scheduler.running
            self.scheduler.back_off(plan)

    def land(self, failing: int | None = None) -> list[Sequence]:
        """Tell the scheduler the tokens of the oldest step in flight; returns the sequences that got one.

        With ``failing``, one of its rows has none: its logits were not numbers.
        """
        plan, tokens = self.in_flight.popleft()
        errors = {}
        if failing is not None and tokens:
            row = failing % len(tokens)
            tokens = [-1 if number == row else token for number, token in enumerate(tokens)]
            errors = {row: "no token"}
        advanced = self.scheduler.update(plan, StepResult(tokens, errors))
        self.scheduler.check_integrity()
        self.first_tokens += [
            seq.number for seq in advanced if seq.num_output_tokens == 1 and seq.finish_reason != "error"
        ]
        return advanced

    def step(self) -> StepPlan | None:
        """Launch a step, and land one unless the next can be launched before."""
        plan = self.launch()
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            self.land()
        return plan

    def run(self) -> int:
        """Step until nothing is left; returns the number of steps."""
        steps = 0
        while self.scheduler.has_unfinished or self.in_flight:
            waits_for_device = bool(self.in_flight)
            assert self.step() is not None or waits_for_device, "nothing runs, and nothing is in flight"
            steps += 1
            assert steps < 10_000, "it does not end"
        return steps

    def abort(self, *sequences: Sequence) -> None:
        """End sequences, as a user does between two steps."""
        if len(sequences) == 1:
            self.scheduler.finish(sequences[0], "abort")
        else:
            self.scheduler.finish_all(sequences, "abort")
        self.scheduler.check_integrity()

    def reset(self) -> None:
        """Drop everything, as the engine does after an exception. What is in the device's memory stays there."""
        self.scheduler.reset()
        self.scheduler.check_integrity()
        self.in_flight.clear()
        self.device.slots.clear()

    def check_finished(self) -> None:
        """Everything has ended, and everything was given back; outputs do not depend on the scheduling."""
        for seq in self.sequences:
            assert seq.finished
            expected = continuation(seq)
            if seq.finish_reason in ("abort", "error"):
                assert seq.output_token_ids == expected[: seq.num_output_tokens]
            else:
                assert seq.output_token_ids == expected
                assert seq.finish_reason == ("stop" if expected[-1] in seq.stop_token_ids else "length")
            assert seq.block_table == []
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert not self.scheduler.has_unfinished
        assert self.scheduler.num_in_flight == 0

    def _check(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        if not self.scheduler.policy.mixed and plan.num_prefill_tokens:
            assert plan.num_prefill_tokens == plan.num_tokens, "a prompt shares its step"
        # Apart from the tokens of those that enter, a plan holds a few numbers a row, however long the contexts are.
        assert len(plan.released) <= self.scheduler.max_num_seqs
        assert len(plan.appended_blocks) <= len(plan.slots)
        assert {entry.slot for entry in plan.entered} <= set(plan.slots)
        for entry in plan.entered:  # what gives the log-probability of a token is computed
            if entry.first_logprob is not None:
                assert plan.starts[plan.slots.index(entry.slot)] < entry.first_logprob


def interrupt_at_lines(start: Callable[[], Callable[[], object]], every: int = 1) -> Iterator[str]:
    """Interrupt something at the lines of the package that it reaches, the first time and half-way.

    Args:
        start: Makes everything anew and returns what to run.
        every: Leaves out all but every so many interrupts.

    Yields:
        The place, after each interrupted run.
    """
    reached: Counter[str] = Counter()
    run_traced(start(), lambda place: reached.update([place]))
    places = [(place, hit) for place, times in sorted(reached.items()) for hit in sorted({1, times // 2 + 1})]
    for place, hit in places[::every]:
        remaining = Counter({place: hit})

        def raise_there(at: str, remaining: Counter[str] = remaining) -> None:
            remaining[at] -= 1
            if remaining[at] == 0:
                raise KeyboardInterrupt(at)

        try:
            run_traced(start(), raise_there)
        except KeyboardInterrupt:
            yield place


def run_traced(action: Callable[[], object], at_line: Callable[[str], None]) -> None:
    """Run ``action``, and call ``at_line("file:line")`` before each line of the package."""
    package = nanovllm.__path__[0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line" and frame.f_lasti not in _exits(frame.f_code):
            at_line(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)


@functools.cache
def _exits(code: CodeType) -> frozenset[int]:
    """Where blocks of ``with`` are left: a line is reported, but no signal taken before ``__exit__`` is called."""
    if sys.version_info < (3, 11):
        return frozenset(i.offset + 2 for i in dis.get_instructions(code) if i.opname == "POP_BLOCK")
    loads = [(i.offset, i.opname.startswith("LOAD_CONST") and i.argval is None) for i in dis.get_instructions(code)]
    triples = zip(loads, loads[1:], loads[2:], strict=False)
    return frozenset(first for (first, a), (_, b), (_, c) in triples if a and b and c)  # the arguments of __exit__
