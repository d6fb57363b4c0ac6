"""Whole decode steps in static buffers, without a GPU: captured by a stand-in, every kernel in Triton's interpreter.

What a CUDA graph is to replay is here called again, on the same buffers. Everything else is what runs on a GPU.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.engine import batch_state, cuda_graphs, model_runner
from nanovllm.engine.batch_state import BatchState, SampleInput, SamplePlaces
from nanovllm.engine.cuda_graphs import batch_sizes
from nanovllm.engine.step_plan import SlotEntry, StepPlan
from nanovllm.layers.temperature import Linear
from tests import kinds, late_runner
from tests.bounds import bounds  # noqa: F401
from tests.checkpoints import reference_greedy
from tests.late_runner import make_late
from tests.threads import one_thread  # noqa: F401

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py captures for real")

PREFIX = [7 + n % 50 for n in range(33)]
PROMPTS = [[3], PREFIX, [*PREFIX, 9], [11, 12, 13] * 5, [5 + n % 190 for n in range(40)]]


def call_again(function: Callable[[], None]) -> Callable[[], None]:
    """The stand-in for a capture."""
    return function


@contextmanager
def all_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models, samplers and steps that are made within use every kernel, interpreted."""
    with monkeypatch.context() as patch:
        patch.setattr(
            kernels,
            "load",
            lambda name, *_: (
                None if name in kernels.CPU_ONLY else getattr(import_module(f"nanovllm.kernels.{name}"), name)
            ),
        )
        yield


def open_llm(checkpoint: Path, **limits: Any) -> LLM:
    return late_runner.open_llm(checkpoint, **{"num_kvcache_blocks": 32, "max_num_seqs": 5, **limits})


def open_captured(checkpoint: Path, capture: cuda_graphs.Capture = call_again, **limits: Any) -> LLM:
    """An engine that captures its steps while it is made, as on a GPU."""
    with (
        patch.object(model_runner.ModelRunner, "_wants_graphs", lambda runner: True),
        patch.object(model_runner, "CudaCapture", lambda: capture),
    ):
        llm = open_llm(checkpoint, attention_backend="triton", **limits)
    llm.engine.runner.drawing.apart = True
    return llm


def tokens_of(llm: LLM, params: Any, prompts: list[list[int]] = PROMPTS) -> list[list[list[int]]]:
    return kinds.tokens_of(llm, prompts, params)


@pytest.mark.slow
def test_the_whole_path_of_a_gpu_gives_the_tokens_of_transformers(
    tiny_checkpoint: Path, tiny_reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [[reference_greedy(tiny_reference, prompt, 8)] for prompt in PROMPTS]
    with all_kernels(monkeypatch), open_captured(tiny_checkpoint) as llm:
        llm.engine.runner.warm_up()
        make_late(llm)
        assert tokens_of(llm, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)) == expected
        assert llm.get_metrics()["num_graphs"] == 4
        assert llm.get_metrics()["decode_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits", [{}, {"num_kvcache_blocks": 8, "max_num_batched_tokens": 20}], ids=["roomy", "tight"]
)
def test_every_kind_of_request_gets_what_the_cpu_gives_it(
    tiny_checkpoint: Path, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = kinds.every_kind(max_tokens=10, n=2)[: len(PROMPTS)]
    with open_llm(tiny_checkpoint, **limits) as llm:
        expected = tokens_of(llm, params)
    with all_kernels(monkeypatch), open_captured(tiny_checkpoint, **limits) as llm:
        make_late(llm)
        assert tokens_of(llm, params) == expected


class TestReplaying:
    """With torch's operators for all but attention, which is faster to interpret."""

    def test_all_batches_are_covered_odd_ones_too(self) -> None:
        for most in [1, 2, 3, 5, 7, 8, 12, 100, 200, 256, 257, 300, 512, 1000]:
            sizes = batch_sizes(most)
            assert sizes == sorted(set(sizes))
            assert sizes[-1] == most
            assert all(any(rows <= size for size in sizes) for rows in range(1, most + 1))
            assert all(b - a <= 32 for a, b in itertools.pairwise(sizes)), "little is computed in vain"

    def test_captured_from_the_largest_down(self, tiny_checkpoint: Path) -> None:
        captured: list[int] = []

        def capture(function: Callable[[], None]) -> Callable[[], None]:
            function()
            captured.append(captured_rows())
            return function

        def captured_rows() -> int:
            return seen[-1]

        seen: list[int] = []
        run = cuda_graphs.DecodeGraphs._run

        def noting(self: cuda_graphs.DecodeGraphs, rows: int) -> None:
            seen.append(rows)
            run(self, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_graphs.DecodeGraphs, "_run", noting)
            with open_captured(tiny_checkpoint, capture):
                assert captured == [5, 4, 2, 1]
                assert seen == [5, 5, 4, 4, 2, 2, 1, 1], "once before each capture, so that nothing is compiled in it"

    def test_a_capture_writes_nothing_where_sequences_are(self, tiny_checkpoint: Path) -> None:
        with open_llm(tiny_checkpoint, attention_backend="triton") as llm:
            runner = llm.engine.runner
            runner.attention.kv_cache().fill_(7.0)
            state = runner.batch_state
            before = [
                table.clone() for table in (state.token_ids, state.block_tables, state.num_computed, state.params)
            ]
            runner.capture_graphs(call_again)
            assert runner.graphs is not None
            assert (runner.attention.kv_cache() == 7.0).all()
            after = [state.token_ids, state.block_tables, state.num_computed, state.params]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    @pytest.mark.parametrize("failing", [0, 2])
    def test_a_failed_capture_leaves_a_working_engine(
        self, tiny_checkpoint: Path, tiny_reference: Any, failing: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        count = iter(range(100))

        def capture(function: Callable[[], None]) -> Callable[[], None]:
            if next(count) == failing:
                raise RuntimeError("operation not permitted when stream is capturing")
            return function

        with caplog.at_level(logging.WARNING), open_captured(tiny_checkpoint, capture) as llm:
            assert llm.engine.runner.graphs is None
            assert llm.get_metrics()["num_graphs"] == 0
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            assert tokens_of(llm, params, PROMPTS[:2]) == [
                [reference_greedy(tiny_reference, prompt, 4)] for prompt in PROMPTS[:2]
            ]
        assert "operation not permitted when stream is capturing" in caplog.text
        assert "enforce_eager=True" in caplog.text

    @pytest.mark.parametrize(("failing", "sizes"), [([0, 3], [2, 4]), ([0, 1, 2], [1])], ids=str)
    def test_what_memory_has_no_room_for_is_done_without(
        self, tiny_checkpoint: Path, failing: list[int], sizes: list[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Rows of a batch smaller than all that were captured are those of the next larger one."""
        count = iter(range(100))

        def capture(function: Callable[[], None]) -> Callable[[], None]:
            if next(count) in failing:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function

        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        with open_llm(tiny_checkpoint) as llm:
            expected = [tokens_of(llm, params, PROMPTS[:rows]) for rows in (1, 5)]
        with caplog.at_level(logging.INFO), open_captured(tiny_checkpoint, capture) as llm:
            assert llm.engine.runner.graphs is not None
            assert llm.engine.runner.graphs.sizes == sizes
            assert [tokens_of(llm, params, PROMPTS[:rows]) for rows in (1, 5)] == expected
        assert caplog.text.count("no memory to capture") == len(failing)
        assert f"captured decode steps of {len(sizes)} sizes up to {sizes[-1]} rows" in caplog.text

    def test_the_host_sends_only_changes(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[int] = []
        to_device = batch_state.to_device

        def counting(values: Any, *arguments: Any) -> torch.Tensor:
            tensor = to_device(values, *arguments)
            sent.append(tensor.numel())
            return tensor

        with open_captured(tiny_checkpoint) as llm:
            engine = llm.engine
            for prompt in PROMPTS[:4]:
                engine.add_request(prompt, SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True))
            engine.step()
            engine.step()
            monkeypatch.setattr(batch_state, "to_device", counting)
            monkeypatch.setattr(cuda_graphs, "to_device", counting)
            by_step = []
            for _ in range(32):
                sent.clear()
                engine.step()
                by_step.append(sum(sent))
            # A new block is three numbers, and each sequence takes one in 16 steps.
            assert sum(by_step) == 3 * 4 * 2
            assert by_step.count(0) >= 32 - 8
            engine.abort(engine.unfinished_request_ids[1])
            sent.clear()
            engine.step()
            assert sum(sent) <= 4 + 2 * 3, "the slots that decode"

    def test_a_sequence_outgrows_no_capture(self, tiny_checkpoint: Path, tiny_reference: Any) -> None:
        """Captured while no sequence has a block, replayed over three of them."""
        with open_captured(tiny_checkpoint, max_num_seqs=1) as llm:
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            assert tokens_of(llm, params, [[3]]) == [[reference_greedy(tiny_reference, [3], 40)]]

    def test_an_interrupt_while_slots_are_sent_sends_them_again(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_captured(tiny_checkpoint) as llm, torch.inference_mode():
            graphs = llm.engine.runner.graphs
            assert graphs is not None
            graphs._replays = dict.fromkeys(graphs._replays, lambda: None)
            graphs.replay([0, 1, 2])

            def interrupted(*arguments: Any) -> torch.Tensor:
                graphs.slots[:3] = torch.tensor([2, 1, 0])
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(cuda_graphs, "to_device", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    graphs.replay([2, 1, 0])
            graphs.replay([0])
            graphs.replay([0, 1, 2])
            assert graphs.slots.tolist()[:3] == [0, 1, 2]

    def test_a_slot_that_was_given_up_touches_nothing(self, tiny_checkpoint: Path) -> None:
        """Between two batches of other sizes, slots are reused and rows beyond a batch name none."""
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 9, 5, 14, 7)]
        with open_llm(tiny_checkpoint) as llm:
            expected = tokens_of(llm, params)
        with open_captured(tiny_checkpoint) as llm:
            for _ in range(2):
                assert tokens_of(llm, params) == expected
            assert tokens_of(llm, params[2:], PROMPTS[2:]) == expected[2:]


def test_parameters_are_gathered_only_of_rows_that_are_drawn_apart(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps that are launched operation by operation; all others are drawn by temperature alone."""
    gathered: list[list[int]] = []
    collected: list[list[int]] = []
    sample_input, collect = BatchState.sample_input, BatchState._collect

    def noting(self: BatchState, places: SamplePlaces) -> SampleInput:
        gathered.append(places.slots)
        return sample_input(self, places)

    def noting_collect(self: BatchState, slots: list[int]) -> Any:
        collected.append(slots)
        return collect(self, slots)

    monkeypatch.setattr(BatchState, "sample_input", noting)
    monkeypatch.setattr(BatchState, "_collect", noting_collect)
    plain, bounded = (
        SamplingParams(temperature=1.0, top_k=top_k, seed=1, max_tokens=5, ignore_eos=True) for top_k in (0, 3)
    )
    with open_llm(tiny_checkpoint) as llm:
        expected = tokens_of(llm, [plain, bounded, plain], PROMPTS[:3])
        llm.engine.runner.drawing.apart = True
        gathered.clear()
        collected.clear()
        tokens_of(llm, plain, PROMPTS[:3])
        assert gathered == collected == []
        assert tokens_of(llm, [plain, bounded, plain], PROMPTS[:3]) == expected
        assert gathered == [[1]] * 5
        assert collected == [[1]], "once for all steps of the same rows"


class NoWaiting(TorchDispatchMode):
    """Fails at operators that make the host wait for a CUDA device."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "unique", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name.lstrip("_") not in [waiting.lstrip("_") for waiting in self.WAITING], f"{name} waits for the device"
        if name == "index_put_" or name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as an index waits"
        return func(*args, **(kwargs or {}))


def test_nothing_on_the_way_of_a_step_waits_for_the_device(tiny_checkpoint: Path) -> None:
    def entry(slot: int, **params: Any) -> SlotEntry:
        params = {"temperature": 0.7, **params}
        return SlotEntry(slot, [5, 6, 7, 8], [slot], SamplingParams(**params), 123 << 40, 3, 2, (5,), ((9,), (8, 9)))

    entered = [
        entry(0, top_p=0.5, repetition_penalty=1.2, min_tokens=3),
        entry(1, top_k=5, logit_bias={3: 1.0}, allowed_token_ids=[1, 2, 3], logprobs=2, prompt_logprobs=1),
        entry(2, temperature=Linear(1.0, 0.0, num_tokens=4), min_p=0.1, presence_penalty=0.5),
    ]
    plan = StepPlan([], entered, [(0, 1, 9)], [0, 1, 2], [1, 0, 3], [3, 2, 1], [True, False, True], 5)
    with open_llm(tiny_checkpoint) as llm, torch.inference_mode(), NoWaiting():
        state = llm.engine.runner.batch_state
        state.apply(plan)
        step = state.step_input(plan)
        places = step.places
        assert places is not None
        assert len(step.prompt_logprobs) == 1 + 1  # of slots 0 and 1
        logits = torch.randn(2, 211)
        assert (
            state.rules.apply(
                logits, places.slots, places.slot_index, places.positions, places.longest, state.token_ids
            )
            == {}
        )
        state.sample_input(places)
        state.append(places, torch.tensor([3, -1]))
        state.apply(StepPlan(released=[0, 1, 2]))
