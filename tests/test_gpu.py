"""What only a CUDA device can show; all of it skips without one. ``tools/gpu_check.py`` runs these and measures."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.attention import BACKENDS
from nanovllm.engine import model_runner
from nanovllm.engine.cuda_graphs import CudaCapture
from nanovllm.layers.noise import exponential_noise, token_words
from tests import kinds
from tests.checkpoints import load_reference, reference_greedy, write_checkpoint

pytestmark = pytest.mark.gpu
PROMPTS = [[7 + (i * 31 + n) % 200 for i in range(n)] for n in (1, 5, 16, 17, 64, 100)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with heads that all backends take."""
    heads = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return write_checkpoint(tmp_path_factory.mktemp("gpu"), **heads)


@pytest.fixture(scope="module")
def greedy(checkpoint: Path) -> list[list[int]]:
    """transformers' continuations of PROMPTS, on the CPU."""
    model = load_reference(checkpoint)
    return [reference_greedy(model, prompt, 12) for prompt in PROMPTS]


def open_llm(checkpoint: Path, **options: Any) -> LLM:
    given = {"device": "cuda", "dtype": "float32", "skip_tokenizer_init": True, "num_kvcache_blocks": 64, **options}
    try:
        return LLM(checkpoint, **given)
    except ValueError as error:
        if "attention_backend" in options and "(it was to serve " in str(error):
            pytest.skip(str(error))
        raise


def tokens_of(llm: LLM, params: Any = GREEDY, prompts: list[list[int]] = PROMPTS) -> list[list[list[int]]]:
    """By prompt and completion."""
    return kinds.tokens_of(llm, prompts, params)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 7}, {"num_kvcache_blocks": 9}], ids=str)
def test_greedy_tokens_equal_those_of_transformers(
    checkpoint: Path, greedy: list[list[int]], backend: str, eager: bool, limits: dict[str, int]
) -> None:
    with open_llm(checkpoint, attention_backend=backend, enforce_eager=eager, **limits) as llm:
        assert tokens_of(llm) == [[tokens] for tokens in greedy]


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[1:3], PROMPTS[2:5], PROMPTS[2:]], ids=len)
def test_few_rows_get_the_tokens_of_transformers(
    checkpoint: Path, greedy: list[list[int]], prompts: list[list[int]], eager: bool
) -> None:
    """They have kernels of their own."""
    expected = [[greedy[PROMPTS.index(prompt)]] for prompt in prompts]
    with open_llm(checkpoint, enforce_eager=eager) as llm:
        assert tokens_of(llm, prompts=prompts) == expected


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_half_precision_gives_answers_of_full_length(checkpoint: Path, backend: str) -> None:
    options = {"num_kvcache_blocks": 16, "kvcache_block_size": 256, "enable_prefix_caching": False}
    with open_llm(checkpoint, attention_backend=backend, dtype="bfloat16", **options) as llm:
        first, again = tokens_of(llm), tokens_of(llm)
    assert [len(tokens) for [tokens] in first] == [12] * len(PROMPTS)
    assert first == again


def test_every_kind_of_request_gets_what_the_cpu_gives_it(checkpoint: Path) -> None:
    params = kinds.every_kind(max_tokens=20, n=3)
    with open_llm(checkpoint, device="cpu") as llm:
        expected = tokens_of(llm, params)
    for limits in ({}, {"num_kvcache_blocks": 12, "max_num_batched_tokens": 20}):
        with open_llm(checkpoint, **limits) as llm:
            assert tokens_of(llm, params) == expected


class TestGraphs:
    @pytest.mark.parametrize("sizes", [[1, 2, 3, 5, 7, 12, 31], [100, 200, 300]], ids=str)
    def test_batches_of_any_size_get_the_tokens_of_eager_steps(self, checkpoint: Path, sizes: list[int]) -> None:
        prompts = [[7 + (i * 31 + n) % 200 for i in range(1 + n % 50)] for n in range(max(sizes))]
        options = {"max_num_seqs": max(sizes), "num_kvcache_blocks": 2000}
        with open_llm(checkpoint, **options) as captured, open_llm(checkpoint, **options, enforce_eager=True) as eager:
            assert captured.get_metrics()["num_graphs"] > 0
            assert eager.get_metrics()["num_graphs"] == 0
            for size in sizes:
                assert tokens_of(captured, prompts=prompts[:size]) == tokens_of(eager, prompts=prompts[:size])

    def test_nothing_on_the_way_of_a_decode_step_waits_for_the_device(self, checkpoint: Path) -> None:
        """torch's own watch sees copies and reads; an event, for which a step's result waits, is none of these."""
        params = SamplingParams(temperature=0.7, max_tokens=60, ignore_eos=True)
        with open_llm(checkpoint) as llm:
            engine = llm.engine
            for prompt in PROMPTS:
                engine.add_request(prompt, params)
            while engine.scheduler.waiting or any(seq.num_output_tokens < 2 for seq in engine.scheduler.running):
                engine.step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(40):  # new blocks among them
                    engine.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_one_step_is_always_ahead(self, checkpoint: Path) -> None:
        with open_llm(checkpoint) as llm:
            assert llm.engine.runner.overlap_depth == 1
            engine = llm.engine
            engine.add_request(PROMPTS[3], GREEDY)
            engine.step()
            assert len(engine._in_flight) == 1

    def test_two_engines_in_turns_do_not_disturb_each_other(self, checkpoint: Path, greedy: list[list[int]]) -> None:
        with open_llm(checkpoint) as first, open_llm(checkpoint) as second:
            for llm in (first, second, first, second):
                assert tokens_of(llm) == [[tokens] for tokens in greedy]
            pieces = [llm.stream(PROMPTS[4], GREEDY) for llm in (first, second)]
            made = [[piece.token_ids for piece in both] for both in zip(*pieces, strict=True)]
        assert all(one == other for one, other in made)

    @pytest.mark.parametrize("at", [1, 3])
    def test_an_engine_whose_steps_cannot_be_captured_works_without(
        self,
        checkpoint: Path,
        greedy: list[list[int]],
        at: int,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        class Breaking(CudaCapture):
            count = 0

            def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
                self.count += 1

                def waits() -> None:
                    function()
                    torch.cuda.synchronize()  # cannot be captured

                return super().__call__(waits if self.count == at else function)

        monkeypatch.setattr(model_runner, "CudaCapture", Breaking)
        with caplog.at_level(logging.WARNING, logger="nanovllm"), open_llm(checkpoint) as llm:
            assert llm.get_metrics()["num_graphs"] == 0
            assert tokens_of(llm) == [[tokens] for tokens in greedy]
        assert "could not be captured" in caplog.text
        monkeypatch.undo()
        with open_llm(checkpoint) as llm:  # the next engine's can
            assert llm.get_metrics()["num_graphs"] > 0
            assert tokens_of(llm) == [[tokens] for tokens in greedy]


class TestSurroundings:
    """What the caller has set for itself, and what else goes on in the process."""

    def test_autocast_and_another_default_device(self, checkpoint: Path, greedy: list[list[int]]) -> None:
        with torch.autocast("cuda", torch.bfloat16), torch.device("cuda"), open_llm(checkpoint) as llm:
            assert tokens_of(llm) == [[tokens] for tokens in greedy]

    def test_a_stream_of_the_callers(self, checkpoint: Path, greedy: list[list[int]]) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), open_llm(checkpoint) as llm:
            assert tokens_of(llm) == [[tokens] for tokens in greedy]
            assert torch.rand(3, device="cuda").isfinite().all()

    def test_engines_made_and_used_in_two_threads(self, checkpoint: Path, greedy: list[list[int]]) -> None:
        def work(_: int) -> list[Any]:
            with open_llm(checkpoint) as llm:
                return [tokens_of(llm) for _ in range(3)]

        with ThreadPoolExecutor(2) as pool:
            for answers in pool.map(work, range(2)):
                assert answers == [[[tokens] for tokens in greedy]] * 3

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_another_device_than_the_current_one(self, checkpoint: Path, greedy: list[list[int]]) -> None:
        with torch.cuda.device(0), open_llm(checkpoint, device="cuda:1") as llm:
            assert tokens_of(llm) == [[tokens] for tokens in greedy]

    def test_random_numbers_after_a_capture_that_failed(self, checkpoint: Path) -> None:
        capture = CudaCapture()
        with torch.cuda.stream(torch.cuda.Stream()):
            x = torch.ones(8, device="cuda")
            with pytest.raises(RuntimeError):
                capture(lambda: print(x.sum().item()))  # waits for the device, which a capture cannot
            assert torch.rand(8, device="cuda").isfinite().all()
            torch.cuda.empty_cache()
            y = torch.zeros(8, device="cuda")
            replay = capture(lambda: y.add_(1))
            replay()
            replay()
            assert y.tolist() == [2.0] * 8


def test_sampling_noise_is_the_same_on_cuda_and_cpu() -> None:
    keys = torch.tensor([[1, -2], [3, 4]], dtype=torch.int32)
    positions = torch.tensor([5, 70000])
    cpu = exponential_noise(keys, positions, token_words(5000, torch.device("cpu")))
    cuda = exponential_noise(keys.cuda(), positions.cuda(), token_words(5000, torch.device("cuda")))
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-5, atol=1e-9)


class TestMemory:
    def test_closing_an_engine_gives_its_gpu_memory_back(self, checkpoint: Path) -> None:
        def run() -> None:
            llm = open_llm(checkpoint)
            llm.generate(PROMPTS, SamplingParams(max_tokens=4), use_tqdm=False)
            llm.close()

        run()  # libraries keep what they take at their first use
        before = torch.cuda.memory_allocated()
        run()
        assert torch.cuda.memory_allocated() == before

    def test_the_kv_cache_is_sized_from_a_profiled_step(self, checkpoint: Path) -> None:
        with open_llm(checkpoint, gpu_memory_utilization=0.5, num_kvcache_blocks=None) as llm:
            metrics = llm.get_metrics()
        assert 0 < metrics["kvcache_bytes"] <= 0.5 * torch.cuda.get_device_properties(0).total_memory

    def test_what_another_engine_of_the_process_holds_is_not_taken_from_a_share(self, checkpoint: Path) -> None:
        share = 0.02
        with open_llm(checkpoint) as llm:
            metrics = llm.get_metrics()
        total = torch.cuda.get_device_properties(0).total_memory
        blocks = int(1.5 * share * total) // (metrics["kvcache_bytes"] // metrics["num_kvcache_blocks"])
        with (
            open_llm(checkpoint, num_kvcache_blocks=blocks),
            open_llm(checkpoint, num_kvcache_blocks=None, gpu_memory_utilization=share) as second,
        ):
            assert 0 < second.get_metrics()["kvcache_bytes"] <= share * total

    def test_a_cache_that_does_not_fit_is_refused_with_the_number_that_does(self, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match=r"num_kvcache_blocks is 1099511627776: .* at most \d+ blocks fit"):
            open_llm(checkpoint, num_kvcache_blocks=1 << 40)
