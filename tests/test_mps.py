"""The engine on MPS, by a device that is not there (``tests/mps_device.py``): nothing that MPS lacks, no waiting."""

import gc
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.layers import sampler as sampler_module
from nanovllm.layers.sampler import Sampler, SamplingRows
from nanovllm.layers.top_tokens import in_blocks, most_likely
from nanovllm.utils.memory import free_memory, is_out_of_memory
from nanovllm.utils.transfer import HostCopy, settle_mps, to_device, upload
from tests import test_logprobs, test_overlap
from tests.checkpoints import reference_greedy, reference_logits, write_checkpoint
from tests.kinds import tokens_of
from tests.late_runner import checked_books
from tests.mps_device import MPS, FakeMps, MpsError, fake_mps
from tests.test_overlap import LIMITS, PROMPTS
from tests.test_parity import assert_parity, generate, make_llm, make_reference
from tests.test_sampler import make_rows, mixed_rows, request_keys
from tests.threads import one_thread  # noqa: F401

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def mps() -> Iterator[FakeMps]:
    with fake_mps() as mps:
        yield mps


@pytest.fixture
def books() -> Iterator[None]:
    with checked_books():
        yield


def open_llm(checkpoint: Path, **arguments: Any) -> LLM:
    defaults = {"device": "mps", "dtype": "float32", "skip_tokenizer_init": True, "num_kvcache_blocks": 64}
    return LLM(checkpoint, **{**defaults, **arguments})


def on_mps(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(MPS)


class TestTheStandIn:
    """It refuses what MPS would get wrong: the other tests can fail."""

    @pytest.mark.parametrize(
        ("action", "message"),
        [
            (lambda x: x.double(), "float64"),
            (lambda x: x + torch.ones(4), "tensors of the host"),
            (lambda x: torch.linalg.qr(x.view(2, 2)), "linalg_qr is not among the operators"),
            (lambda x: torch.fft.fft(x), "fft"),
            (lambda x: x.long().topk(2), "cuts to 32 bits"),
            (lambda x: x.long().cumsum(0), "version of macOS"),
            (lambda x: x.long() // 7, "divides integers as float32"),
            (lambda x: x.long() % 7, "divides integers as float32"),
            (lambda x: x[1:].mul_(2), "into a part of a tensor"),
            (lambda x: x.view(2, 2)[:, 0].exp_(), "into a part of a tensor"),
            (lambda x: torch.empty(2, 2).copy_(x.view(2, 2).t(), non_blocking=True), "read before it is made"),
        ],
    )
    def test_what_it_refuses(self, mps: FakeMps, action: Any, message: str) -> None:
        with pytest.raises(MpsError, match=message):
            action(on_mps(torch.arange(4.0)))

    def test_what_makes_the_host_wait(self, mps: FakeMps) -> None:
        x = on_mps(torch.arange(4.0))
        for action in (
            lambda: x[0].item(),
            lambda: bool(x.isfinite().all(dim=0)),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: x[x > 5],
            lambda: torch.arange(3).to(MPS),
        ):
            mps.waits.clear()
            action()
            assert mps.waits, action

    def test_a_queued_copy_is_there_when_its_event_has_passed(self, mps: FakeMps) -> None:
        host = torch.zeros(4)
        host.copy_(on_mps(torch.arange(4.0)), non_blocking=True)
        assert host.tolist() != [0, 1, 2, 3]
        event = torch.mps.Event()
        event.record()
        assert not event.query()
        event.synchronize()
        assert event.query()
        assert host.tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("spoil", ["free", "change"])
    def test_memory_of_the_host_must_stay_until_then(self, spoil: str) -> None:
        with fake_mps() as mps:
            host = torch.arange(4)
            host.to(MPS, non_blocking=True)
            if spoil == "free":
                del host
                gc.collect()
            else:
                host.zero_()
            with pytest.raises(MpsError, match="let go" if spoil == "free" else "changed"):
                mps.run_until(mps.num_queued)


class TestCopies:
    def test_nobody_waits_and_memory_stays(self, mps: FakeMps) -> None:
        sent = [to_device([n, 5], torch.int32, MPS) for n in range(10)]
        sent += upload([torch.arange(3).numpy(), torch.arange(4).view(2, 2).numpy()], MPS)
        gc.collect()
        assert not mps.waits
        copies = [HostCopy(tensor) for tensor in sent]
        assert not mps.waits
        assert copies[9].wait().tolist() == [9, 5]
        assert copies[0].wait().tolist() == [0, 5]
        assert copies[10].wait().tolist() == [0, 1, 2]
        assert copies[11].wait().tolist() == [[0, 1], [2, 3]]
        assert not mps.waits

    def test_a_copy_that_nobody_reads_is_made_all_the_same(self, mps: FakeMps) -> None:
        for _ in range(3):
            HostCopy(to_device([1, 2, 3], torch.int64, MPS))
            gc.collect()
        assert HostCopy(to_device([4], torch.int64, MPS)).wait().tolist() == [4]  # fails if memory was let go

    def test_what_comes_later_does_not_change_it(self, mps: FakeMps) -> None:
        tensor = to_device([1, 2, 3], torch.int64, MPS)
        copy = HostCopy(tensor)
        tensor.zero_()
        assert copy.wait().tolist() == [1, 2, 3]

    @pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), ()])
    def test_of_any_shape(self, mps: FakeMps, shape: tuple[int, ...]) -> None:
        values = torch.ones(shape, dtype=torch.int64)
        assert torch.equal(HostCopy(to_device(values.numpy(), torch.int64, MPS)).wait(), values)

    def test_of_a_tensor_with_gaps(self, mps: FakeMps) -> None:
        assert HostCopy(to_device([[1, 2], [3, 4]], torch.int64, MPS)[:, 1]).wait().tolist() == [2, 4]

    def test_settling_waits_for_everything_once(self, mps: FakeMps) -> None:
        copy = HostCopy(to_device([1], torch.int64, MPS))
        settle_mps()
        assert mps.has_run_until(mps.num_queued)
        assert mps.waits == ["synchronize"]
        assert copy.wait().tolist() == [1]


class TestParity:
    """The tokens of transformers, and in float32 its logits."""

    @pytest.mark.parametrize(("block_size", "chunk_budget"), [(1, 64), (7, 7), (16, 64)])
    def test_any_block_size_and_chunking(
        self, mps: FakeMps, parity_reference: Any, block_size: int, chunk_budget: int
    ) -> None:
        names = list(parity_reference.prompts)[:6]
        prompts = [parity_reference.prompts[name] for name in names]
        limits = {"kvcache_block_size": block_size, "max_num_batched_tokens": chunk_budget, "num_kvcache_blocks": 300}
        with make_llm(parity_reference.path, device="mps", **limits) as llm:
            for _ in range(2):  # then from the prefix cache
                tokens, logits, _ = generate(llm, prompts)
                assert_parity(parity_reference, names, tokens, [on_host(row) for row in logits])

    @pytest.fixture(scope="class")
    def parity_reference(self, tmp_path_factory: pytest.TempPathFactory) -> Any:
        return make_reference("head80-bias-untied", tmp_path_factory.mktemp("mps"))

    def test_a_long_prompt_and_preemptions(
        self, mps: FakeMps, tiny_checkpoint: Path, tiny_reference: Any, books: None
    ) -> None:
        prompts = PROMPTS[1:5]
        expected = [reference_greedy(tiny_reference, prompt, 40) for prompt in prompts]
        with open_llm(tiny_checkpoint, num_kvcache_blocks=7, max_num_seqs=4) as llm:
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert [output["token_ids"] for output in outputs] == expected
            assert llm.get_metrics()["num_preemptions"] > 0

    def test_logprobs_and_prompt_logprobs(self, mps: FakeMps, tiny_checkpoint: Path, tiny_reference: Any) -> None:
        def reference(ids: list[int]) -> torch.Tensor:
            return reference_logits(tiny_reference, ids).log_softmax(dim=-1)

        prompts = [test_logprobs.make_prompt(length, length) for length in (1, 5, 40)]
        numbers = ((0, None), (3, 2), (None, 0), (20, 20), (-1, -1))
        with open_llm(tiny_checkpoint, max_num_batched_tokens=16) as llm:
            for number, prompt_number in numbers:
                params = test_logprobs.logprobs_params(number, prompt_number)
                for output in llm.generate(prompts, params, use_tqdm=False):
                    test_logprobs.check(output, params, reference)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision(self, mps: FakeMps, tiny_checkpoint: Path, dtype: str) -> None:
        with open_llm(tiny_checkpoint, dtype=dtype) as llm:
            tokens = [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        with open_llm(tiny_checkpoint, dtype=dtype, device="cpu") as llm:
            expected = [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        same = sum(a == b for x, y in zip(tokens, expected, strict=True) for a, b in zip(x, y, strict=True))
        assert same > 0.5 * 12 * len(PROMPTS), "the same but for what another kernel rounds"

    def test_the_demo_checkpoint_chats(self, mps: FakeMps) -> None:
        with LLM(DEMO_MODEL_PATH, device="mps", dtype="float32", num_kvcache_blocks=64) as llm:
            [output] = llm.chat(
                [{"role": "user", "content": "list all primes up to 20"}],
                SamplingParams(temperature=0, max_tokens=48),
                chat_template_kwargs={"enable_thinking": False},
                use_tqdm=False,
            )
        assert "2, 3, 5, 7, 11, 13, 17, 19" in output.outputs[0].text


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu()


class TestEveryKindOfRequest:
    @pytest.mark.slow
    @pytest.mark.parametrize("limits", ["roomy", "preempting", "tight"])
    def test_answers_are_those_of_the_cpu(self, tiny_checkpoint: Path, limits: str, books: None) -> None:
        with open_llm(tiny_checkpoint, device="cpu", **LIMITS[limits]) as llm:
            expected = test_overlap.answers(llm)
        with fake_mps(), open_llm(tiny_checkpoint, **LIMITS[limits]) as llm:
            assert test_overlap.answers(llm) == expected

    def requests(self) -> list[SamplingParams]:
        """Of each kind that does not call the user's own code, in which the host may wait."""
        common: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
        return [
            SamplingParams(temperature=0, **common),
            SamplingParams(temperature=1.0, seed=1, n=2, **common),
            SamplingParams(temperature=0.9, top_p=0.7, seed=2, **common),
            SamplingParams(temperature=3.0, top_p=0.999, min_p=1e-4, seed=3, **common),
            SamplingParams(temperature=1.3, top_k=12, seed=4, logprobs=3, prompt_logprobs=2, **common),
            SamplingParams(temperature=1.0, top_k=100, top_p=0.9, seed=5, repetition_penalty=1.3, **common),
            SamplingParams(seed=6, presence_penalty=0.5, frequency_penalty=0.2, min_tokens=4, **common),
            SamplingParams(seed=7, logit_bias={3: 2.0, 9: -1.0}, allowed_token_ids=list(range(40)), **common),
        ]

    def answers(self, llm: LLM) -> list[list[list[int]]]:
        requests = self.requests()
        prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(requests))]
        return tokens_of(llm, prompts, requests)

    def test_the_host_waits_for_nothing_but_results(self, tiny_checkpoint: Path) -> None:
        with open_llm(tiny_checkpoint, device="cpu") as llm:
            expected = self.answers(llm)
        with fake_mps() as mps, open_llm(tiny_checkpoint, max_num_batched_tokens=32) as llm:
            mps.waits.clear()
            assert self.answers(llm) == expected
            assert mps.waits == []
            assert mps.events
            mps.waits.clear()
        assert mps.waits == ["synchronize"], "closing lets the device finish"

    def test_a_bad_word_of_several_tokens(self, mps: FakeMps, tiny_checkpoint: Path) -> None:
        with open_llm(tiny_checkpoint) as llm:
            [output] = llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
            first, second = output["token_ids"][:2]
            llm.engine.intake.tokenizer = SimpleNamespace()  # only asked for bad words
            mps.waits.clear()
            request = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            [prepared] = llm.engine.intake.prepare(PROMPTS[:1], [request])
            prepared.bad_words = ((first, second),)
            llm.engine.add_prepared(prepared)
            outputs = []
            while llm.engine.has_unfinished_requests:
                outputs += llm.engine.step()
            assert outputs[0]["token_ids"][0] == first
            assert outputs[0]["token_ids"][1] != second
            assert mps.waits == []

    def test_streams_aborts_and_stops_that_are_seen_late(
        self, mps: FakeMps, tiny_checkpoint: Path, books: None
    ) -> None:
        with open_llm(tiny_checkpoint) as llm:
            expected = [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
            stream = llm.stream(PROMPTS[1], GREEDY)
            pieces = [next(stream) for _ in range(3)]
            stream.close()  # abandoned with a step in flight
            assert [token for piece in pieces for token in piece.token_ids] == expected[1][:3]
            stop = next(token for token in expected[2][2:] if token not in expected[2][:2])
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
            [output] = llm.generate(PROMPTS[2:3], params, use_tqdm=False)
            assert output["token_ids"] == expected[2][: expected[2].index(stop) + 1]
            gc.collect()
            assert [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == expected
            assert llm.get_metrics()["kvcache_blocks_used"] == 0


class TestOverlap:
    def test_the_next_step_is_queued_before_the_last_ones_tokens_are_read(
        self, mps: FakeMps, tiny_checkpoint: Path
    ) -> None:
        with open_llm(tiny_checkpoint) as llm:
            assert llm.engine.runner.overlap_depth == 1
            mps.events.clear()
            llm.generate(PROMPTS[:2], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True), use_tqdm=False)
        recorded = [number for kind, number in mps.events if kind == "record"]
        assert len(recorded) == 10, "one event a step"
        for this, following in itertools.pairwise(recorded):
            assert mps.events.index(("record", following)) < mps.events.index(("wait", this))

    def test_it_can_be_switched_off(self, mps: FakeMps, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NANOVLLM_DISABLE", "overlap")
        with open_llm(tiny_checkpoint) as llm:
            assert llm.engine.runner.overlap_depth == 0


class TestMemory:
    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 36, total=1 << 37))

    BLOCK = 16 * 3 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, heads, their size, bytes

    def num_blocks(self, checkpoint: Path, **arguments: Any) -> int:
        with open_llm(checkpoint, num_kvcache_blocks=None, **arguments) as llm:
            assert llm.get_metrics()["device"] == "mps"
            assert llm.get_metrics()["attention_backend"] == "matmul"
            return llm.get_metrics()["num_kvcache_blocks"]

    def test_1024_blocks(self, mps: FakeMps, tiny_checkpoint: Path) -> None:
        assert self.num_blocks(tiny_checkpoint) == 1024

    def test_no_more_than_the_residents_can_use(self, mps: FakeMps, tiny_checkpoint: Path) -> None:
        assert self.num_blocks(tiny_checkpoint, max_num_seqs=3, max_model_len=40) == 9

    def test_half_of_what_memory_holds(self, tiny_checkpoint: Path) -> None:
        with fake_mps(memory=20 << 20):
            assert 0 < self.num_blocks(tiny_checkpoint, max_num_seqs=4) <= (10 << 20) // self.BLOCK < 1024

    def test_memory_that_others_use_is_gone(
        self, mps: FakeMps, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10 << 20, total=1 << 37))
        assert free_memory(MPS) <= 10 << 20
        assert 0 < self.num_blocks(tiny_checkpoint, max_num_seqs=4) <= (5 << 20) // self.BLOCK

    def test_what_does_not_fit_is_refused(self, tiny_checkpoint: Path) -> None:
        with fake_mps(memory=1 << 20), pytest.raises(ValueError, match=r"num_kvcache_blocks is 64: .* are free on mps"):
            open_llm(tiny_checkpoint, max_num_seqs=4)
        with fake_mps(memory=40_000), pytest.raises(ValueError, match=r"their tables take|no memory is left"):
            open_llm(tiny_checkpoint, num_kvcache_blocks=None)

    def test_what_mps_says_when_it_is_full(
        self, mps: FakeMps, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB, max allowed: 6.80 GB)")
        assert is_out_of_memory(full)
        assert not is_out_of_memory(RuntimeError("shapes do not match"))
        with open_llm(tiny_checkpoint) as llm:
            expected = [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
            model, failures = llm.engine.runner.model, [full, full]
            forward = model.forward

            def sometimes(*arguments: Any) -> torch.Tensor:
                if failures:
                    raise failures.pop()
                return forward(*arguments)

            monkeypatch.setattr(model, "forward", sometimes)
            assert [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == expected
            failures[:] = [RuntimeError("shapes do not match")]
            with pytest.raises(RuntimeError, match="shapes do not match"):
                llm.generate(PROMPTS, GREEDY, use_tqdm=False)


class TestChoices:
    def test_auto_is_mps_where_there_is_no_cuda(self, mps: FakeMps, tiny_checkpoint: Path) -> None:
        with open_llm(tiny_checkpoint, device="auto") as llm:
            assert llm.get_metrics()["device"] == ("cuda:0" if torch.cuda.is_available() else "mps")

    @pytest.fixture(scope="class")
    def bfloat16_checkpoint(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = write_checkpoint(tmp_path_factory.mktemp("bfloat16"))
        Qwen3ForCausalLM.from_pretrained(path, torch_dtype=torch.bfloat16).save_pretrained(path)
        return path

    @pytest.mark.parametrize(("macos", "dtype"), [((13, 3), "float16"), ((14, 0), "bfloat16"), ((26, 1), "bfloat16")])
    def test_auto_is_bfloat16_where_the_system_has_it(
        self, bfloat16_checkpoint: Path, macos: tuple[int, int], dtype: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        with fake_mps(macos=macos), open_llm(bfloat16_checkpoint, dtype="auto") as llm:
            assert llm.get_metrics()["dtype"] == dtype
        assert caplog.text.count("MPS has from macOS 14 on") == (dtype == "float16")

    def test_bfloat16_is_refused_by_name_where_it_is_not(self, tiny_checkpoint: Path) -> None:
        with fake_mps(macos=(13, 5)):
            with pytest.raises(ValueError, match=r"dtype is 'bfloat16', which MPS has from macOS 14 on"):
                open_llm(tiny_checkpoint, dtype="bfloat16")
            with open_llm(tiny_checkpoint, dtype="auto") as llm:
                assert llm.get_metrics()["dtype"] == "float32"

    def test_other_attention_backends_say_why_not(self, mps: FakeMps, tiny_checkpoint: Path) -> None:
        for backend in ("triton", "flash_attn"):
            with pytest.raises(ValueError, match=backend):
                open_llm(tiny_checkpoint, attention_backend=backend)


class TestSampling:
    """The draws of the CPU, without looking at a number on the way."""

    @pytest.mark.parametrize("vocab_size", [5, 300, 1024])
    @pytest.mark.parametrize("kind", ["peaked", "flat", "ties"])
    def test_every_kind_of_row(self, vocab_size: int, kind: str) -> None:
        logits = torch.randn(120, vocab_size, generator=torch.Generator().manual_seed(0))
        logits *= 5.0 if kind == "peaked" else 0.1
        if kind == "ties":
            logits = (logits * 20).round() / 4
        rows = mixed_rows(120)
        expected = Sampler(vocab_size, torch.device("cpu"))(logits, rows)
        with fake_mps() as mps:
            sampler = Sampler(vocab_size, MPS)
            ours, theirs = on_mps(logits), rows_on_mps(rows)
            mps.waits.clear()
            tokens = sampler(ours, theirs)
            assert mps.waits == []
            assert torch.equal(tokens.cpu(), expected)

    @pytest.mark.parametrize("top_p", [0.002, 0.1, 0.5, 0.95, 0.9999])
    def test_wide_nuclei_of_a_flat_distribution(self, top_p: float) -> None:
        logits = torch.randn(200, 40_000, generator=torch.Generator().manual_seed(1)) * 0.3
        rows = make_rows(request_keys(200), torch.arange(200), top_p=top_p)
        expected = Sampler(40_000, torch.device("cpu"))(logits, rows)
        with fake_mps():
            assert torch.equal(Sampler(40_000, MPS)(on_mps(logits), rows_on_mps(rows)).cpu(), expected)

    def test_rows_for_which_no_draw_was_kept_get_their_most_likely_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sampler_module, "BLIND_DRAWS", 0)
        logits = torch.randn(8, 2000, generator=torch.Generator().manual_seed(1)) * 0.1
        rows = make_rows(request_keys(8), torch.arange(8), top_p=0.9)
        with fake_mps():
            assert torch.equal(Sampler(2000, MPS)(on_mps(logits), rows_on_mps(rows)).cpu(), logits.argmax(dim=-1))

    @pytest.mark.parametrize("vocab_size", [1, 100, 129, 5000])
    @pytest.mark.parametrize("count", [1, 2, 64, 65, 600])
    @pytest.mark.parametrize("distinct", [1, 3, 50, 10_000])
    def test_the_most_likely_tokens_as_a_stable_sort_has_them(
        self, mps: FakeMps, vocab_size: int, count: int, distinct: int
    ) -> None:
        generator = torch.Generator().manual_seed(count)
        logits = torch.randint(-distinct, distinct, (5, vocab_size), generator=generator) / 7
        logits[2:4] = -logits[2:4].abs() * 0.0  # zeros of either sign
        logits[4, torch.rand(vocab_size, generator=generator) < 0.3] = -torch.inf
        blocks, rows = in_blocks(on_mps(logits)), torch.tensor([4, 3, 0])
        count = min(count, vocab_size)
        values, ids = most_likely(blocks, blocks.amax(dim=-1), on_mps(rows), count)
        ordered = logits[rows].sort(dim=-1, descending=True, stable=True)
        assert torch.equal(values.cpu(), ordered.values[:, :count])
        assert torch.equal(ids.cpu(), ordered.indices[:, :count])

    def test_rows_that_are_not_finite(self, mps: FakeMps) -> None:
        logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
        logits[0, 7], logits[2, 9], logits[4] = torch.nan, torch.inf, -torch.inf
        for settings in ({}, {"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}):
            rows = make_rows(request_keys(6), torch.arange(6), **settings)
            tokens = Sampler(300, MPS)(on_mps(logits), rows_on_mps(rows)).cpu()
            assert torch.equal(tokens, Sampler(300, torch.device("cpu"))(logits, rows))
            assert tokens[[0, 2, 4]].tolist() == [-1, -1, -1]


def rows_on_mps(rows: SamplingRows) -> SamplingRows:
    moved = make_rows(rows.keys, rows.positions)
    for name in SamplingRows.__slots__:
        value = getattr(rows, name)
        setattr(moved, name, on_mps(value.contiguous()) if isinstance(value, torch.Tensor) else value)
    return moved
