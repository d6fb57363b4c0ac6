"""Several ranks on one machine: the same answers as one, small messages, and a clean end however one of them ends."""

import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import LLM, EngineDeadError, SamplingParams
from nanovllm.engine import model_runner, rank_group
from nanovllm.engine.parallel_runner import message_of
from nanovllm.engine.step_plan import SlotEntry, StepPlan
from tests import kinds
from tests.checkpoints import load_reference, reference_greedy, write_checkpoint
from tests.threads import one_thread  # noqa: F401

needs_ranks = pytest.mark.skipif(
    os.name != "posix" or not torch.distributed.is_available(), reason="needs process groups, on Linux or macOS"
)
FAULTS = Path(__file__).parent / "worker_faults"
PREFIX = [7 + n % 50 for n in range(33)]
PROMPTS = [[3], PREFIX, [*PREFIX, 9], [11, 12, 13] * 5, [5 + n % 90 for n in range(40)], [3]]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SOON = 5.0  # seconds in which the end of a rank must be heard
KILLS = int(os.environ.get("NANOVLLM_TEST_KILLS", "3"))  # of ranks at random moments


def open_llm(checkpoint: Path, size: int = 2, **options: Any) -> LLM:
    given = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "num_kvcache_blocks": 40, **options}
    return LLM(checkpoint, tensor_parallel_size=size, **given)


def tokens_of(llm: LLM, params: Any = GREEDY, prompts: list[list[int]] = PROMPTS) -> list[list[list[int]]]:
    """By prompt and completion."""
    return kinds.tokens_of(llm, prompts, params)


def belongings() -> dict[str, Any]:
    """What a process holds, and what it may leave behind on the machine."""
    me = psutil.Process()
    connections = me.net_connections if hasattr(me, "net_connections") else me.connections  # before psutil 6
    shared = Path("/dev/shm")
    return {
        "processes": sorted(child.pid for child in me.children(recursive=True)),
        "files": me.num_fds(),
        "sockets": sorted(str(c.laddr) for c in connections() if c.status == psutil.CONN_LISTEN),
        "shared memory": sorted(path.name for path in shared.glob("*nanovllm*")),
        "temporary": sorted(path.name for path in Path(tempfile.gettempdir()).iterdir()),
    }


@contextmanager
def nothing_left() -> Iterator[None]:
    """Whatever was made within is gone soon afterwards."""
    before = belongings()
    yield
    deadline = time.monotonic() + SOON
    while (after := belongings()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert after == before


@contextmanager
def fault(rank: int | str, where: str, what: str) -> Iterator[None]:
    """Ranks that are started within it go wrong as ``worker_faults/sitecustomize.py`` says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        patch.setenv("NANOVLLM_TEST_FAULT", f"{rank} {where} {what}")
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("parallel"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for temporary files that nobody else uses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def used_once(checkpoint: Path) -> None:
    """What a process keeps from its first group on (threads, files) is not what an engine leaves behind."""
    with open_llm(checkpoint) as llm:
        tokens_of(llm)


@needs_ranks
class TestAnswers:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("size", "changes"),
        [
            (4, {}),
            (2, {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 300}),
            (4, {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 48, "vocab_size": 97}),
            (2, {"head_dim": 80, "attention_bias": True, "tie_word_embeddings": False, "vocab_size": 509}),
            (3, {"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 1}),
        ],
        ids=str,
    )
    def test_are_those_of_transformers_and_of_one_rank(self, tmp_path: Path, size: int, changes: dict) -> None:
        path = write_checkpoint(tmp_path, **changes)
        reference = load_reference(path)
        expected = [[reference_greedy(reference, prompt, 10)] for prompt in PROMPTS]
        seeded = [SamplingParams(temperature=1.0, seed=n, max_tokens=12, ignore_eos=True) for n in range(len(PROMPTS))]
        with open_llm(path, 1) as llm:
            drawn = tokens_of(llm, seeded)
        limits = [{}, {"num_kvcache_blocks": 6, "max_num_batched_tokens": 16, "max_num_seqs": 3, "max_model_len": 64}]
        for options in limits:  # roomy; with preemptions and prompts in pieces
            with open_llm(path, size, **options) as llm:
                assert tokens_of(llm) == expected
                assert tokens_of(llm) == expected  # the prompts' beginnings are cached now
                assert tokens_of(llm, seeded) == drawn
                llm.engine.scheduler.block_manager.check_integrity([])

    def test_every_kind_of_request(self, checkpoint: Path) -> None:
        called: list[int] = []

        def fail(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            raise ValueError("made to fail")

        params = kinds.every_kind(max_tokens=10, n=3, called=called)
        with open_llm(checkpoint, 1) as llm:
            expected = llm.generate(PROMPTS, params, use_tqdm=False)
        calls = len(called)
        with open_llm(checkpoint) as llm:
            found = llm.generate(PROMPTS, params, use_tqdm=False)
            [failed] = llm.generate(
                [PROMPTS[1]], SamplingParams(logits_processors=[fail]), use_tqdm=False, on_error="return"
            )
            assert tokens_of(llm, params)[0] == [c.token_ids for c in expected[0].outputs]
        assert "made to fail" in str(failed)
        assert [[c.token_ids for c in out.outputs] for out in found] == [
            [c.token_ids for c in o.outputs] for o in expected
        ]
        assert calls == 10
        for one, other in ((found[2], expected[2]), (found[5], expected[5])):
            for mine, theirs in zip(one.outputs[0].logprobs or [], other.outputs[0].logprobs or [], strict=True):
                assert {t: pytest.approx(p.logprob, abs=1e-4) for t, p in theirs.items()} == {
                    t: p.logprob for t, p in mine.items()
                }
        assert found[5].prompt_logprobs is not None

    def test_what_a_processor_may_do(self, checkpoint: Path) -> None:
        """It runs in another thread than the caller's, which holds the engine meanwhile."""
        with open_llm(checkpoint) as llm:
            found: list[Any] = []

            def look(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
                found.append(llm.get_metrics()["running_requests"])
                with pytest.raises(RuntimeError, match="from inside one of its own steps"):
                    llm.generate([[1]], GREEDY)
                llm.abort("mine")
                return logits

            params = SamplingParams(max_tokens=20, ignore_eos=True, logits_processors=[look])
            llm.engine.add_request({"prompt_token_ids": [3, 4]}, params, request_id="mine")
            outputs: list[Any] = []
            while llm.engine.has_unfinished_requests:
                outputs += llm.engine.step()
            assert found == [1]
            assert outputs[0].outputs[0].finish_reason == "abort"
            assert len(tokens_of(llm)) == len(PROMPTS)

    def test_a_processor_that_ends_the_program_ends_the_engine(self, checkpoint: Path) -> None:
        def leave(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            raise SystemExit(3)

        with open_llm(checkpoint) as llm:
            with pytest.raises(SystemExit):
                llm.generate([[3]], SamplingParams(logits_processors=[leave]), use_tqdm=False)
            with pytest.raises(EngineDeadError, match="a step was cut short by SystemExit"):
                tokens_of(llm)

    def test_through_gloo(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What Arm and macOS take."""
        with open_llm(checkpoint, 1) as llm:
            expected = tokens_of(llm)
        monkeypatch.setattr(rank_group, "why_not_shared_memory", lambda: "for a test")
        with fault("any", "-", "gloo"), open_llm(checkpoint, 4) as llm:
            assert tokens_of(llm) == expected
        dead = pytest.raises(EngineDeadError, match="was ended by signal 9")
        with fault("any", "execute:4", "gloo+kill"), open_llm(checkpoint) as llm, dead:
            tokens_of(llm)

    def test_two_engines_side_by_side_and_one_after_the_other(self, checkpoint: Path) -> None:
        with open_llm(checkpoint) as first, open_llm(checkpoint) as second:
            assert tokens_of(first) == tokens_of(second) == tokens_of(first)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["bfloat16"])
    @pytest.mark.parametrize("quantization", [None, "int8"])
    def test_the_demo_checkpoint_knows_its_answers(self, dtype: str, quantization: str | None) -> None:
        from nanovllm.demo import DEMO_MODEL_PATH

        with LLM(DEMO_MODEL_PATH, dtype=dtype, device="cpu", quantization=quantization, tensor_parallel_size=2) as llm:
            questions = [[{"role": "user", "content": f"add {a} and {b}"}] for a, b in ((12, 30), (5, 7), (40, 9))]
            answers = [out["text"] for out in llm.chat(questions, SamplingParams(temperature=0), use_tqdm=False)]
        assert all(str(total) in answer for total, answer in zip((42, 12, 49), answers, strict=True))


class TestMessages:
    ENTRIES = st.builds(
        lambda slot, count, special: SlotEntry(
            slot,
            array("i", range(count)),
            list(range(count // 16 + 1)),
            SamplingParams(temperature=0.7, top_k=5 if special else 0),
            noise_key=2**63 + slot,
            num_prompt_tokens=count,
        ),
        st.integers(0, 9),
        st.integers(1, 50),
        st.booleans(),
    )

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(data=st.data())
    def test_any_plan_arrives_as_it_was_sent(self, data: st.DataObject) -> None:
        row = st.tuples(st.integers(0, 9), st.integers(0, 4000), st.integers(1, 600), st.booleans())
        rows = data.draw(st.lists(row, max_size=5, unique_by=lambda r: r[0]))
        columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
        released = data.draw(st.lists(st.integers(0, 9), unique=True, max_size=3))
        entered = data.draw(st.lists(self.ENTRIES, max_size=2))
        blocks = data.draw(st.lists(st.tuples(*[st.integers(0, 2**31 - 1)] * 3), max_size=4))
        plan = StepPlan(released, entered, blocks, *columns, num_prefill_tokens=data.draw(st.integers(0, 600)))
        found = pickle.loads(message_of(plan))
        assert plan.entered is entered, "rank 0 still has its own"
        assert replace(found, entered=[]) == replace(plan, entered=[])
        for mine, theirs in zip(found.entered, entered, strict=True):
            assert list(mine.token_ids) == list(theirs.token_ids)
            assert (mine.slot, mine.block_ids, mine.noise_key) == (theirs.slot, theirs.block_ids, theirs.noise_key)
            assert mine.special == (theirs.params.top_k > 0)

    def test_what_cannot_be_pickled_stays_with_rank_0(self) -> None:
        params = SamplingParams(temperature=0.5, logits_processors=[lambda ids, logits: logits])
        entry = SlotEntry(3, array("i", [1, 2]), [0], params, noise_key=1, bad_words=((5, 6),), stop_token_ids=(7,))
        [found] = pickle.loads(message_of(StepPlan(entered=[entry]))).entered
        assert (found.special, found.params.temperature, found.params.logits_processors) == (True, 1.0, ())
        assert (found.bad_words, found.stop_token_ids) == ((), ())
        assert entry.params is params

    def test_a_decode_step_of_256_rows_takes_a_few_kilobytes_and_no_time(self) -> None:
        rows, seconds = 256, []
        for step in range(200):
            starts = [30_000 + 17 * row + step for row in range(rows)]
            blocks = [(row, start // 16, start) for row, start in enumerate(starts) if start % 16 == 0]
            plan = StepPlan([], [], blocks, list(range(rows)), starts, [1] * rows, [True] * rows)
            begun = time.perf_counter()
            message = message_of(plan)
            seconds.append(time.perf_counter() - begun)
            assert len(message) < 4096
            assert pickle.loads(message) == plan
        assert sorted(seconds)[len(seconds) // 2] < 5e-4  # 0.01 ms on its own; others may be at work here

    @needs_ranks
    def test_a_message_of_any_size(self, checkpoint: Path) -> None:
        """More than a socket's buffer holds at once: 300 prompts that enter in one step."""
        prompts = [[3 + (n * 7 + i) % 200 for i in range(250)] for n in range(300)]
        params = SamplingParams(temperature=0, max_tokens=1)
        options = {"max_num_batched_tokens": 100_000, "max_num_seqs": 300, "num_kvcache_blocks": 6000}
        with open_llm(checkpoint, 1, **options) as one, open_llm(checkpoint, **options) as two:
            two.engine.scheduler.max_num_batched_tokens = 100_000
            assert tokens_of(two, params, prompts) == tokens_of(one, params, prompts)


@needs_ranks
@pytest.mark.usefixtures("used_once", "temporary")
class TestEnds:
    """Whatever happens to a rank, whenever: an error that says so, soon, and nothing left."""

    def test_closing_leaves_nothing_and_may_be_done_twice(self, checkpoint: Path) -> None:
        with nothing_left():
            llm = open_llm(checkpoint, 4)
            engine = llm.engine
            tokens_of(llm)
            llm.close()
            llm.close()
            engine.close()

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
    def test_closing_does_not_mind_a_rank_that_has_ended_or_hangs(self, checkpoint: Path, how: signal.Signals) -> None:
        with nothing_left(), open_llm(checkpoint, 4) as llm:
            tokens_of(llm)
            llm.engine.runner.workers.processes[0].send_signal(how)

    def test_an_engine_that_is_let_go_takes_its_ranks_along(self, checkpoint: Path) -> None:
        with nothing_left():
            llm = open_llm(checkpoint)
            tokens_of(llm)
            del llm

    @pytest.mark.parametrize("what", ["raise", "kill"])
    @pytest.mark.parametrize("where", ["import", "_load", "_size_kv_cache", "execute:1", "execute:4"])
    def test_a_rank_that_fails(self, checkpoint: Path, where: str, what: str) -> None:
        with nothing_left(), fault(1, where, what):
            with pytest.raises(EngineDeadError) as caught, open_llm(checkpoint) as llm:
                tokens_of(llm)
            wanted = "RuntimeError: made to fail" if what == "raise" else "rank 1 was ended by signal 9"
            assert wanted in str(caught.value)
        if where == "execute:4":
            with open_llm(checkpoint) as llm:  # the next one starts at once
                assert len(tokens_of(llm)) == len(PROMPTS)

    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_a_rank_whose_device_is_full(
        self, checkpoint: Path, rank: int, used_once: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All others have loaded by then, and are about to sum with it."""

        def no_memory(*arguments: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        if rank == 0:
            monkeypatch.setattr(model_runner, "BatchState", no_memory)
        started = time.monotonic()
        told = "no room for the tables of 5 sequences .*lower num_kvcache_blocks=40, max_num_seqs=5 or max_model_len=64"
        with nothing_left(), fault(rank, "BatchState", "fill"):
            with pytest.raises(ValueError if rank == 0 else EngineDeadError, match=told) as caught:
                open_llm(checkpoint, 4 if rank == 2 else 2, max_num_seqs=5, max_model_len=64)
            if rank:
                assert f"tensor-parallel rank {rank} failed" in str(caught.value)
        assert time.monotonic() - started < 60

    @pytest.mark.parametrize("what", ["hang", "stop"])
    def test_a_rank_that_hangs_in_a_step(self, checkpoint: Path, what: str) -> None:
        with nothing_left(), fault(1, "execute:3", what), open_llm(checkpoint, tensor_parallel_timeout=2) as llm:
            started = time.monotonic()
            with pytest.raises(EngineDeadError, match=r"rank 0 failed: .*(?i:timed out|timeout)"):
                tokens_of(llm)
            assert time.monotonic() - started < 2 + SOON
            with pytest.raises(EngineDeadError, match="make a new one"):  # and ever after
                tokens_of(llm)

    def test_an_engine_that_is_kept_keeps_no_process(self, checkpoint: Path) -> None:
        with fault(2, "execute:3", "kill"):
            before = belongings()["processes"]
            llm = open_llm(checkpoint, 4)
            with pytest.raises(EngineDeadError, match="rank 2 was ended by signal 9"):
                tokens_of(llm)
            assert belongings()["processes"] == before
            llm.close()

    def test_a_stopped_rank_and_a_message_that_it_does_not_take(self, checkpoint: Path) -> None:
        prompts = [[3 + (n * 7 + i) % 200 for i in range(500)] for n in range(400)]
        with nothing_left(), open_llm(checkpoint, tensor_parallel_timeout=2, num_kvcache_blocks=4000) as llm:
            llm.engine.scheduler.max_num_batched_tokens = 10**6
            llm.engine.runner.workers.processes[0].send_signal(signal.SIGSTOP)
            started = time.monotonic()
            with pytest.raises(EngineDeadError, match="timed out"):
                tokens_of(llm, prompts=prompts)
            assert time.monotonic() - started < 2 + SOON

    def test_a_slow_processor_is_no_rank_that_hangs(self, checkpoint: Path) -> None:
        def slow(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            time.sleep(1.5)
            return logits

        with open_llm(checkpoint, tensor_parallel_timeout=1) as llm:
            params = SamplingParams(max_tokens=2, ignore_eos=True, logits_processors=[slow])
            assert [len(tokens) for [tokens] in tokens_of(llm, params, [[3]])] == [2]

    def test_an_interrupt_between_two_instructions_of_a_wait(self, checkpoint: Path) -> None:
        """Wherever it comes while a step is waited for, the next call works."""
        with open_llm(checkpoint) as llm:
            expected = tokens_of(llm)
            for wanted in range(1, 40, 6):
                seen: list[None] = []

                def interrupt(frame: Any, event: str, argument: Any, wanted: int = wanted, seen: Any = seen) -> None:
                    if frame.f_code.co_filename.endswith("workers.py"):
                        seen.append(None)
                        if len(seen) == wanted:
                            sys.setprofile(None)
                            os.kill(os.getpid(), signal.SIGINT)

                try:
                    sys.setprofile(interrupt)
                    tokens_of(llm)
                except KeyboardInterrupt:
                    pass
                finally:
                    sys.setprofile(None)
                assert tokens_of(llm) == expected

    @staticmethod
    def close_slowly(llm: LLM) -> None:
        llm.close()
        time.sleep(5)  # should the interrupt come late

    def test_closing_is_interrupted_and_done_again_in_another_thread(self, checkpoint: Path) -> None:
        with nothing_left():
            llm = open_llm(checkpoint)
            runner = llm.engine.runner
            runner.workers.processes[0].send_signal(signal.SIGSTOP)  # which takes closing a while
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                self.close_slowly(llm)
            closer = threading.Thread(target=llm.close)
            closer.start()
            closer.join()
            assert not hasattr(runner.runner, "model")

    def test_a_forked_process_leaves_the_engine_to_its_parent(self, checkpoint: Path) -> None:
        with open_llm(checkpoint) as llm:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    tokens_of(llm)
                except RuntimeError as error:
                    code = 0 if "was forked from" in str(error) else 2
                llm.engine.runner.workers._finalizer()
                os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
            assert len(tokens_of(llm)) == len(PROMPTS)

    def test_the_end_of_an_idle_rank_is_heard_at_the_next_call(self, checkpoint: Path) -> None:
        with nothing_left(), open_llm(checkpoint, 4) as llm:
            tokens_of(llm)
            llm.engine.runner.workers.processes[1].kill()
            time.sleep(0.2)
            with pytest.raises(EngineDeadError, match="rank 2 was ended by signal 9"):
                tokens_of(llm)

    def test_every_call_that_goes_on_hears_of_a_ranks_end(self, checkpoint: Path) -> None:
        """Not only the one whose thread runs the step."""
        heard: list[BaseException] = []

        def call(llm: LLM) -> None:
            try:
                tokens_of(llm, replace(GREEDY, max_tokens=400), PROMPTS[:1])
            except RuntimeError as error:
                heard.append(error)

        with open_llm(checkpoint) as llm:
            by_hand = llm.engine.add_request(PROMPTS[0], replace(GREEDY, max_tokens=400))
            threads = [threading.Thread(target=call, args=(llm,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            while llm.engine.num_unfinished_requests < 4 and not heard:
                time.sleep(0.001)
            llm.engine.runner.workers.processes[0].kill()
            for thread in threads:
                thread.join()
            assert [type(error) for error in heard] == [EngineDeadError] * 3
            assert all("rank 1 was ended by signal 9" in str(error) for error in heard)
            with pytest.raises(EngineDeadError, match=f"dropped by another call that failed: {by_hand}.*rank 1"):
                llm.engine.step()

    @pytest.mark.parametrize("number", range(KILLS))
    def test_a_rank_killed_at_any_moment(self, checkpoint: Path, number: int) -> None:
        """From its start to its end."""
        draw = random.Random(number)
        size, moment = draw.choice([2, 2, 4]), draw.uniform(0, 3.0)
        with nothing_left():
            children = set(psutil.Process().children())
            killed_at: list[float] = []

            def kill() -> None:
                time.sleep(moment)
                while not (ranks := [one for one in psutil.Process().children() if one not in children]):
                    time.sleep(0.01)
                draw.choice(ranks).kill()
                killed_at.append(time.monotonic())

            killer = threading.Thread(target=kill)
            killer.start()
            try:
                with open_llm(checkpoint, size) as llm:
                    while True:
                        tokens_of(llm)
            except EngineDeadError as error:
                heard_at, message = time.monotonic(), str(error)
            finally:
                killer.join()
            assert heard_at - killed_at[0] < SOON
            assert "was ended by signal 9" in message

    def test_a_request_that_cannot_be_served_ends_no_rank(self, checkpoint: Path) -> None:
        with open_llm(checkpoint) as llm:
            with pytest.raises(ValueError, match="token"):
                llm.generate([[5] * 5000], GREEDY, use_tqdm=False)
            assert len(tokens_of(llm)) == len(PROMPTS)

    def test_ranks_agree_on_the_fewest_blocks(self, checkpoint: Path) -> None:
        with open_llm(checkpoint, num_kvcache_blocks=40) as llm:
            assert llm.get_metrics()["num_kvcache_blocks"] == 40
        with fault(1, "_size_kv_cache", "halve"), open_llm(checkpoint, num_kvcache_blocks=40) as llm:
            assert llm.get_metrics()["num_kvcache_blocks"] == 20
            assert len(tokens_of(llm)) == len(PROMPTS)

    def test_ranks_of_different_versions_are_named(self, checkpoint: Path) -> None:
        different = pytest.raises(EngineDeadError, match=r"this rank runs .*0\.1.* they must be the same")
        with nothing_left(), fault(1, "-", "older"), different:
            open_llm(checkpoint)

    @pytest.mark.parametrize("size", [3, 5, 16])
    def test_a_number_of_ranks_that_does_not_divide_the_heads(self, checkpoint: Path, size: int) -> None:
        with pytest.raises(ValueError, match=f"tensor_parallel_size is {size}.* use one of 1, 2, 4, 8"):
            open_llm(checkpoint, size)

    def test_a_checkpoint_that_cannot_be_read_is_refused_as_by_one_rank(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = write_checkpoint(tmp_path_factory.mktemp("broken"))
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with nothing_left(), pytest.raises(ValueError, match=r"model\.safetensors"):
            open_llm(path)
        file.unlink()
        with nothing_left(), pytest.raises(FileNotFoundError, match=r"no \*\.safetensors file"):
            open_llm(path)


@needs_ranks
class TestPrograms:
    """Where it is used: a script without a guard, one that is interrupted, one that is killed."""

    @staticmethod
    def script(tmp_path: Path, checkpoint: Path, text: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(
            "from nanovllm import LLM, SamplingParams\n"
            f"llm = LLM({str(checkpoint)!r}, device='cpu', dtype='float32', skip_tokenizer_init=True, "
            "num_kvcache_blocks=40, tensor_parallel_size=2)\n" + textwrap.dedent(text)
        )
        return path

    def test_a_script_needs_no_guard(self, tmp_path: Path, checkpoint: Path) -> None:
        text = """
            params = SamplingParams(max_tokens=3, ignore_eos=True)
            print(llm.generate([[3, 4]], params, use_tqdm=False)[0]["token_ids"])
        """
        path = self.script(tmp_path, checkpoint, text)
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("[") == 1
        assert done.stderr == ""

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_its_end_is_its_ranks_end(self, tmp_path: Path, checkpoint: Path, how: signal.Signals) -> None:
        text = """
            print("up", flush=True)
            while True:
                llm.generate([[3, 4]] * 4, SamplingParams(max_tokens=300, ignore_eos=True), use_tqdm=False)
        """
        path = self.script(tmp_path, checkpoint, text)
        process = subprocess.Popen(
            [sys.executable, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) == 1
        os.killpg(process.pid, how)  # as the terminal does: all of its group
        _, errors = process.communicate(timeout=30)
        _, alive = psutil.wait_procs(ranks, timeout=SOON)
        assert not alive
        if how == signal.SIGINT:
            assert errors.count("Traceback (most recent call last)") == 1
            assert errors.rstrip().endswith("KeyboardInterrupt")

    @pytest.mark.parametrize("closed", [(0,), (2,), (0, 1, 2)])
    def test_standard_files_that_are_closed(self, tmp_path: Path, checkpoint: Path, closed: tuple[int, ...]) -> None:
        text = f"""
            import os
            params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            found = []
            for _ in range(2):
                found.append(llm.generate([[3, 4]], params, use_tqdm=False)[0]["token_ids"])
                for number in (1, 2):
                    try:
                        os.write(number, b"what others write there " * 9)
                    except OSError:
                        pass
            open({str(tmp_path / "out")!r}, "w").write("same" if found[0] == found[1] else "different")
        """
        path = self.script(tmp_path, checkpoint, text)
        redirections = " ".join(f"{number}>&-" if number else "<&-" for number in closed)
        subprocess.run(
            f"{sys.executable} {path} {redirections}", shell=True, timeout=60, check=True, capture_output=True
        )
        assert (tmp_path / "out").read_text() == "same"

    @pytest.mark.parametrize("moment", [0.0, 0.3, 1.0])
    def test_killed_while_it_starts(self, tmp_path: Path, checkpoint: Path, moment: float) -> None:
        path = self.script(tmp_path, checkpoint, "")
        environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
        (tmp_path / "temporary").mkdir()
        process = subprocess.Popen([sys.executable, str(path)], env=environment)
        while not list((tmp_path / "temporary").glob("nanovllm-*")) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moment)
        ranks = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.wait()
        assert not psutil.wait_procs(ranks, timeout=SOON)[1]
        assert not ranks or not list((tmp_path / "temporary").glob("nanovllm-*"))

    def test_ctrl_c_leaves_an_engine_that_works(self, tmp_path: Path, checkpoint: Path) -> None:
        text = """
            import os, signal, threading, time
            params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            expected = [out["token_ids"] for out in llm.generate([[3, 4], [5]], params, use_tqdm=False)]
            for moment in range(8):
                threading.Timer(0.01 + 0.019 * moment, os.kill, (os.getpid(), signal.SIGINT)).start()
                try:
                    while True:
                        llm.generate([[3, 4], [5, 6, 7]] * 3, params, use_tqdm=False)
                except KeyboardInterrupt:
                    pass
                found = [out["token_ids"] for out in llm.generate([[3, 4], [5]], params, use_tqdm=False)]
                assert found == expected, moment
            print("fine")
        """
        path = self.script(tmp_path, checkpoint, text)
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=90, check=False)
        assert done.stdout == "fine\n", done.stderr
