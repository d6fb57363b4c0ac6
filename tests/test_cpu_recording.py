"""Decode steps on the CPU, recorded and replayed: the same tokens, whatever happens meanwhile."""

import _thread
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_leaves

from nanovllm import LLM, SamplingParams, kernels
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.layers import product

if (reason := kernels.why_no_cpu_kernels()) is not None:
    pytest.skip(reason, allow_module_level=True)

from nanovllm.engine.recorded_steps import RecordedSteps
from nanovllm.kernels.cpu import launch, paged_attention, recording
from nanovllm.kernels.cpu.rms_norm import rms_norm
from nanovllm.kernels.cpu.silu_and_mul import silu_and_mul
from tests.threads import one_thread, threads  # noqa: F401

Answers = list[tuple[list[int], Any]]  # of each completion, its tokens and their log-probabilities


@pytest.fixture(autouse=True)
def products_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere bfloat16 may be oneDNN's, which cannot be recorded. The kernel works on every processor."""
    monkeypatch.setattr(product, "has_fast_tiles", lambda: True)


def make_llm(**changes: Any) -> LLM:
    arguments = {"dtype": "bfloat16", "device": "cpu", "skip_tokenizer_init": True, "max_model_len": 256}
    return LLM(DEMO_MODEL_PATH, **{**arguments, "num_kvcache_blocks": 200, "max_num_seqs": 12, **changes})


@pytest.fixture(scope="module")
def eager() -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "has_fast_tiles", lambda: True)
        llm = make_llm(enforce_eager=True)
    assert llm.engine.runner.recorded is None
    yield llm
    llm.close()


@pytest.fixture
def llm() -> Iterator[LLM]:
    with make_llm() as made:
        yield made


def steps_of(llm: LLM) -> RecordedSteps:
    recorded = llm.engine.runner.recorded
    assert recorded is not None
    return recorded


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def params(max_tokens: int = 12, **changes: Any) -> SamplingParams:
    """Greedy; the log-probabilities tell logits apart that give the same tokens."""
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 1, **changes})


def answers(outputs: list[Any]) -> Answers:
    return [
        (completion.token_ids, [{token: one.logprob for token, one in place.items()} for place in completion.logprobs])
        for output in outputs
        for completion in output.outputs
    ]


def generate(llm: LLM, prompts: list[list[int]], wanted: Any = None) -> Answers:
    return answers(llm.generate(prompts, wanted or params(), use_tqdm=False))


def assert_usual() -> None:
    """Launches of this thread run, and so do torch's operators."""
    assert launch.recorder_of_thread.current is None
    x = torch.ones(2, 4)
    torch.testing.assert_close(silu_and_mul(x), torch.nn.functional.silu(x[:, :2]) * x[:, 2:])


# Workloads: each is run by an engine that records and by one that does not.


def greedy(llm: LLM) -> Answers:
    return generate(llm, [prompt(length, length) for length in (1, 5, 16, 40, 130)])


def seeded(llm: LLM) -> Answers:
    wanted = [params(temperature=0.9, seed=7, n=2), params(temperature=1.3, seed=8, top_k=20, top_p=0.9)]
    return generate(llm, [prompt(9), prompt(20, 1)], wanted)


def shared_prefixes(llm: LLM) -> Answers:
    """Some share 5 blocks, two of these 9; the second time all of it is cached."""
    long = prompt(150)
    prompts = [long + prompt(3, 1), long + prompt(20, 2), long[:85] + prompt(30, 3), long[:90], prompt(7, 4)]
    return generate(llm, prompts) + generate(llm, prompts)


def preempted(llm: LLM) -> Answers:
    before = llm.get_metrics()["num_preemptions"]
    result = generate(llm, [prompt(30, seed) for seed in range(4)], params(60))
    assert llm.get_metrics()["num_preemptions"] > before
    return result


def shrinking_and_growing(llm: LLM) -> Answers:
    """Rows come and go at nearly every step."""
    engine, outputs = llm.engine, []
    for number in range(30):
        if number % 3 != 2:
            engine.add_request(prompt(1 + number % 5, number), params(1 + number * 7 % 15))
        outputs += engine.step()
    while engine.has_unfinished_requests:
        outputs += engine.step()
    return answers(sorted(outputs, key=lambda output: int(output.request_id)))


WORKLOADS: dict[str, tuple[Callable[[LLM], Answers], dict[str, Any]]] = {
    "greedy": (greedy, {}),
    "seeded": (seeded, {}),
    "shared prefixes": (shared_prefixes, {"kvcache_block_size": 16}),
    "preempted": (preempted, {"num_kvcache_blocks": 14, "enable_prefix_caching": False}),
    "shrinking and growing": (shrinking_and_growing, {}),
    "long blocks": (greedy, {"kvcache_block_size": 256, "num_kvcache_blocks": 20}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_recorded_steps_are_the_same_to_the_last_bit(name: str, dtype: str) -> None:
    """In float32 products are torch's, so nothing is recorded, and nobody need know."""
    workload, arguments = WORKLOADS[name]
    results = []
    for enforce_eager in (True, False):
        with make_llm(dtype=dtype, enforce_eager=enforce_eager, **arguments) as llm:
            assert llm.get_metrics()["attention_backend"] == "cpu"
            results.append(workload(llm))
            if not enforce_eager:
                steps = steps_of(llm)
                assert steps.is_possible == (dtype == "bfloat16")
                assert bool(steps.recordings) == (dtype == "bfloat16")
    assert results[0] == results[1]


def test_each_number_of_rows_is_recorded_once(llm: LLM, eager: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made, replayed = [], []
    new_recording = recording.Recording

    class Counted(new_recording):  # type: ignore[misc,valid-type]
        def __init__(self, launches: Any) -> None:
            made.append(self)
            super().__init__(launches)

        def replay(self) -> None:
            replayed.append(self)
            super().replay()

    monkeypatch.setattr(recording, "Recording", Counted)
    prompts = [prompt(4 + number, number) for number in range(4)]
    wanted = [params(5 * (number + 1)) for number in range(4)]
    for _ in range(3):
        assert generate(llm, prompts, wanted) == generate(eager, prompts, wanted)
    assert sorted(steps_of(llm).recordings) == [1, 2, 3, 4]
    assert len(made) == 4
    assert len(replayed) == 3 * 19


def test_steps_of_more_rows_than_there_is_room_for_are_launched(
    llm: LLM, eager: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_of(llm)
    steps.max_rows = 3
    prompts, wanted = [prompt(4, number) for number in range(5)], [params(4 + 3 * number) for number in range(5)]
    assert generate(llm, prompts, wanted) == generate(eager, prompts, wanted)
    assert sorted(steps.recordings) == [1, 2, 3]


def test_steps_cut_into_more_parts_than_there_is_room_for_are_launched(
    eager: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is the second chunk of keys that has no room."""
    replays = []
    replay = recording.Recording.replay
    monkeypatch.setattr(recording.Recording, "replay", lambda self: replays.append(replay(self)))
    room_for = paged_attention.Items.room_for
    monkeypatch.setattr(paged_attention.Items, "room_for", lambda lines: room_for(1))
    with threads(5), make_llm(max_num_seqs=1) as llm:
        assert generate(llm, [prompt(120)], params(20)) == generate(eager, [prompt(120)], params(20))
    assert len(replays) == 128 - 120


def test_the_number_of_threads_may_change_at_any_time(llm: LLM, eager: LLM) -> None:
    prompts = [prompt(140, 1), prompt(7, 2), prompt(30, 3)]
    for number in (1, 2, 5, 2, 1):
        with threads(number):
            assert generate(llm, prompts) == generate(eager, prompts)
            assert steps_of(llm).threads == number


def test_two_engines_in_two_threads_record_and_replay_at_once(eager: LLM) -> None:
    prompts = [[prompt(20 + number, number) for number in range(which, which + 3)] for which in range(2)]
    expected = [generate(eager, own) for own in prompts]
    engines = [make_llm(), make_llm()]
    for number in (1, 2):

        def work(which: int, number: int = number) -> list[Answers]:
            results = []
            with threads(number):  # torch keeps it by thread
                for _ in range(4):
                    steps_of(engines[which])._start_afresh()
                    results.append(generate(engines[which], prompts[which]))
            return results

        with threads(number), ThreadPoolExecutor(2) as pool:
            expected = [generate(eager, own) for own in prompts]
            for wanted, got in zip(expected, pool.map(work, range(2)), strict=True):
                assert all(one == wanted for one in got)
    assert_usual()
    for engine in engines:
        assert steps_of(engine).recordings
        engine.close()


def test_recordings_are_made_one_at_a_time() -> None:
    """torch has one note for all threads of whether a dispatch mode is active, which two would leave wrong."""
    inside, left = threading.Event(), threading.Event()

    def first(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
        if len(out) == 1:
            inside.wait(0.2)  # in vain, unless both record

    def second(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
        if len(out) == 1:
            inside.set()
            left.wait(1)

    engines = [make_llm(), make_llm()]
    for engine, hook in zip(engines, (first, second), strict=True):
        engine.engine.runner.model.model.layers[0].mlp.register_forward_hook(hook)
    with ThreadPoolExecutor(2) as pool:
        one, other = (pool.submit(generate, engine, [prompt(5)], params(2)) for engine in engines)
        one.add_done_callback(lambda _: left.set())
        assert one.result() == other.result()
    assert not getattr(_python_dispatch, "_is_in_torch_dispatch_mode", False)
    for engine in engines:
        assert steps_of(engine).recordings
        engine.close()


@pytest.mark.parametrize(
    "operation", [torch.clone, lambda x: x.add_(0), lambda x: x + 0, lambda x: x * float(x.sum() != 0)]
)
def test_a_model_that_does_something_else_is_run_as_before(
    operation: Callable[[torch.Tensor], torch.Tensor], llm: LLM, eager: LLM
) -> None:
    """Also if that is found only after some of it has been recorded."""
    prompts = [prompt(9), prompt(3, 1)]
    generate(llm, prompts)
    assert sorted(steps_of(llm).recordings) == [2]
    hook = llm.engine.runner.model.model.layers[-1].mlp.register_forward_hook(lambda _m, _x, out: operation(out))
    assert generate(llm, [*prompts, prompt(5, 2)]) == generate(eager, [*prompts, prompt(5, 2)])
    assert not steps_of(llm).is_possible
    hook.remove()
    assert generate(llm, prompts) == generate(eager, prompts)
    assert_usual()


def test_replays_without_openmp_are_the_same(llm: LLM, eager: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of Python's."""
    prompts = [prompt(140, 1), prompt(7, 2), prompt(30, 3)]
    with threads(5):
        expected = generate(eager, prompts)
        monkeypatch.setattr(launch, "_fork", lambda: launch._fork_python_threads)
        assert generate(llm, prompts) == expected
        assert generate(eager, prompts) == expected
    assert sorted(steps_of(llm).recordings) == [3]


@pytest.mark.parametrize("seconds", [0.0, 0.003])
def test_a_replay_waits_for_no_thread_that_has_nothing_to_do(
    llm: LLM, eager: LLM, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Some come when others have done everything, or in the middle of it: the processor was somebody else's."""

    def fork_late(kernel: int, arguments: int, number: int) -> None:
        def come_late() -> None:
            time.sleep(seconds * random.random())
            launch._call(kernel, arguments)

        others = [threading.Thread(target=come_late) for _ in range(number - 1)] if seconds else []
        for other in others:
            other.start()
        launch._call(kernel, arguments)
        for other in others:
            other.join()
        if not others:
            for _ in range(number - 1):
                launch._call(kernel, arguments)

    prompts = [prompt(140, 1), prompt(7, 2), prompt(30, 3)]
    with threads(5):
        expected = generate(eager, prompts)
        monkeypatch.setattr(launch, "_fork", lambda: fork_late)
        assert generate(llm, prompts) == expected
    assert sorted(steps_of(llm).recordings) == [3]


# Failures and interrupts


def test_a_failure_while_recording_leaves_everything_as_usual(llm: LLM, eager: LLM) -> None:
    prompts = [prompt(9), prompt(3, 1)]

    def fail(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
        if len(out) == 2:  # not in the prompts' step
            raise OSError("no luck")

    hook = llm.engine.runner.model.model.layers[2].mlp.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no luck"):
            generate(llm, prompts)
        assert_usual()
    hook.remove()
    assert generate(llm, prompts) == generate(eager, prompts)
    assert sorted(steps_of(llm).recordings) == [2]


FILES = ("recorded_steps.py", "recording.py", "launch.py", "attention/cpu.py", "cpu_items.py", "_python_dispatch.py")


def run_traced(action: Callable[[], object], at_line: Callable[[str], None]) -> None:
    """Run ``action``, and call ``at_line`` before each line of recordings, torch's dispatch included."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(FILES):
            return None if "nanovllm" not in frame.f_code.co_filename else trace
        if event == "line":
            at_line(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)


def test_an_interrupt_at_any_line_of_a_recording_leaves_everything_as_usual(llm: LLM, eager: LLM) -> None:
    """Begun afresh, because the number of threads has changed."""
    prompts, steps = [prompt(1), prompt(1, 1)], steps_of(llm)
    expected = generate(eager, prompts, params(2))

    def record() -> None:
        with threads(2 if steps.threads == 1 else 1):
            generate(llm, prompts, params(2))

    places: list[str] = []
    run_traced(record, places.append)
    num_interrupts = 0
    for place in dict.fromkeys(places):
        remaining = [place]

        def raise_there(at: str, remaining: list[str] = remaining) -> None:
            if at in remaining:
                remaining.clear()
                raise KeyboardInterrupt(at)

        try:
            run_traced(record, raise_there)
        except KeyboardInterrupt:
            num_interrupts += 1
        assert_usual()
        with threads(2 if num_interrupts % 2 else 1):
            assert generate(llm, prompts, params(2)) == expected, place
            assert len(steps.step.workspace.tiles) == steps.threads == torch.get_num_threads()
        assert steps.is_possible
    assert num_interrupts > 60


def test_ctrl_c_at_any_moment_leaves_everything_as_usual(llm: LLM, eager: LLM) -> None:
    """As it comes: between two instructions of the main thread's, wherever that is."""
    prompts = [prompt(9), prompt(3, 1)]
    expected, draw = generate(eager, prompts), random.Random(0)
    num_interrupts = 0
    for _ in range(20):
        timer = threading.Timer(draw.uniform(0, 0.04), _thread.interrupt_main)
        try:
            timer.start()
            while timer.is_alive():
                steps_of(llm)._start_afresh()
                generate(llm, prompts)
            timer.join()
        except KeyboardInterrupt:
            num_interrupts += 1
        timer.join()
        assert_usual()
        assert generate(llm, prompts) == expected
    assert num_interrupts > 15


def test_an_interrupt_waits_for_threads_that_are_still_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that they write to would be freed under them. (Threads of Python's; those of OpenMP come back first.)"""
    release, entered, finished = threading.Event(), threading.Event(), threading.Event()
    main = threading.current_thread()

    def call(kernel: int, arguments: int) -> None:
        if threading.current_thread() is main:
            assert entered.wait(10)
            threading.Timer(0.2, release.set).start()
            raise KeyboardInterrupt
        entered.set()
        assert release.wait(10)
        finished.set()

    monkeypatch.setattr(launch, "_call", call)
    with pytest.raises(KeyboardInterrupt):
        launch._fork_python_threads(0, 0, 2)
    assert finished.is_set()


# Memory


def pool_buffers(pool: recording.Pool) -> int:
    """Buffers that nobody uses."""
    return sum(map(len, pool._free.values()))


def test_memory_of_the_pool_is_lent_again_once_no_view_uses_it() -> None:
    pool = recording.Pool()
    first = pool.new((3, 5), torch.bfloat16)
    address, view = first.data_ptr(), first[1:].flatten()
    assert pool.new((3, 5), torch.bfloat16).data_ptr() != address
    del first
    assert pool.new((3, 5), torch.bfloat16).data_ptr() != address
    del view
    assert pool.new((2, 7), torch.float32).data_ptr() == address, "of the same size, whatever its shape"
    assert pool.new((100, 100), torch.float32).shape == (100, 100)
    assert pool.new((0, 4), torch.float32).shape == (0, 4)


def test_layers_use_the_same_memory_and_recordings_too(llm: LLM) -> None:
    steps = steps_of(llm)
    generate(llm, [prompt(4), prompt(5)], params(3))
    gc.collect()
    launches = len(steps.recordings[2][0].kernels)
    num_layers = len(llm.engine.runner.model.model.layers)
    assert num_layers >= 4
    assert launches > 8 * num_layers
    few = pool_buffers(steps.pool)
    assert few < 2 * launches / num_layers, "as many as a layer or two need"
    for _ in range(3):
        steps.recordings.clear()
        generate(llm, [prompt(4), prompt(5)], params(3))
        assert pool_buffers(steps.pool) <= few + 1


def test_a_closed_engine_keeps_nothing(llm: LLM) -> None:
    generate(llm, [prompt(4)])
    runner = llm.engine.runner
    kept = [runner.model, runner.recorded, runner.recorded.pool, *tree_leaves(runner.attention.kv_cache())]
    refs = [weakref.ref(item) for item in kept]
    del kept
    gc.collect()
    gc.disable()  # the garbage collector must not be needed
    try:
        llm.close()
        assert [ref() for ref in refs if ref() is not None] == []
    finally:
        gc.enable()


# What is recorded


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x.clone(),
        lambda x: x.add_(1),
        lambda x: x.t().contiguous(),
        lambda x: float(x[0, 0]),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.zeros(3),
        lambda x: x.new_empty(3),
        lambda x: x.nonzero(),
    ],
)
def test_what_a_replay_would_leave_out_is_refused(operation: Callable[[torch.Tensor], Any]) -> None:
    x = torch.ones(4, 8)
    refused = pytest.raises(recording.NotRecordableError, match="is not a launch of a CPU kernel")
    with refused, recording.recorded(recording.Pool()):
        operation(x)
    assert_usual()


def test_views_are_no_operations_and_launches_read_what_is_there_when_they_are_replayed() -> None:
    x, weight = torch.randn(6, 8), torch.randn(4)
    with recording.recorded(recording.Pool()) as recorder:
        part = x[1:5].view(4, 2, 4).flatten(1).unflatten(1, (2, 4))[:, 0].t().t()
        normed, total = rms_norm(part, weight, 1e-6, part)
        out = silu_and_mul(normed)
    assert len(recorder.launches) == 2
    made = recording.Recording(recorder.launches)
    for number in (1, 3):
        with threads(number):
            x.normal_()
            made.replay()
            wanted, sums = rms_norm(part, weight, 1e-6, part)
            assert torch.equal(total, sums)
            assert torch.equal(out, silu_and_mul(wanted))


def test_tasks_of_a_kernel_may_change_and_be_none() -> None:
    x, weight = torch.randn(8, 4), torch.ones(2)
    with recording.recorded(recording.Pool()) as recorder:
        out = silu_and_mul(x)
        rms_norm(out, weight, 1e-6)
    made = recording.Recording(recorder.launches)
    kernel = recorder.launches[0][0]
    for tasks in (3, 0, 8):
        out.fill_(7)
        made.set_tasks(kernel, tasks)
        with threads(2):
            made.replay()
        assert torch.equal(out[:tasks], silu_and_mul(x)[:tasks])
        assert (out[tasks:] == 7).all()


def test_recording_does_not_import_torchs_compiler() -> None:
    """Which takes a second, and is imported at the first operator of a dispatch mode unless it declines."""
    code = """
import sys, torch
from nanovllm.kernels.cpu import recording
before, x = "torch._dynamo" in sys.modules, torch.zeros(4)
with recording.recorded(recording.Pool()):
    x.view(2, 2)
assert ("torch._dynamo" in sys.modules) == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent, check=True, timeout=120)
