"""Overlap: the next step is launched while the device runs this one, and nothing about the answers changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.step_handle import DeviceMemoryError
from nanovllm.layers.temperature import Linear
from tests.late_runner import checked_books, make_late, open_llm
from tests.threads import one_thread  # noqa: F401

PREFIX = [7 + n % 50 for n in range(40)]
PROMPTS = [[3], PREFIX, [*PREFIX, 9, 8], [11, 12, 13] * 9, [*PREFIX[:32], 60], [5 + n % 190 for n in range(70)]]
LIMITS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "preempting": {"num_kvcache_blocks": 6, "max_num_seqs": 4},
    "chunked": {"max_num_batched_tokens": 9},
    "tight": {"num_kvcache_blocks": 6, "max_num_batched_tokens": 5, "max_num_seqs": 4},
    "uncached": {"enable_prefix_caching": False, "max_num_seqs": 2},
}


@pytest.fixture(autouse=True)
def books() -> Iterator[None]:
    with checked_books():
        yield


def requests() -> list[SamplingParams]:
    """One of each kind, in the order of PROMPTS."""

    def ban_even(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[::2] = float("-inf")
        return logits

    return [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=3, max_tokens=25, n=3),
        SamplingParams(temperature=1.5, seed=4, max_tokens=40, stop_token_ids=list(range(0, 200, 9)), min_tokens=3),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=5, max_tokens=20, repetition_penalty=1.3),
        SamplingParams(temperature=Linear(2.0, 0.0, num_tokens=10), seed=6, max_tokens=20, logprobs=2),
        SamplingParams(temperature=1.0, seed=7, max_tokens=12, logits_processors=[ban_even], prompt_logprobs=1),
    ]


def answers(llm: LLM) -> list[Any]:
    """Everything that was answered, as plain data; log-probabilities but for what another chunking rounds."""
    outputs = llm.generate(PROMPTS, requests(), use_tqdm=False)
    return [
        [(c.token_ids, c.finish_reason, c.stop_reason, rounded(c.logprobs)) for c in output.outputs]
        + [rounded(output.prompt_logprobs)]
        for output in outputs
    ]


def rounded(logprobs: list[Any] | None) -> list[Any]:
    return [
        {token: (pytest.approx(value.logprob, abs=1e-4), value.rank) for token, value in (position or {}).items()}
        for position in logprobs or []
    ]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", LIMITS)
def test_answers_are_those_of_an_engine_that_waits(
    tiny_checkpoint: Path, name: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, is_scarce = LIMITS[name], "num_kvcache_blocks" in LIMITS[name]
    with open_llm(tiny_checkpoint) as llm:
        unhindered = answers(llm)
    if is_scarce:  # no reserve either, which would keep most of these requests from ever losing their blocks
        monkeypatch.setattr("nanovllm.engine.scheduler.HEADROOM_TOKENS", 0)
    with open_llm(tiny_checkpoint, **limits) as llm:
        expected = answers(llm)
        counted = llm.get_metrics()["output_tokens"]
        assert (llm.get_metrics()["num_preemptions"] >= 3) == is_scarce
    assert expected == unhindered
    with open_llm(tiny_checkpoint, **limits) as llm:
        make_late(llm, depth)
        assert answers(llm) == expected
        assert llm.get_metrics()["output_tokens"] == counted, "surplus tokens are not counted"
        assert llm.get_metrics()["kvcache_blocks_used"] == 0
        assert not llm.engine._in_flight
        assert (llm.get_metrics()["num_preemptions"] >= 3) == is_scarce
        assert answers(llm) == expected, "what an earlier call left changes nothing"
    stops = {reason for request in expected for _, reason, _, _ in request[:-1]}
    assert stops == {"stop", "length"}


def test_the_next_step_is_launched_before_the_last_one_is_waited_for(tiny_checkpoint: Path) -> None:
    with open_llm(tiny_checkpoint) as llm:
        late = make_late(llm)
        llm.generate(PROMPTS[:2], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True), use_tqdm=False)
        order = late.events
    steps = sum(kind == "launch" for kind, _ in order)
    assert steps == 10, "a sequence that ends by its length computes no surplus"
    for step in range(steps - 1):
        assert order.index(("launch", step + 1)) < order.index(("wait", step))
        if step + 2 < steps:
            assert order.index(("wait", step)) < order.index(("launch", step + 2)), "one step ahead, no more"


def test_a_stop_costs_one_surplus_step_that_nobody_waits_for(tiny_checkpoint: Path) -> None:
    with open_llm(tiny_checkpoint) as llm:
        free = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
        tokens = llm.generate([PREFIX], free, use_tqdm=False)[0]["token_ids"]
        stop = next(token for token in tokens[2:] if token not in tokens[:2])
        length = tokens.index(stop) + 1
        late = make_late(llm)
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, stop_token_ids=[stop])
        assert llm.generate([PREFIX], params, use_tqdm=False)[0]["token_ids"] == tokens[:length]
        launched = [number for kind, number in late.events if kind == "launch"]
        waited = [number for kind, number in late.events if kind == "wait"]
        assert len(launched) == length + 1
        assert waited == launched[:-1]
        assert not llm.engine.has_unfinished_requests
        assert llm.generate([PREFIX], free, use_tqdm=False)[0]["token_ids"] == tokens


def test_streams_and_aborts_while_steps_are_in_flight(tiny_checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with open_llm(tiny_checkpoint) as llm:
        expected = [output["token_ids"] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
        make_late(llm)
        engine = llm.engine
        ids = [engine.add_request(prompt, params) for prompt in PROMPTS]
        outputs = []
        for _ in range(5):
            outputs += engine.step()
        aborted = [engine.abort(ids[1]), engine.abort(ids[4])]
        while engine.has_unfinished_requests:
            outputs += engine.step()
        assert [len(output.outputs[0].token_ids) for output in aborted if output] == [4, 4]
        for output in aborted:
            index = ids.index(output.request_id)
            assert output.outputs[0].finish_reason == "abort"
            assert output["token_ids"] == expected[index][:4]
        for output in outputs:
            assert output["token_ids"] == expected[ids.index(output.request_id)]
        assert len(outputs) == len(PROMPTS) - 2
        stream = llm.stream(PROMPTS[2], params)
        pieces = [next(stream) for _ in range(3)]
        stream.close()  # abandoned with a step in flight
        assert [token for piece in pieces for token in piece.token_ids] == expected[2][:3]
        assert llm.generate(PROMPTS[3:4], params, use_tqdm=False)[0]["token_ids"] == expected[3]
        assert llm.get_metrics()["kvcache_blocks_used"] == 0


def test_a_row_that_fails_ends_alone_though_its_next_step_is_under_way(tiny_checkpoint: Path) -> None:
    def fail_late(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(token_ids) == 4:
            raise ZeroDivisionError("mine")
        return logits

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    failing = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logits_processors=[fail_late])
    with open_llm(tiny_checkpoint) as llm:
        expected = [output["token_ids"] for output in llm.generate(PROMPTS[:3], params, use_tqdm=False)]
        make_late(llm)
        outputs = llm.generate(PROMPTS[:3], [params, failing, params], use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == [expected[0], expected[1][:4], expected[2]]
        assert outputs[1].outputs[0].finish_reason == "error"


@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_step_that_fails_on_the_device_drops_everything_and_the_engine_goes_on(
    tiny_checkpoint: Path, step: int
) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with open_llm(tiny_checkpoint) as llm:
        expected = [output["token_ids"] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
        late = make_late(llm)
        late.fail_at[step] = RuntimeError("an illegal memory access")
        with pytest.raises(RuntimeError, match="illegal memory access"):
            llm.generate(PROMPTS, params, use_tqdm=False)
        assert llm.get_metrics()["kvcache_blocks_used"] == 0
        assert not llm.engine._in_flight
        assert [output["token_ids"] for output in llm.generate(PROMPTS, params, use_tqdm=False)] == expected


def test_requests_added_by_hand_are_not_lost_without_a_word(tiny_checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with open_llm(tiny_checkpoint) as llm:
        engine, late = llm.engine, make_late(llm)
        mine = engine.add_request(PROMPTS[0], params, "mine")
        late.fail_at[2] = RuntimeError("an illegal memory access")
        with pytest.raises(RuntimeError, match="illegal memory access"):
            llm.generate(PROMPTS[1:], params, use_tqdm=False)
        assert engine.has_unfinished_requests
        with pytest.raises(RuntimeError, match=rf"dropped by another call that failed: {mine}: .*illegal memory"):
            engine.step()
        assert not engine.has_unfinished_requests
        assert engine.step() == []
        engine.add_request(PROMPTS[0], params, "mine")
        late.fail_at[late._number] = RuntimeError("again")
        engine.step()
        with pytest.raises(RuntimeError, match=r"^again$"):
            engine.step()
        assert not engine.has_unfinished_requests, "step itself said so"


def test_a_score_whose_request_is_aborted_is_an_error(tiny_checkpoint: Path) -> None:
    with open_llm(tiny_checkpoint, max_num_batched_tokens=8) as llm:
        late = make_late(llm)
        execute = late.execute

        def abort_at_the_third(plan: Any) -> Any:
            if late._number == 2:
                llm.abort(llm.engine.unfinished_request_ids[0])
            return execute(plan)

        late.execute = abort_at_the_third  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="aborted before it was scored"):
            llm.score(PREFIX, PREFIX[:30], use_tqdm=False)


class TestMemory:
    """A step that does not fit the device's memory is made smaller; what was computed is computed again."""

    @pytest.mark.parametrize("depth", [0, 1])
    @pytest.mark.parametrize("steps", [[0], [1], [3, 4], [2, 9, 16]], ids=str)
    def test_residents_are_computed_again_in_smaller_steps_with_the_same_answers(
        self, tiny_checkpoint: Path, depth: int, steps: list[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        with open_llm(tiny_checkpoint) as llm:
            expected = answers(llm)
        with open_llm(tiny_checkpoint) as llm:
            late = make_late(llm, depth)
            late.refuse_at = {step: DeviceMemoryError("a step does not fit") for step in steps}
            assert answers(llm) == expected
            assert not late.refuse_at
            scheduler = llm.engine.scheduler
            assert scheduler.max_num_running < scheduler.max_num_seqs
        assert "a step does not fit; going on with steps of at most" in caplog.text

    def test_what_fits_no_memory_however_small_is_an_error_and_leaves_the_engine_empty(
        self, tiny_checkpoint: Path
    ) -> None:
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        with open_llm(tiny_checkpoint) as llm:
            expected = llm.generate(PROMPTS[:1], params, use_tqdm=False)[0]["token_ids"]
            late = make_late(llm)
            late.refuse_at = {step: DeviceMemoryError("lower max_num_seqs") for step in range(100)}
            with pytest.raises(MemoryError, match="lower max_num_seqs"):
                llm.generate(PROMPTS, params, use_tqdm=False)
            late.refuse_at.clear()
            assert llm.get_metrics()["kvcache_blocks_used"] == 0
            assert llm.generate(PROMPTS[:1], params, use_tqdm=False)[0]["token_ids"] == expected

    def test_the_next_call_tries_steps_of_full_size_again(self, tiny_checkpoint: Path) -> None:
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        with open_llm(tiny_checkpoint) as llm:
            late, scheduler = make_late(llm), llm.engine.scheduler
            full = scheduler.max_num_batched_tokens, scheduler.max_num_running
            late.refuse_at = {0: DeviceMemoryError("a step does not fit")}
            llm.generate(PROMPTS, params, use_tqdm=False)
            assert (scheduler.max_num_batched_tokens, scheduler.max_num_running) != full
            llm.generate(PROMPTS, params, use_tqdm=False)
            assert (scheduler.max_num_batched_tokens, scheduler.max_num_running) == full

    def test_torch_running_out_of_memory_names_the_knobs(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_llm(tiny_checkpoint) as llm:

            def no_memory(*arguments: Any) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory")

            monkeypatch.setattr(llm.engine.runner.model, "forward", no_memory)
            with pytest.raises(MemoryError, match=r"max_num_batched_tokens or max_num_seqs"):
                llm.generate(PROMPTS[:2], use_tqdm=False)
            monkeypatch.undo()
            assert len(llm.generate(PROMPTS[:2], use_tqdm=False)) == 2
