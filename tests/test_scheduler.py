"""The scheduler is fair, keeps its limits, and survives whatever happens to a request in between."""

from collections.abc import Callable

import pytest

from nanovllm.engine.admission import AdmissionPolicy
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.step_plan import StepPlan, StepResult
from nanovllm.sampling_params import SamplingParams
from tests.simulation import Simulation, continuation, interrupt_at_lines

Row = tuple[int, int, int, bool]


def rows(plan: StepPlan | None) -> list[Row]:
    """(slot, first position, tokens, samples) of each row."""
    assert plan is not None
    return list(zip(plan.slots, plan.starts, plan.lengths, plan.samples, strict=True))


def text(num_tokens: int, first: int = 0) -> list[int]:
    """Tokens without repetition."""
    return list(range(first, first + num_tokens))


def two_that_outgrow_the_pool(depth: int = 0) -> tuple[Simulation, Sequence, Sequence]:
    """Both are admitted, and later there is room for one only."""
    simulation = Simulation(num_blocks=24, block_size=2, depth=depth)
    return simulation, simulation.add([1], max_tokens=40), simulation.add([2], max_tokens=40)


def step_until(simulation: Simulation, condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        simulation.step()
    raise AssertionError("it never came to that")


def test_a_step_mixes_decode_tokens_and_prompt_chunks() -> None:
    simulation = Simulation(max_num_batched_tokens=8)
    simulation.add(text(3))
    simulation.step()
    simulation.add(text(12, first=20))
    plan = simulation.step()
    assert rows(plan) == [(0, 3, 1, True), (1, 0, 7, False)]
    assert plan is not None
    assert (plan.num_tokens, plan.num_prefill_tokens) == (8, 7)
    assert rows(simulation.step()) == [(0, 4, 1, True), (1, 7, 5, True)]
    simulation.run()
    simulation.check_finished()


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_a_prompt_of_any_length_is_cut_to_the_budget(budget: int) -> None:
    simulation = Simulation(max_num_batched_tokens=budget)
    simulation.add(text(30), max_tokens=1)
    lengths = []
    while simulation.scheduler.has_unfinished:
        lengths += [length for _, _, length, _ in rows(simulation.step())]
    assert sum(lengths) == 30
    assert all(length == budget for length in lengths[:-1])
    simulation.check_finished()


def test_the_budget_a_prompt_leaves_goes_to_the_next() -> None:
    simulation = Simulation(max_num_batched_tokens=10)
    for _ in range(3):
        simulation.add(text(4))
    assert rows(simulation.step()) == [(0, 0, 4, True), (1, 0, 4, True), (2, 0, 2, False)]


def test_the_oldest_get_the_budget_first() -> None:
    simulation = Simulation(max_num_batched_tokens=2)
    seqs = [simulation.add([number]) for number in range(3)]
    simulation.run()
    assert simulation.first_tokens == [0, 1, 2]
    assert [seq.num_output_tokens for seq in seqs] == [4, 4, 4]
    simulation.check_finished()


@pytest.mark.parametrize("cap", [1, 3])
def test_the_cap_holds_for_residents_and_not_only_for_a_step(cap: int) -> None:
    simulation = Simulation(max_num_seqs=cap, max_num_batched_tokens=5, num_blocks=64)
    for number in range(12):
        simulation.add([number] * 3, max_tokens=1 + number % 5)
    most = 0
    while simulation.scheduler.has_unfinished:
        simulation.step()
        most = max(most, len(simulation.scheduler.running))
    assert most == cap
    assert simulation.first_tokens == list(range(12))
    simulation.check_finished()


def test_a_sequence_may_fill_the_whole_cache() -> None:
    simulation = Simulation(num_blocks=2, block_size=4)
    longest = simulation.scheduler.max_tokens_per_sequence()
    assert longest == 9  # the last token's KV is never needed
    simulation.add(text(5), max_tokens=longest - 5)
    simulation.add(text(8, first=20), max_tokens=1)
    simulation.run()
    simulation.check_finished()
    assert simulation.manager.peak_num_used_blocks == 2


def test_an_idle_scheduler_plans_nothing() -> None:
    simulation = Simulation()
    assert simulation.launch() is None
    simulation.add(text(3), max_tokens=1)
    simulation.run()
    assert simulation.launch() is None


def test_a_slot_is_released_before_another_sequence_enters_it() -> None:
    simulation = Simulation(max_num_seqs=1)
    simulation.add(text(3), max_tokens=1)
    simulation.add(text(4), max_tokens=1)
    first, second = simulation.step(), simulation.step()
    assert first is not None
    assert second is not None
    assert (first.released, [entry.slot for entry in first.entered]) == ([], [0])
    assert (second.released, [entry.slot for entry in second.entered]) == ([0], [0])


# Prefixes


def test_prompts_that_share_a_prefix_in_one_step_do_not_read_what_the_step_computes() -> None:
    simulation = Simulation()
    for last in (50, 51):
        simulation.add([*text(8), last])
    assert [start for _, start, _, _ in rows(simulation.step())] == [0, 0]
    simulation.add([*text(8), 52])
    assert rows(simulation.step())[-1] == (2, 8, 1, True)
    simulation.run()
    simulation.check_finished()
    assert [seq.num_cached_tokens for seq in simulation.sequences] == [0, 0, 8]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_cached_prompt_of_full_blocks_still_computes_its_last_token(size: int) -> None:
    simulation = Simulation(num_blocks=40, block_size=size)
    for _ in range(2):
        simulation.add(text(16))
        simulation.run()
    assert simulation.sequences[1].num_cached_tokens == 16 - size
    simulation.check_finished()


def test_a_chunked_prompt_shares_its_chunks_as_they_are_computed() -> None:
    simulation = Simulation(num_blocks=30, max_num_batched_tokens=4)
    simulation.add(text(12))
    simulation.step()
    simulation.step()
    assert len(simulation.manager.match_prefix(Sequence("", 9, text(12), SamplingParams(), max_output_tokens=1))) == 4
    simulation.run()
    simulation.check_finished()


# Memory


def test_the_youngest_is_preempted_and_its_tokens_stay_the_same() -> None:
    simulation, old, young = two_that_outgrow_the_pool()
    step_until(simulation, lambda: simulation.scheduler.num_preemptions > 0)
    assert old.status is SequenceStatus.RUNNING
    assert young.status is SequenceStatus.WAITING
    known = list(young.token_ids)
    assert len(known) > 20
    simulation.run()
    assert list(young.token_ids)[: len(known)] == known
    assert old.metrics.num_preemptions == 0
    assert young.metrics.num_preemptions == simulation.scheduler.num_preemptions
    simulation.check_finished()


def test_a_preempted_sequence_resumes_with_all_its_tokens_and_reuses_its_prefix() -> None:
    simulation, old, young = two_that_outgrow_the_pool()
    step_until(simulation, lambda: simulation.scheduler.num_preemptions > 0)
    known = list(young.token_ids)
    simulation.abort(old)
    plan = simulation.step()
    assert plan is not None
    assert list(plan.entered[0].token_ids) == known
    [(_, start, length, samples)] = rows(plan)
    assert samples
    assert start + length == len(known)
    assert start > 0  # only the end of what it had was evicted
    simulation.run()
    simulation.check_finished()
    assert young.num_cached_tokens == 0  # of its prompt, when it came


def test_a_preempted_sequence_runs_before_those_that_wait() -> None:
    simulation, _, young = two_that_outgrow_the_pool()
    later = simulation.add(text(30, first=50), max_tokens=2)  # does not fit beside the two
    step_until(simulation, lambda: simulation.scheduler.num_preemptions > 0)
    assert list(simulation.scheduler.waiting) == [young, later]
    simulation.run()
    simulation.check_finished()


def test_nobody_is_admitted_into_blocks_that_the_residents_will_need_soon() -> None:
    simulation = Simulation(num_blocks=12, block_size=2)
    simulation.add(text(4), max_tokens=20)
    late = simulation.add(text(8, first=20), max_tokens=2)
    simulation.step()
    assert late.status is SequenceStatus.WAITING  # 10 blocks are free, 4 would do, but the first one grows by 8
    simulation.run()
    assert simulation.scheduler.num_preemptions == 0
    simulation.check_finished()


def test_residents_about_to_end_reserve_no_more_than_they_can_use() -> None:
    simulation = Simulation(num_blocks=8, block_size=2)
    simulation.add(text(4), max_tokens=3)
    late = simulation.add(text(8, first=20), max_tokens=2)
    simulation.step()
    assert late.status is SequenceStatus.RUNNING
    simulation.run()
    assert simulation.scheduler.num_preemptions == 0


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> tuple[Simulation, list[Sequence]]:
    """A resident with 30 tokens to go, and a head of the queue that does not fit beside it; and what was matched."""
    simulation = Simulation(num_blocks=20, block_size=2)
    matched: list[Sequence] = []
    match_prefix = simulation.manager.match_prefix
    monkeypatch.setattr(simulation.manager, "match_prefix", lambda seq: matched.append(seq) or match_prefix(seq))
    simulation.add([0], max_tokens=30)
    simulation.add(text(30, first=50), max_tokens=2)
    return simulation, matched


def test_a_head_that_does_not_fit_is_matched_once_and_nobody_overtakes_it(
    crowded: tuple[Simulation, list[Sequence]],
) -> None:
    simulation, matched = crowded
    resident, head = simulation.sequences
    small = simulation.add([1], max_tokens=1)
    step_until(simulation, lambda: resident.num_output_tokens == 29)
    assert matched == [resident, head]
    assert head.status is small.status is SequenceStatus.WAITING
    simulation.run()
    assert simulation.first_tokens == [0, 1, 2]
    simulation.check_finished()


def test_aborting_a_head_that_does_not_fit_lets_the_next_one_in(crowded: tuple[Simulation, list[Sequence]]) -> None:
    simulation, _ = crowded
    small = simulation.add([1], max_tokens=1)
    simulation.step()
    simulation.abort(simulation.sequences[1])
    simulation.step()
    assert small.finished


@pytest.mark.parametrize("budget", [7, 64])
def test_a_waiting_prompt_is_admitted_once_so_much_of_its_prefix_is_computed_that_the_rest_fits(budget: int) -> None:
    simulation = Simulation(num_blocks=20, block_size=2, max_num_batched_tokens=budget)
    first = simulation.add([*text(24), 90], max_tokens=6)
    second = simulation.add([*text(24), 91], max_tokens=6)
    step_until(simulation, lambda: bool(second.num_output_tokens))
    assert second.num_cached_tokens >= 20
    assert not first.finished
    simulation.run()
    simulation.check_finished()


# Ending


def test_a_sequence_ends_with_its_last_token_or_an_end_token_whichever_comes_first() -> None:
    def end(max_tokens: int, eos: tuple[int, ...]) -> tuple[str | None, int | str | None, int]:
        simulation = Simulation(num_blocks=64)
        seq = simulation.add([1], max_tokens, eos=eos)
        simulation.run()
        simulation.check_finished()
        return seq.finish_reason, seq.stop_reason, seq.num_output_tokens

    simulation = Simulation(num_blocks=64)
    tokens = continuation(simulation.add([1], max_tokens=20))
    third = tokens[2]
    assert third not in tokens[:2]
    assert end(20, ()) == ("length", None, 20)
    assert end(2, (third,)) == ("length", None, 2)
    assert end(3, (third,)) == ("stop", None, 3)
    assert end(20, (third,)) == ("stop", None, 3)
    assert end(20, (1000, third)) == ("stop", third, 3)  # which one it was, unless it is the main one


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_request_can_be_aborted_at_any_time(depth: int, num_steps: int, victim: int) -> None:
    simulation = Simulation(max_num_seqs=2, max_num_batched_tokens=4, depth=depth)
    seqs = [simulation.add(text(5, first=10 * number)) for number in range(3)]
    for _ in range(num_steps):
        simulation.step()
    simulation.abort(seqs[victim])  # it may have ended already
    simulation.run()
    simulation.check_finished()
    assert all(seq.finish_reason == "length" for seq in seqs if seq is not seqs[victim])


def test_ending_a_sequence_twice_does_nothing() -> None:
    simulation = Simulation()
    ended, waiting = simulation.add(text(3), max_tokens=1), simulation.add(text(4), max_tokens=1)
    simulation.abort(waiting)
    simulation.run()
    for seq in (ended, waiting):
        simulation.abort(seq)
    assert (ended.finish_reason, waiting.finish_reason) == ("length", "abort")
    simulation.check_finished()


def test_an_abort_in_the_step_in_which_a_request_finishes_frees_its_blocks_once() -> None:
    simulation = Simulation()
    seq = simulation.add(text(3), max_tokens=1)
    simulation.launch()
    simulation.abort(seq)  # its only token is already on its way
    assert simulation.land() == []
    assert seq.output_token_ids == []
    simulation.check_finished()


# Steps in flight


def test_the_next_step_is_planned_before_the_tokens_of_the_last_are_known() -> None:
    simulation = Simulation(depth=1)
    seq = simulation.add(text(3), max_tokens=3)
    assert rows(simulation.launch()) == [(0, 0, 3, True)]
    assert rows(simulation.launch()) == [(0, 3, 1, True)]
    assert seq.num_output_tokens == 0
    simulation.land()
    assert rows(simulation.launch()) == [(0, 4, 1, True)]
    assert simulation.launch() is None  # its third and last token is on its way
    simulation.run()
    simulation.check_finished()


def test_a_token_sampled_after_the_end_is_dropped() -> None:
    simulation = Simulation(depth=1)
    tokens = continuation(simulation.add([1], max_tokens=8))
    seq = simulation.add([1], max_tokens=8, eos=(tokens[1],))
    for _ in range(3):
        simulation.step()
    assert (seq.finish_reason, seq.num_output_tokens) == ("stop", 2)
    assert simulation.scheduler.num_in_flight == 1  # which samples a third token for it
    simulation.run()
    assert seq.output_token_ids == tokens[:2]
    simulation.check_finished()


def test_blocks_that_a_step_in_flight_still_writes_can_be_given_to_others() -> None:
    simulation = Simulation(num_blocks=2, block_size=2, depth=1)
    tokens = continuation(simulation.add([1], max_tokens=4))
    simulation.reset()
    simulation.sequences.clear()
    simulation.add([1], max_tokens=4, eos=(tokens[0],))
    heir = simulation.add([2, 3], max_tokens=3)
    simulation.run()
    assert len(heir.output_token_ids) == 3
    simulation.check_finished()


def test_a_sequence_preempted_with_a_token_in_flight_waits_for_it_and_loses_nothing() -> None:
    simulation, old, young = two_that_outgrow_the_pool(depth=1)
    simulation.launch()
    while simulation.launch() and not simulation.scheduler.num_preemptions:
        simulation.land()
    known = list(young.token_ids)
    assert (young.status, young.num_in_flight) == (SequenceStatus.WAITING, 1)
    simulation.abort(old)
    assert simulation.launch() is None  # there is room now, but only the device knows its last token
    assert young in simulation.land()
    plan = simulation.launch()
    assert plan is not None
    assert list(plan.entered[0].token_ids) == [*known, young.token_ids[-1]]
    simulation.run()
    simulation.check_finished()


def test_a_chunk_in_flight_of_a_sequence_preempted_and_resumed_meanwhile_publishes_nothing() -> None:
    simulation = Simulation(num_blocks=42, block_size=2, max_num_batched_tokens=4, depth=2)
    old, young = simulation.add([1], max_tokens=60), simulation.add(text(64, first=50), max_tokens=2)
    while not simulation.scheduler.num_preemptions:
        simulation.step()
    assert len(simulation.in_flight) == 2  # both with chunks of the younger one's prompt
    simulation.manager.reset_prefix_cache()
    simulation.abort(old)
    simulation.launch()
    assert young.num_computed_tokens == 4
    simulation.land()
    simulation.land()
    twin = simulation.add(text(64, first=50), max_tokens=2)
    assert simulation.manager.match_prefix(twin) == []  # the new residency's first step has not landed
    simulation.run()
    simulation.check_finished()


def test_steps_are_finished_in_the_order_in_which_they_were_planned() -> None:
    simulation = Simulation(depth=1)
    simulation.add(text(3))
    simulation.launch()
    second = simulation.launch()
    assert second is not None
    with pytest.raises(RuntimeError, match="in the order"):
        simulation.scheduler.update(second, StepResult([0]))


# Interrupts


@pytest.mark.parametrize("depth", [0, 1])
def test_an_interrupt_at_any_line_leaves_a_scheduler_that_resets_to_working_order(depth: int) -> None:
    simulations: list[Simulation] = []

    def serve(simulation: Simulation) -> None:
        """A preemption, prefix hits, chunks, end tokens and an abort."""
        simulation.sequences.clear()
        for number in range(4):
            simulation.add([*text(3), number], max_tokens=14, eos=(number,))
        simulation.step()
        simulation.abort(simulation.sequences[1])
        simulation.run()

    def start() -> Callable[[], None]:
        simulations.append(
            Simulation(num_blocks=10, block_size=2, max_num_seqs=3, max_num_batched_tokens=7, depth=depth)
        )
        return lambda: serve(simulations[-1])

    num_interrupts = 0
    for _ in interrupt_at_lines(start):
        simulation = simulations.pop()
        simulation.reset()
        serve(simulation)
        simulation.check_finished()
        num_interrupts += 1
    assert num_interrupts > 150


class TestAdmission:
    """When waiting sequences join those that run."""

    def joined(self, policy: AdmissionPolicy, waiting: int, lengths: list[int]) -> list[list[int]]:
        """By step, the sequences that join; residents of these output lengths fill all slots at first."""
        simulation = Simulation(num_blocks=500, max_num_seqs=len(lengths), max_num_batched_tokens=500, policy=policy)
        for length in lengths:
            simulation.add([1, 2, 3], length)
        for _ in range(waiting):
            simulation.add([1, 2, 3], 50)
        steps: list[list[int]] = []
        while simulation.scheduler.has_unfinished:
            known = {seq.number for seq in simulation.scheduler.running}
            assert simulation.step() is not None
            steps.append([seq.number for seq in simulation.scheduler.running if seq.number not in known])
        simulation.check_finished()
        return steps

    def test_by_default_a_vacant_slot_is_filled_at_once(self) -> None:
        steps = self.joined(AdmissionPolicy(), waiting=4, lengths=[2, 3, 4, 5, 60, 60, 60, 60])
        assert [len(step) for step in steps[1:6]] == [0, 1, 1, 1, 1]

    def test_slots_are_gathered_and_filled_together(self) -> None:
        steps = self.joined(AdmissionPolicy(vacancies=4), waiting=4, lengths=[2, 3, 4, 5, 60, 60, 60, 60])
        assert [len(step) for step in steps[1:6]] == [0, 0, 0, 0, 4]

    def test_no_more_than_wait_are_gathered(self) -> None:
        steps = self.joined(AdmissionPolicy(vacancies=4), waiting=2, lengths=[2, 3, 4, 5, 60, 60, 60, 60])
        assert [len(step) for step in steps[1:6]] == [0, 0, 2, 0, 0]

    def test_nobody_waits_longer_than_the_patience_for_others_to_end(self) -> None:
        steps = self.joined(AdmissionPolicy(vacancies=4, patience=6), waiting=4, lengths=[2, 60, 60, 60, 60, 60])
        assert [number for number, step in enumerate(steps) if step][1] == 8  # vacant from step 2 on

    def test_where_blocks_run_out_before_slots_several_end_before_others_join(self) -> None:
        def steps_with_prompts(policy: AdmissionPolicy) -> int:
            simulation = Simulation(num_blocks=120, max_num_seqs=40, max_num_batched_tokens=500, policy=policy)
            for number in range(60):
                simulation.add([1, 2, 3, number % 20], 5 + number * 7 % 20)
            count = 0
            while simulation.scheduler.has_unfinished:
                plan = simulation.step()
                count += plan is not None and not plan.is_decode
            simulation.check_finished()
            assert simulation.scheduler.num_preemptions < 10
            return count

        assert steps_with_prompts(AdmissionPolicy(vacancies=4)) < 0.7 * steps_with_prompts(AdmissionPolicy())

    def test_prompts_go_first_and_alone_where_steps_are_not_mixed(self) -> None:
        simulation = Simulation(num_blocks=500, max_num_batched_tokens=16, policy=AdmissionPolicy(mixed=False))
        first = simulation.add([1, 2], 20)
        simulation.step()
        simulation.step()
        simulation.add(list(range(20)), 5)
        plans = [simulation.step() for _ in range(3)]
        assert [plan.lengths for plan in plans if plan] == [[16], [4], [1, 1]]
        assert first.num_output_tokens == 3
        simulation.run()
        simulation.check_finished()


def test_a_step_that_was_too_large_is_planned_again_smaller() -> None:
    simulation = Simulation(num_blocks=2000, max_num_seqs=8, max_num_batched_tokens=1024)
    for _ in range(8):
        simulation.add(list(range(20)) * 10, 4)
    simulation.refuse()
    scheduler = simulation.scheduler
    assert (scheduler.max_num_batched_tokens, scheduler.max_num_running) == (512, 3)  # 1024 tokens of 6 were too many
    assert len(scheduler.waiting) == 8
    plan = simulation.step()
    assert plan is not None
    assert plan.num_tokens <= 512
    assert len(scheduler.running) <= 3
    smaller = True
    for _ in range(10):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.take_back(plan)
        smaller = scheduler.back_off(plan)
    assert not smaller, "one row of few tokens cannot be made smaller"
    assert scheduler.max_num_running == 1
    simulation.run()
    simulation.check_finished()


def test_only_the_newest_plan_can_be_taken_back_and_only_surplus_be_forgotten() -> None:
    simulation = Simulation(depth=1)
    simulation.add([1, 2, 3], 5)
    first = simulation.launch()
    simulation.launch()
    assert first is not None
    with pytest.raises(RuntimeError, match="newest"):
        simulation.scheduler.take_back(first)
    with pytest.raises(RuntimeError, match="has not ended"):
        simulation.scheduler.forget_surplus()
