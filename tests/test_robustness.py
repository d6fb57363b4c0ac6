"""Whatever a caller does, the engine says what is wrong, loses nothing and stays usable."""

import copy
import functools
import gc
import io
import itertools
import json
import pickle
import random
import re
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.utils._pytree import tree_leaves

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine import llm_engine, turns
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.request import LostRequest
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.tokenizer import check_start, encode_words, load_tokenizer
from nanovllm.utils import progress
from tests.checkpoints import make_model, reference_greedy
from tests.ids import stable
from tests.simulation import interrupt_at_lines
from tests.threads import one_thread  # noqa: F401

Reference = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="module")
def reference(tiny_reference: Any) -> Reference:
    """transformers' greedy continuation of a prompt."""

    @functools.cache
    def greedy_of(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        return reference_greedy(tiny_reference, list(prompt), num_tokens)

    return lambda prompt, num_tokens: greedy_of(tuple(prompt), num_tokens)


@pytest.fixture(scope="module")
def shared_llm(tiny_checkpoint: Path) -> LLM:
    """For tests that leave the engine as it was."""
    return make_llm(tiny_checkpoint)


def make_llm(checkpoint: Path, **changes: Any) -> LLM:
    arguments = {"skip_tokenizer_init": True, "device": "cpu", "kvcache_block_size": 4, "num_kvcache_blocks": 256}
    return LLM(checkpoint, **{**arguments, **changes})


def greedy(max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(211), k=length)


def generate(llm: LLM, prompts: list[list[int]], params: Any = None) -> list[list[int]]:
    """The tokens generated for each prompt."""
    return [output["token_ids"] for output in llm.generate(prompts, params or greedy(), use_tqdm=False)]


def assert_empty(llm: LLM) -> None:
    """Nothing is left in the engine."""
    llm.engine.scheduler.check_integrity()
    assert not llm.engine.has_unfinished_requests
    assert not llm.engine.scheduler.has_unfinished
    assert not llm.engine.turns.waiting
    assert llm.get_metrics()["kvcache_blocks_used"] == 0


# Requests that cannot be served


def test_a_request_that_outgrows_the_cache_is_refused_with_the_numbers(tiny_checkpoint: Path) -> None:
    llm = make_llm(
        tiny_checkpoint,
        kvcache_block_size=256,
        num_kvcache_blocks=2,
        hf_overrides={"max_position_embeddings": 1024},
    )
    with pytest.raises(ValueError, match=r"500 tokens and may generate 64.* 3 KV blocks of 256 tokens.* has 2 "):
        generate(llm, [make_prompt(500)], greedy(64))
    assert len(generate(llm, [make_prompt(500)], greedy(13))[0]) == 13  # 512 tokens and one whose KV is not needed


def test_one_impossible_request_is_named_before_any_of_its_batch_starts(
    tiny_checkpoint: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(tiny_checkpoint, num_kvcache_blocks=8)
    good = [make_prompt(5, seed) for seed in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", lambda: pytest.fail("work was started"))
        with pytest.raises(ValueError, match="prompt 3 has 40 tokens"):
            generate(llm, [*good, make_prompt(40)])
    assert_empty(llm)
    assert generate(llm, good) == [reference(prompt, 8) for prompt in good]


def test_refusing_a_request_loses_no_result_of_those_queued_before_it(
    tiny_checkpoint: Path, reference: Reference
) -> None:
    engine = make_llm(tiny_checkpoint, num_kvcache_blocks=8).engine
    good = {engine.add_request(make_prompt(5, seed), greedy()): make_prompt(5, seed) for seed in range(3)}
    with pytest.raises(ValueError, match="40 tokens"):
        engine.add_request(make_prompt(40), greedy())
    finished = finish(engine)
    assert {output.request_id: output["token_ids"] for output in finished} == {
        request_id: reference(prompt, 8) for request_id, prompt in good.items()
    }


def finish(engine: LLMEngine) -> list[RequestOutput]:
    """Step until nothing is left."""
    finished: list[RequestOutput] = []
    while engine.has_unfinished_requests:
        finished += engine.step()
    return finished


def test_no_prompts_give_no_outputs(shared_llm: LLM) -> None:
    assert shared_llm.generate([], greedy()) == []
    assert shared_llm.generate([], []) == []


def test_an_empty_prompt_is_refused_by_name(shared_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(shared_llm, [[1, 2], []])
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(shared_llm, [[]])
    monkeypatch.setattr(shared_llm.engine.intake, "tokenizer", lambda texts, **_: {"input_ids": [[] for _ in texts]})
    with pytest.raises(ValueError, match="the prompt is empty"):
        shared_llm.generate("", greedy(), use_tqdm=False)
    assert_empty(shared_llm)


@pytest.mark.parametrize(("max_tokens", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError)])
def test_max_tokens_must_be_a_positive_whole_number(max_tokens: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"max_tokens is {max_tokens}.* whole number of at least 1"):
        SamplingParams(max_tokens=max_tokens)


def test_a_prompt_that_fills_the_context_is_refused(tiny_checkpoint: Path) -> None:
    llm = make_llm(tiny_checkpoint, max_model_len=32)
    for length in (32, 33):
        with pytest.raises(ValueError, match=f"the prompt has {length} tokens; max_model_len is 32"):
            generate(llm, [make_prompt(length)])


def test_a_completion_ends_where_the_context_ends(tiny_checkpoint: Path, reference: Reference) -> None:
    llm = make_llm(tiny_checkpoint, max_model_len=32)
    for length, expected in [(31, 1), (20, 12)]:
        [output] = llm.generate(make_prompt(length), greedy(64), use_tqdm=False)
        assert output["token_ids"] == reference(make_prompt(length), expected)
        assert output.outputs[0].finish_reason == "length"


def test_a_prompt_without_max_tokens_takes_what_the_cache_holds(tiny_checkpoint: Path) -> None:
    llm = make_llm(tiny_checkpoint, num_kvcache_blocks=5)
    assert len(generate(llm, [make_prompt(11)], SamplingParams(max_tokens=None, ignore_eos=True))[0]) == 10


def test_there_must_be_one_sampling_params_for_each_prompt(shared_llm: LLM) -> None:
    with pytest.raises(ValueError, match="3 prompts and 2 sampling_params"):
        generate(shared_llm, [[1], [2], [3]], [greedy(), greedy()])
    assert [len(ids) for ids in generate(shared_llm, [[1], [2]], [greedy(2), greedy(3)])] == [2, 3]


def test_a_misspelt_keyword_is_answered_with_the_right_one(tiny_checkpoint: Path) -> None:
    with pytest.raises(TypeError, match=r"'max_num_seq'.* did you mean 'max_num_seqs'"):
        make_llm(tiny_checkpoint, max_num_seq=4)
    with pytest.raises(TypeError, match="max_token"):
        SamplingParams(max_token=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'max_model_len'; it goes into LLM\(max_model_len=\.\.\.\)"):
        SamplingParams(max_model_len=4)  # type: ignore[call-arg]


def test_max_tokens_beyond_the_context_is_warned_of_once(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make_llm(tiny_checkpoint, max_model_len=12) as llm:
        generate(llm, [[1, 2, 3]], greedy(9))
        assert not caplog.records
        outputs = generate(llm, [[1, 2, 3], [1, 2]], greedy(10))
        assert [len(ids) for ids in outputs] == [9, 10]
        generate(llm, [[1, 2, 3]], greedy(1000))
    [record] = caplog.records
    message = record.getMessage()
    assert message.startswith("max_tokens is 10, but prompt 0 has 3 tokens and max_model_len is 12")
    assert "at most 9 are generated (raise max_model_len, or pass max_tokens=None" in message


# Scheduling, through the whole engine


@pytest.mark.parametrize("cap", [12, 100, 200, 300])
def test_any_number_of_residents_will_do(tiny_checkpoint: Path, reference: Reference, cap: int) -> None:
    llm = make_llm(tiny_checkpoint, max_num_seqs=cap, num_kvcache_blocks=2 * cap)
    prompts = [make_prompt(1 + number % 4, number) for number in range(cap + 3)]
    outputs = generate(llm, prompts, greedy(3))
    assert [len(ids) for ids in outputs] == [3] * len(prompts)
    for number in (0, cap - 1, cap, cap + 2):
        assert outputs[number] == reference(prompts[number], 3)


def test_no_more_than_max_num_seqs_are_ever_resident(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(tiny_checkpoint, max_num_seqs=4)
    residents = []
    schedule = Scheduler.schedule

    def spy(scheduler: Scheduler) -> Any:
        plan = schedule(scheduler)
        residents.append(len(scheduler.running))
        return plan

    monkeypatch.setattr(Scheduler, "schedule", spy)
    outputs = llm.generate(
        [make_prompt(5, seed) for seed in range(64)],
        [greedy(1 + number % 6) for number in range(64)],
        use_tqdm=False,
    )
    assert max(residents) == 4
    first_tokens = [output.metrics.first_token_time for output in outputs if output.metrics]
    assert first_tokens == sorted(first_tokens)  # the last ones waited their turn, and no longer


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_sequence_grows_across_many_blocks(tiny_checkpoint: Path, reference: Reference, block_size: int) -> None:
    llm = make_llm(tiny_checkpoint, kvcache_block_size=block_size, num_kvcache_blocks=96)
    assert generate(llm, [make_prompt(2)], greedy(90)) == [reference(make_prompt(2), 90)]


def test_duplicates_and_shared_prefixes_in_one_batch(tiny_checkpoint: Path, reference: Reference) -> None:
    llm = make_llm(tiny_checkpoint)
    start = make_prompt(16)
    prompts = [start, start, [*start, 1], [*start, 1], start[:8], [*start[:8], 7], [*start, *start]]
    expected = [reference(prompt, 8) for prompt in prompts]
    assert generate(llm, prompts) == expected
    assert generate(llm, prompts) == expected  # now all of them are cached
    assert llm.get_metrics()["cached_tokens"] > 0


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_fully_cached_prompt_of_full_blocks(tiny_checkpoint: Path, reference: Reference, block_size: int) -> None:
    llm = make_llm(tiny_checkpoint, kvcache_block_size=block_size, num_kvcache_blocks=64)
    prompt = make_prompt(32)
    for cached in (0, 32 - block_size):
        [output] = llm.generate(prompt, greedy(), use_tqdm=False)
        assert output.num_cached_tokens == cached
        assert output["token_ids"] == reference(prompt, 8)


def test_a_preempted_sequence_resumes_on_a_prefix_hit(
    tiny_checkpoint: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(tiny_checkpoint, num_kvcache_blocks=24)
    taken: list[tuple[str, int]] = []
    take_prefix = BlockManager.take_prefix

    def spy(manager: BlockManager, seq: Any, matched: list[int]) -> None:
        taken.append((seq.request_id, len(matched)))
        take_prefix(manager, seq, matched)

    monkeypatch.setattr(BlockManager, "take_prefix", spy)
    prompts = [make_prompt(8, seed) for seed in range(2)]
    outputs = llm.generate(prompts, greedy(60), use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [reference(prompt, 60) for prompt in prompts]
    assert llm.get_metrics()["num_preemptions"] > 0
    assert any(request_id == "1" and num_blocks > 2 for request_id, num_blocks in taken)
    assert outputs[1].num_cached_tokens == 0  # of its prompt, when it came


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_a_prompt_longer_than_a_step(tiny_checkpoint: Path, reference: Reference, budget: int) -> None:
    llm = make_llm(tiny_checkpoint, max_num_batched_tokens=budget)
    prompts = [make_prompt(30), make_prompt(65, seed=1)]
    assert generate(llm, prompts, greedy(4)) == [reference(prompt, 4) for prompt in prompts]


def test_reused_blocks_are_not_mistaken_for_what_they_held(tiny_checkpoint: Path, reference: Reference) -> None:
    llm = make_llm(tiny_checkpoint, num_kvcache_blocks=3)
    prompts = [make_prompt(8, seed) for seed in range(3)]
    for prompt in [*prompts, *prompts]:
        assert generate(llm, [prompt], greedy(4)) == [reference(prompt, 4)]


def test_an_abort_at_any_time_leaves_the_others_alone(tiny_checkpoint: Path, reference: Reference) -> None:
    llm = make_llm(tiny_checkpoint, max_num_seqs=2)
    prompts = [make_prompt(5, seed) for seed in range(3)]
    for num_steps in range(7):
        for victim in range(3):
            ids = [llm.engine.add_request(prompt, greedy(3)) for prompt in prompts]
            finished = [output for _ in range(num_steps) for output in llm.engine.step()]
            aborted = llm.engine.abort(ids[victim])
            assert llm.engine.abort(ids[victim]) is None
            finished += finish(llm.engine)
            if aborted is not None:
                assert aborted.outputs[0].finish_reason == "abort"
                finished.append(aborted)
            assert sorted(output.request_id for output in finished) == sorted(ids)
            for output in finished:
                expected = reference(prompts[ids.index(output.request_id)], 3)
                assert output["token_ids"] == expected[: len(output["token_ids"])]
                assert output is aborted or len(output["token_ids"]) == 3
            assert_empty(llm)


# The same request gives the same tokens


def test_a_seeded_request_gives_the_same_tokens_however_it_is_scheduled(tiny_checkpoint: Path) -> None:
    prompt, params = make_prompt(13), SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)
    [alone] = generate(make_llm(tiny_checkpoint), [prompt], params)
    other = SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True)

    def in_a_batch(llm: LLM, place: int, num_requests: int) -> RequestOutput:
        prompts = [make_prompt(1 + seed % 17, seed + 100) for seed in range(num_requests)]
        chosen = [other] * num_requests
        prompts[place], chosen[place] = prompt, params
        return llm.generate(prompts, chosen, use_tqdm=False)[place]

    llm = make_llm(tiny_checkpoint, num_kvcache_blocks=2048)
    for place in (0, 31, 63):
        assert in_a_batch(llm, place, 64)["token_ids"] == alone
    [hit] = llm.generate([prompt], params, use_tqdm=False)
    assert hit.num_cached_tokens == 12
    assert hit["token_ids"] == alone
    assert generate(make_llm(tiny_checkpoint, max_num_batched_tokens=5), [prompt], params) == [alone]
    crowded = in_a_batch(make_llm(tiny_checkpoint, num_kvcache_blocks=13), 1, 2)
    assert crowded.metrics is not None
    assert crowded.metrics.num_preemptions > 0
    assert crowded["token_ids"] == alone


def test_unseeded_requests_repeat_with_the_engine_and_differ_among_themselves(tiny_checkpoint: Path) -> None:
    def sample(seed: int) -> list[list[int]]:
        params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
        return generate(make_llm(tiny_checkpoint, seed=seed), [make_prompt(5)] * 3, params)

    first = sample(0)
    assert first == sample(0)
    assert first != sample(1)
    assert len({tuple(ids) for ids in first}) == 3


# Ends of sequences


def test_every_eos_id_of_the_generation_config_ends_a_sequence(
    tiny_checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    prompts = [make_prompt(6, seed) for seed in range(2)]
    full = [reference(prompt, 12) for prompt in prompts]
    ends = [full[0][4], full[1][6]]
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "two ends"))
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    llm = make_llm(checkpoint)
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
    for output, tokens in zip(outputs, full, strict=True):
        length = min(tokens.index(end) for end in ends if end in tokens) + 1
        assert output["token_ids"] == tokens[:length]
        completion = output.outputs[0]
        assert completion.finish_reason == "stop"
        assert completion.stop_reason == (None if tokens[length - 1] == ends[0] else tokens[length - 1])
    assert {output["token_ids"][-1] for output in outputs} == set(ends)
    assert generate(llm, prompts, greedy(12)) == full  # ignore_eos


# Failures in the middle


class FailingCall:
    """Lets a method raise at its n-th call, before or after it has done its work."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.num_calls = 0
        self.fail_at: int | None = None
        self.error: type[BaseException] = RuntimeError
        self.after = False
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            failing = self.num_calls == self.fail_at
            if failing and not self.after:
                raise self.error
            result = method(*args, **kwargs)
            if failing:
                raise self.error
            return result

        patch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (LLMEngine, "add_prepared"),
        (Scheduler, "schedule"),
        (Scheduler, "update"),
        (Scheduler, "finish"),
        (BlockManager, "match_prefix"),
        (BlockManager, "take_prefix"),
        (BlockManager, "allocate"),
        (BlockManager, "publish"),
        (BlockManager, "free"),
        (ModelRunner, "execute"),
    ],
)
def test_after_a_failure_or_an_interrupt_the_next_call_is_right(
    tiny_checkpoint: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    llm = make_llm(tiny_checkpoint, num_kvcache_blocks=9, max_num_seqs=3, max_num_batched_tokens=16)
    prompts = [[*make_prompt(8), number] for number in range(4)]
    expected = [reference(prompt, 6) for prompt in prompts]
    call = FailingCall(monkeypatch, owner, name)
    assert generate(llm, prompts, greedy(6)) == expected
    num_calls = call.num_calls
    assert num_calls > 3
    for number, fail_at in enumerate(range(1, num_calls, -(-num_calls // 6))):
        call.error = (RuntimeError, KeyboardInterrupt)[number % 2]
        for call.after in (False, True):
            call.num_calls, call.fail_at = 0, fail_at
            with pytest.raises(call.error):
                generate(llm, [*prompts, make_prompt(5, seed=9)], greedy(6))
            call.fail_at = None
            assert_empty(llm)
            assert generate(llm, prompts, greedy(6)) == expected


def test_after_an_interrupt_at_any_line_the_next_call_is_right(tiny_checkpoint: Path, reference: Reference) -> None:
    llm = make_llm(tiny_checkpoint, num_kvcache_blocks=6, max_num_seqs=2, max_num_batched_tokens=8)
    prompts = [[*make_prompt(8), number] for number in range(3)]
    expected = [reference(prompt, 6) for prompt in prompts]
    num_interrupts = 0
    for place in interrupt_at_lines(lambda: lambda: generate(llm, prompts[::-1], greedy(6)), every=9):
        assert_empty(llm)
        assert generate(llm, prompts, greedy(6)) == expected, place
        num_interrupts += 1
    assert num_interrupts > 30


@pytest.mark.parametrize("action", ["generate", "stream", "abort", "step", "poll"])
def test_after_an_interrupt_at_any_line_a_request_added_by_hand_is_done_or_told(
    tiny_checkpoint: Path, reference: Reference, action: str
) -> None:
    llm = make_llm(tiny_checkpoint, num_kvcache_blocks=6, max_num_seqs=2, max_num_batched_tokens=8)
    engine, prompt = llm.engine, make_prompt(8)
    expected = reference(prompt, 4)
    done: list[Any] = []

    def act() -> None:
        if action == "generate":
            generate(llm, [[5, 6]], greedy(3))
        elif action == "stream":
            with closing(llm.stream([[5, 6]], greedy(3))) as pieces:
                next(pieces)
        elif action == "abort":
            llm.abort(engine.add_request([5, 6], greedy(3)))
        elif action == "step":
            done.extend(engine.step())
        elif engine.has_unfinished_requests:
            llm.get_metrics()

    def start() -> Callable[[], object]:
        engine.reset()
        done.clear()
        added.append(engine.add_request(prompt, greedy(4)))
        return act

    added: list[str] = []
    for place in interrupt_at_lines(start, every=3):
        assert not engine.turns.is_inside(), place
        told = False
        while engine.has_unfinished_requests:
            try:
                done += engine.step()
            except RuntimeError as error:
                told = re.search(rf"failed: [\d, ]*\b{added[-1]}\b", str(error)) is not None
        outputs = [output["token_ids"] for output in done if output.request_id == added[-1]]
        if action == "step":  # it was itself interrupted, which says that what was to come is lost
            assert outputs in ([], [expected]), place
        else:
            assert outputs == ([] if told else [expected]), place
        assert_empty(llm)
        assert generate(llm, [prompt], greedy(4)) == [expected], place


def test_a_failure_of_an_owner_whose_recovery_is_interrupted_is_told_by_step(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    llm = make_llm(tiny_checkpoint)
    added = llm.engine.add_request([1, 2], greedy(4))
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "schedule", interrupted)
        patch.setattr(Scheduler, "reset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(llm, [[3]], greedy(4))
    assert llm.engine.has_unfinished_requests
    with pytest.raises(RuntimeError, match=rf"requests were dropped by another call that failed: {added}"):
        finish(llm.engine)
    assert_empty(llm)


def test_one_that_no_longer_waits_for_a_turn_is_given_few(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that was interrupted on its way in stays noted as one that waits."""
    monkeypatch.setattr(turns, "MOST_TURNS", 3)
    slept: list[float] = []
    monkeypatch.setattr(turns.time, "sleep", slept.append)
    with make_llm(tiny_checkpoint) as llm:
        llm.engine.turns.waiting[-1] = turns.MOST_TURNS
        generate(llm, [[3]], greedy(12))
        assert len(slept) == 4
        assert_empty(llm)


def test_a_failing_step_leaves_an_engine_that_takes_new_requests(
    tiny_checkpoint: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(tiny_checkpoint)
    call = FailingCall(monkeypatch, ModelRunner, "execute")
    call.fail_at = 2
    llm.engine.add_request(make_prompt(5), greedy())
    with pytest.raises(RuntimeError):
        finish(llm.engine)
    assert_empty(llm)
    llm.engine.add_request(make_prompt(6), greedy())
    assert [output["token_ids"] for output in finish(llm.engine)] == [reference(make_prompt(6), 8)]


def test_a_loss_that_is_noted_while_step_asks_is_told(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noting = threading.Event()
    told: list[str] = []

    def note_slowly(request_id: str, cause: BaseException | None) -> LostRequest:
        if not noting.is_set():
            noting.set()
            time.sleep(0.2)  # meanwhile, in the other thread, step finds the losses of before
        return LostRequest(request_id, cause)

    with make_llm(tiny_checkpoint) as llm:
        engine = llm.engine
        added = engine.add_request([1, 2], greedy(8))
        engine._lost["of before"] = LostRequest("of before", None)
        monkeypatch.setattr(llm_engine, "LostRequest", note_slowly)
        monkeypatch.setattr(engine.runner, "execute", lambda plan: 1 / 0)

        def fail() -> None:
            with pytest.raises(ZeroDivisionError):
                llm.generate([[3]], greedy(8), use_tqdm=False)

        failing = threading.Thread(target=fail)
        failing.start()
        assert noting.wait(10)
        while engine.has_unfinished_requests or failing.is_alive():
            try:
                engine.step()
            except RuntimeError as error:
                told += re.findall(rf"of before|\b{added}\b", str(error).partition("failed: ")[2])
        failing.join()
    assert told == ["of before", added]


def test_requests_added_by_hand_run_along_and_wait_to_be_fetched(shared_llm: LLM, reference: Reference) -> None:
    request_id = shared_llm.engine.add_request([1, 2], greedy())
    assert generate(shared_llm, [[3] * 5], greedy(20)) == [reference([3] * 5, 20)]
    assert shared_llm.engine.has_unfinished_requests
    [output] = shared_llm.engine.step()
    assert (output.request_id, output["token_ids"]) == (request_id, reference([1, 2], 8))
    assert_empty(shared_llm)


# Lifetimes


def test_two_engines_work_side_by_side_step_by_step(tiny_checkpoint: Path, reference: Reference) -> None:
    engines = [
        make_llm(tiny_checkpoint).engine,
        make_llm(tiny_checkpoint, kvcache_block_size=16, num_kvcache_blocks=8, max_num_batched_tokens=5).engine,
    ]
    prompts = [[make_prompt(9, seed) for seed in (which, which + 10)] for which in range(2)]
    for engine, own in zip(engines, prompts, strict=True):
        for prompt in own:
            engine.add_request(prompt, greedy())
    finished: list[list[RequestOutput]] = [[], []]
    while any(engine.has_unfinished_requests for engine in engines):
        for outputs, engine in zip(finished, engines, strict=True):
            outputs += engine.step()
    for outputs, own in zip(finished, prompts, strict=True):
        by_id = {output.request_id: output["token_ids"] for output in outputs}
        assert [by_id["0"], by_id["1"]] == [reference(prompt, 8) for prompt in own]


@pytest.mark.parametrize("ending", ["del", "close", "with"])
def test_an_llm_that_is_let_go_gives_its_memory_back_at_once(tiny_checkpoint: Path, ending: str) -> None:
    resident = psutil.Process().memory_info
    llm = make_llm(tiny_checkpoint, kvcache_block_size=16, num_kvcache_blocks=8192)
    generate(llm, [make_prompt(5)])
    runner = llm.engine.runner
    cache = tree_leaves(runner.attention.kv_cache())
    size = llm.get_metrics()["kvcache_bytes"]
    assert size > 150 * 2**20
    refs = [weakref.ref(item) for item in (llm.engine, runner, *cache, runner.batch_state, *runner.model.parameters())]
    gc.collect()
    gc.disable()  # the garbage collector must not be needed
    try:
        for tensor in cache:
            tensor.fill_(1)
        del tensor
        before = resident().rss
        del runner, cache
        if ending == "del":
            del llm
        elif ending == "close":
            llm.close()
        else:
            with llm:
                pass
        alive = [ref() for ref in refs if ref() is not None]
    finally:
        gc.enable()
    assert alive == []
    if sys.platform == "linux":  # elsewhere the allocator may keep what was freed
        assert resident().rss < before - 0.9 * size


def test_a_stream_that_is_garbage_together_with_its_llm_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python finalizes the parts of a circle in any order: a request's text may be closed before its generator."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: unraisable.append(error.exc_value))
    llm: Any = LLM(DEMO_MODEL_PATH, device="cpu", max_num_seqs=4, num_kvcache_blocks=20, max_model_len=64)
    stream = llm.stream(["count from 1 to 20"] * 3, SamplingParams(temperature=0, max_tokens=20))
    next(stream)
    for request in llm.engine._requests.values():
        for detokenizer in request._detokenizers.values():
            detokenizer._stream.close()
    llm.itself = llm, stream
    engine = weakref.ref(llm.engine)
    del llm, stream, request, detokenizer
    gc.collect()
    assert engine() is None
    assert unraisable == []


def test_closing_twice_is_harmless_and_a_closed_llm_says_so(tiny_checkpoint: Path) -> None:
    with make_llm(tiny_checkpoint) as llm:
        generate(llm, [[1]], greedy(1))
    llm.close()
    llm.close()
    for use in (lambda: generate(llm, [[1]]), llm.get_metrics, llm.get_tokenizer, llm.reset_prefix_cache):
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            use()


# What is shown, and what is said


def test_an_llm_shows_what_it_is(tiny_checkpoint: Path) -> None:
    llm = make_llm(tiny_checkpoint)
    assert repr(llm) == f"<LLM {str(tiny_checkpoint)!r} on cpu in float32>"
    llm.close()
    assert repr(llm) == "<LLM, closed>"
    assert repr(LLM.__new__(LLM)) == "<LLM, closed>"


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_llm_that_is_sent_to_another_process_says_what_to_do(shared_llm: LLM, take: Callable[[Any], Any]) -> None:
    """As a process pool does with ``pool.map(llm.generate, prompts)``."""
    for one in (shared_llm, shared_llm.generate):
        if take is pickle.dumps or one is shared_llm:
            with pytest.raises(TypeError, match=r"an LLM cannot be pickled or copied: .* give its work to threads"):
                take(one)


class Screen(io.StringIO):
    """A terminal that counts how often a line is drawn anew."""

    num_redraws = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.num_redraws += text.count("\r")
        return super().write(text)


def test_the_progress_bar_is_drawn_ten_times_a_second_at_most(shared_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.002  # a step
        return now[0]

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    shared_llm.generate([[1], [2]], greedy(300))
    assert now[0] > 0.5
    assert "tok/s" in screen.getvalue()
    assert 4 <= screen.num_redraws <= 10 * now[0] + 4  # and when it appears and when it ends
    assert "2/2" in screen.getvalue()


def test_a_progress_bar_that_goes_to_a_file_is_not_drawn_over_and_over(
    shared_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(0, 0.05)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    shared_llm.generate([[1], [2]], greedy(300))
    assert next(now) > 15
    assert "2/2" in file.getvalue()
    assert file.getvalue().count("\r") <= 10  # once after ten seconds, and when it appears and ends


def test_without_a_progress_bar_nothing_is_shown(shared_llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    shared_llm.generate([[1]], greedy(2), use_tqdm=False)
    assert capfd.readouterr() == ("", "")


def test_what_a_tokenizer_returns_is_a_prompt(shared_llm: LLM, reference: Reference) -> None:
    encoding = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}
    assert generate(shared_llm, [encoding]) == [reference([5, 6, 7], 8)]
    assert generate(shared_llm, encoding) == [reference([5, 6, 7], 8)]
    with pytest.raises(ValueError, match=r"prompt 1 is padded .*encode each prompt by itself"):
        generate(shared_llm, [encoding, {"input_ids": [0, 5], "attention_mask": [0, 1]}])


def test_a_chat_message_is_not_a_prompt(shared_llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"the prompt is a chat message; answer conversations with llm.chat"):
        generate(shared_llm, [{"role": "user", "content": "hello"}])


def test_the_table_of_known_defects_names_tests_that_exist() -> None:
    folder = Path(__file__).parent
    sources = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    named = 0
    for line in (folder / "README.md").read_text(encoding="utf-8").splitlines():
        file = ""
        for name in re.findall(r"`(\w+(?:\.py)?)`", line):
            if name.endswith(".py"):
                file = name
                assert name in sources, name
            elif name.startswith("test_"):
                assert f"def {name}(" in sources[file], f"{file}: {name}"
                named += 1
    assert named > 40


# What an attack found


@pytest.mark.parametrize("block_size", [4, 16])  # of backend matmul, and of cpu
def test_a_request_that_overflows_leaves_the_prefix_it_shares_intact(tmp_path: Path, block_size: int) -> None:
    model = make_model(tie_word_embeddings=False, num_attention_heads=4)  # 32 queries share an item of cpu's work
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    model.save_pretrained(tmp_path)
    prefix = list(range(20, 20 + 3 * block_size))
    with make_llm(tmp_path, kvcache_block_size=block_size, max_num_batched_tokens=len(prefix) + 1) as llm:
        expected = generate(llm, [[*prefix, 3]], greedy(6))
        llm.reset_prefix_cache()
        [bad] = llm.generate([[*prefix, 7, 4]], greedy(3), use_tqdm=False)  # not a number from token 7 on
        assert (bad.outputs[0].finish_reason, bad["token_ids"]) == ("error", [])
        assert "logits are not finite" in bad.error
        again = llm.generate([[*prefix, 3]], greedy(6), use_tqdm=False)
    assert again[0].num_cached_tokens == 3 * block_size
    assert [again[0]["token_ids"]] == expected


@pytest.mark.parametrize("way", ["generate", "chat", "score", "continuation"])
def test_a_text_that_is_far_too_long_is_refused_by_its_beginning(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 30 MB as a prompt took a minute and 7 GB before it was refused."""
    text = "say stone 3 times. " * 20_000
    params = SamplingParams(temperature=0, max_tokens=2)
    with LLM(DEMO_MODEL_PATH, device="cpu", max_model_len=64, num_kvcache_blocks=8) as llm:
        tokenizer, lengths = llm.engine.tokenizer, []

        def counting(texts: Any, **arguments: Any) -> Any:
            lengths.extend([len(texts)] if isinstance(texts, str) else map(len, texts))
            return tokenizer(texts, **arguments)

        counting.chat_template = tokenizer.chat_template
        counting.apply_chat_template = tokenizer.apply_chat_template
        monkeypatch.setattr(llm.engine, "tokenizer", counting)
        monkeypatch.setattr(llm.engine.intake, "tokenizer", counting)
        calls: dict[str, Callable[[], object]] = {
            "generate": lambda: llm.generate(text, params),
            "chat": lambda: llm.chat([{"role": "user", "content": text}], params),
            "score": lambda: llm.score(text, "hello"),
            "continuation": lambda: llm.score("hello", text),
        }
        with pytest.raises(ValueError, match=r"has 380,\d* characters, the first 1,024 alone .* max_model_len is 64"):
            calls[way]()
        assert max(lengths) <= 1024


def test_a_text_that_is_far_too_long_may_be_truncated() -> None:
    text = "say stone 3 times. " * 1000
    params = SamplingParams(temperature=0, max_tokens=2, truncate_prompt_tokens=9)
    with LLM(DEMO_MODEL_PATH, device="cpu", max_model_len=64, num_kvcache_blocks=8) as llm:
        [plain] = llm.generate(text, params, use_tqdm=False)
        assert plain.prompt_token_ids == llm.get_tokenizer().encode(text)[-9:]
        conversation = [{"role": "user", "content": text}]
        [answer] = llm.chat(conversation, params, use_tqdm=False)
        rendered = llm.get_tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert answer.prompt == rendered
        assert answer.prompt_token_ids == llm.get_tokenizer().encode(rendered, add_special_tokens=False)[-9:]


def test_a_long_text_of_few_tokens_is_no_long_prompt() -> None:
    class Tokenizer:
        def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
            return {"input_ids": [1] if isinstance(texts, str) else [[1] for _ in texts]}

    check_start("the prompt", Tokenizer(), " " * 10**6, 64)


def test_a_bad_word_of_white_space_bans_no_other() -> None:
    """A space is not what bad_words=["\\n"] asks to leave out, nor is a word after one what ["\\nriver"] does."""
    tokenizer = load_tokenizer(DEMO_MODEL_PATH)

    def texts(*words: str) -> list[str]:
        return [tokenizer.decode(ids) for ids in encode_words(tokenizer, words)]

    assert texts("\n") == ["\n"]
    assert texts("\nriver") == ["\nriver"]
    assert texts(" river") == [" river"]
    assert texts("river", " ") == ["river", " river", " "]


@pytest.mark.parametrize("value", [{"rms_norm_eps": 0}, {"use_sliding_window": None}, {"pad_token_id": "x"}], ids=str)
def test_a_tokenizer_loads_whatever_else_config_json_says(tmp_path: Path, value: dict[str, Any]) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(DEMO_MODEL_PATH) / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | value), encoding="utf-8")
    text = "add 12 and 30<|im_end|>"
    assert load_tokenizer(str(tmp_path)).encode(text) == load_tokenizer(DEMO_MODEL_PATH).encode(text)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be loaded .*skip_tokenizer_init=True") as caught:
        load_tokenizer(str(tmp_path))
    assert next(iter(value)) not in str(caught.value)


def test_a_tokenizer_has_no_say_in_how_long_a_prompt_may_be(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(Path(DEMO_MODEL_PATH) / name, tmp_path)
    settings = json.loads((Path(DEMO_MODEL_PATH) / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": "x"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer(["add 1 and 2"])["input_ids"] == load_tokenizer(DEMO_MODEL_PATH)(["add 1 and 2"])["input_ids"]


def test_a_checkpoint_without_a_tokenizer_is_refused_unless_none_is_asked_for(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer.*skip_tokenizer_init=True"):
        LLM(tiny_checkpoint, device="cpu", num_kvcache_blocks=4)


def test_a_request_without_a_name_gets_one_that_is_free(tiny_checkpoint: Path) -> None:
    with make_llm(tiny_checkpoint) as llm:
        first = llm.engine.add_request([1, 2], greedy(2), request_id="1")
        second = llm.engine.add_request([1, 2], greedy(2))
        third = llm.engine.add_request([1, 2], greedy(2))
        assert len({first, second, third}) == 3
        llm.engine.reset()


def test_an_interrupt_while_a_request_is_added_leaves_nothing_behind(tiny_checkpoint: Path, monkeypatch) -> None:
    def interrupted(self: Scheduler, seq: object) -> None:
        raise KeyboardInterrupt

    with make_llm(tiny_checkpoint) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "add", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.engine.add_request([1, 2], greedy(2))
        assert not llm.engine.has_unfinished_requests
        assert len(generate(llm, [[1, 2]], greedy(2))[0]) == 2

        added = llm.engine.add_request([3, 4], greedy(2))
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "add", interrupted)
            with pytest.raises(KeyboardInterrupt):
                generate(llm, [[1, 2]], greedy(2))
        with pytest.raises(RuntimeError, match=f"requests were dropped by another call that failed: {added}: "):
            llm.engine.step()
        assert_empty(llm)


def test_a_console_that_goes_away_costs_no_results(tiny_checkpoint: Path, monkeypatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with make_llm(tiny_checkpoint) as llm:
        for console in (Broken(), None):
            monkeypatch.setattr(sys, "stderr", console)
            assert len(llm.generate([[1, 2]], greedy(2))) == 1


def test_text_that_cannot_be_decoded_costs_no_request(tiny_checkpoint: Path) -> None:
    class Tokenizer:
        def decode(self, *args: object, **kwargs: object) -> str:
            raise RuntimeError("broken")

    with make_llm(tiny_checkpoint) as llm:
        llm.engine.tokenizer = Tokenizer()
        output = llm.generate([[1, 2]], greedy(2), use_tqdm=False)[0]
    assert output["text"] == ""
    assert len(output["token_ids"]) == 2


@pytest.mark.parametrize("ending", ["length", "abort"])
def test_text_that_was_given_out_stays_when_the_tokenizer_fails(tiny_checkpoint: Path, ending: str) -> None:
    class Tokenizer:
        def __init__(self) -> None:
            self.fails = False

        def decode(self, token_ids: list[int], **_: object) -> str:
            if self.fails:
                raise RuntimeError("broken")
            return "".join(chr(ord("a") + token % 26) for token in token_ids)

    with make_llm(tiny_checkpoint) as llm:
        llm.engine.tokenizer = tokenizer = Tokenizer()
        pieces = []
        for piece in llm.stream([[1, 2]], greedy(8)):
            pieces.append(piece)
            if len(pieces) == 3:
                tokenizer.fails = True
                if ending == "abort":
                    llm.abort(piece.request_id)
    output = pieces[-1].output
    assert output.outputs[0].finish_reason == ending
    assert len(output["text"]) == 3
    assert "".join(piece.text for piece in pieces) == output["text"]
    assert [token for piece in pieces for token in piece.token_ids] == output["token_ids"]


def test_an_index_cannot_name_files_outside_its_directory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its directory"):
        make_llm(tmp_path / "model")


@pytest.mark.parametrize("ambient", [torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16)], ids=stable)
def test_the_callers_torch_contexts_change_nothing(
    tiny_checkpoint: Path, reference: Reference, ambient: torch.device | torch.autocast
) -> None:
    with ambient, make_llm(tiny_checkpoint, dtype="float32") as llm:
        output = llm.generate([[5, 6, 7]], greedy(), use_tqdm=False)[0]
    assert output.outputs[0].token_ids == reference([5, 6, 7], 8)


def test_lengths_whose_tables_do_not_fit_are_refused_with_the_numbers(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"max_model_len is 10000000000 and max_num_seqs 512: .* bytes.*lower one"):
        make_llm(
            tiny_checkpoint,
            max_model_len=10**10,
            hf_overrides={"max_position_embeddings": 10**10},
            num_kvcache_blocks=None,
        )
