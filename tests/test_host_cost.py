"""What a step costs the host is little, and does not grow with the length of the contexts."""

import gc
import pickle
import statistics
import time
import tracemalloc
from collections.abc import Callable

import pytest
import xxhash

from nanovllm.engine import block_manager
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import StepPlan, StepResult
from nanovllm.sampling_params import SamplingParams
from tests.simulation import run_traced

SHORT, LONG = 1024, 32 * 1024
NUM_SEQS = 32
BLOCK_SIZE = 16
MAX_TOKENS = 1024


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, StepResult([7] * sum(plan.samples)))
    return plan


def add(scheduler: Scheduler, number: int, context: int, max_tokens: int = MAX_TOKENS) -> None:
    prompt = [number, *range(1, context)]
    scheduler.add(Sequence(str(number), number, prompt, SamplingParams(), max_output_tokens=max_tokens))


def decoding(context: int) -> Scheduler:
    """A scheduler whose residents have ``context`` tokens each and some decode steps behind them."""
    num_blocks = NUM_SEQS * (context + MAX_TOKENS) // BLOCK_SIZE
    scheduler = Scheduler(BlockManager(num_blocks, BLOCK_SIZE), NUM_SEQS + 1, NUM_SEQS * context)
    for number in range(NUM_SEQS):
        add(scheduler, number, context)
    for _ in range(BLOCK_SIZE):  # the prompts, then until the lists that grow have grown
        step(scheduler)
    assert len(scheduler.running) == NUM_SEQS
    return scheduler


@pytest.fixture(scope="module")
def schedulers() -> dict[int, Scheduler]:
    return {context: decoding(context) for context in (SHORT, LONG)}


def num_lines(action: Callable[[], object]) -> int:
    """Lines of the engine that an action executes."""
    lines: list[str] = []
    run_traced(action, lines.append)
    return len(lines)


def test_a_decode_step_executes_the_same_lines_whatever_the_context(schedulers: dict[int, Scheduler]) -> None:
    counts = {}
    for context, scheduler in schedulers.items():
        counts[context] = num_lines(lambda scheduler=scheduler: [step(scheduler) for _ in range(2 * BLOCK_SIZE)])
    assert counts[LONG] == counts[SHORT]


def test_a_decode_step_executes_few_lines_a_row(schedulers: dict[int, Scheduler]) -> None:
    num_steps = 2 * BLOCK_SIZE
    lines = num_lines(lambda: [step(schedulers[SHORT]) for _ in range(num_steps)])
    assert lines < 45 * NUM_SEQS * num_steps  # planning and learning together; each line more shows at 256 rows


def test_blocks_that_become_full_bring_no_garbage_collection_nearer(schedulers: dict[int, Scheduler]) -> None:
    scheduler = schedulers[SHORT]
    step(scheduler)
    gc.collect()
    before, used = len(gc.get_objects()), scheduler.block_manager.num_used_blocks
    for _ in range(4 * BLOCK_SIZE):
        step(scheduler)
    gc.collect()
    assert scheduler.block_manager.num_used_blocks >= used + 3 * NUM_SEQS
    assert len(gc.get_objects()) < before + NUM_SEQS


def test_a_decode_step_hashes_each_block_once_when_it_is_full(
    schedulers: dict[int, Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    digest = xxhash.xxh3_128_digest
    monkeypatch.setattr(block_manager.xxhash, "xxh3_128_digest", lambda data: hashed.append(len(data)) or digest(data))
    for scheduler in schedulers.values():
        hashed.clear()
        for _ in range(2 * BLOCK_SIZE):
            step(scheduler)
        assert len(hashed) == 2 * NUM_SEQS
        assert max(hashed) == 4 * BLOCK_SIZE + 16  # the block's tokens and its parent's hash


def test_a_decode_plan_has_the_same_size_whatever_the_context(schedulers: dict[int, Scheduler]) -> None:
    sizes = {
        context: max(len(pickle.dumps(step(scheduler))) for _ in range(2 * BLOCK_SIZE))
        for context, scheduler in schedulers.items()
    }
    assert sizes[LONG] <= sizes[SHORT] + 4 * NUM_SEQS  # larger block numbers take a few bytes more
    assert sizes[LONG] < 100 * NUM_SEQS


def test_a_decode_step_copies_nothing_as_long_as_a_context(schedulers: dict[int, Scheduler]) -> None:
    peaks = {}
    for context, scheduler in schedulers.items():
        tracemalloc.start()
        try:
            allocated = []
            for _ in range(2 * BLOCK_SIZE):
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                step(scheduler)
                allocated.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
        peaks[context] = statistics.median(allocated)
    assert peaks[LONG] < peaks[SHORT] + LONG  # a copy of one context would take four bytes a token


def test_a_decode_step_takes_the_same_time_whatever_the_context(schedulers: dict[int, Scheduler]) -> None:
    seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
    for _ in range(20 * BLOCK_SIZE):  # in turns, so that whatever else the machine does slows down both
        for context, scheduler in schedulers.items():
            started = time.perf_counter()
            step(scheduler)
            seconds[context].append(time.perf_counter() - started)
    assert statistics.median(seconds[LONG]) < 2 * statistics.median(seconds[SHORT])


def test_a_prompt_that_waits_for_memory_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = decoding(SHORT)
    alone = num_lines(lambda: [step(scheduler) for _ in range(2 * BLOCK_SIZE)])
    add(scheduler, NUM_SEQS, LONG, max_tokens=1)
    step(scheduler)
    hashed: list[bytes] = []
    digest = xxhash.xxh3_128_digest
    monkeypatch.setattr(block_manager.xxhash, "xxh3_128_digest", lambda data: hashed.append(data) or digest(data))
    beside = num_lines(lambda: [step(scheduler) for _ in range(2 * BLOCK_SIZE)])
    assert len(scheduler.waiting) == 1
    assert len(hashed) == 2 * NUM_SEQS  # of the residents
    assert beside <= alone + 2 * BLOCK_SIZE * 20  # a few lines a step, where its blocks number two thousand


def test_a_long_prompt_is_hashed_once_in_chunks_and_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    digest = xxhash.xxh3_128_digest
    monkeypatch.setattr(block_manager.xxhash, "xxh3_128_digest", lambda data: hashed.append(data) or digest(data))
    scheduler = Scheduler(BlockManager(LONG // BLOCK_SIZE + 1, BLOCK_SIZE), 1, 1000)
    for number in range(2):
        add(scheduler, 0, LONG, max_tokens=2)
        num_steps = 0
        while scheduler.has_unfinished:
            step(scheduler)
            num_steps += 1
        assert num_steps == ([34, 2][number])  # 33 chunks and a decode step; then all but the last block is cached
        assert len(hashed) == (number + 1) * LONG // BLOCK_SIZE


def test_admitting_many_prompts_at_once_costs_each_the_same() -> None:
    def lines_a_prompt(num_prompts: int) -> float:
        scheduler = Scheduler(BlockManager(8 * num_prompts, BLOCK_SIZE), num_prompts, 100 * num_prompts)
        for number in range(num_prompts):
            add(scheduler, number, 4 * BLOCK_SIZE, max_tokens=BLOCK_SIZE)
        lines = num_lines(lambda: step(scheduler)) / num_prompts
        assert len(scheduler.running) == num_prompts
        return lines

    assert lines_a_prompt(256) < 1.1 * lines_a_prompt(32)
