"""Kernels that start before the one before them has ended read nothing that is still being written."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.kernels import is_interpreted

pytest.importorskip("triton", reason="the package triton is not installed")
if torch.cuda.is_available() or not is_interpreted():
    pytest.skip("this is worked out in triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

from nanovllm.kernels.dependent_launch import (
    SINCE_TRITON_3_5,
    launch_options,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from tests.early_starts import Recorder, recorded
from tests.test_cuda_graphs import PROMPTS, all_kernels, open_captured
from tests.threads import one_thread  # noqa: F401

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@triton.jit
def _add_one(x, out, WAITS: tl.constexpr, READS_EARLY: tl.constexpr, OVERLAPS: tl.constexpr):
    let_next_kernel_start(OVERLAPS)
    if READS_EARLY:
        value = tl.load(x)
    if WAITS:
        wait_for_previous_kernel(OVERLAPS)
    if not READS_EARLY:
        value = tl.load(x)
    tl.store(out, value + 1)


def add_one(x: torch.Tensor, out: torch.Tensor, waits: bool = True, reads_early: bool = False) -> None:
    options = launch_options(x.device)
    _add_one[(1,)](x, out, WAITS=waits, READS_EARLY=reads_early, **options)


def problems_of_adding(*calls: tuple[int, int, dict[str, bool]]) -> list[str]:
    """Of adding one to number ``source`` for number ``target``, again and again."""
    numbers = torch.zeros(4, 8)
    with recorded(sys.modules[__name__]) as recorder:
        for source, target, how in calls:
            add_one(numbers[source], numbers[target], **how)
    return recorder.problems()


class TestWhatIsNoticed:
    def test_nothing_where_all_wait(self) -> None:
        assert problems_of_adding((0, 1, {}), (1, 2, {}), (2, 3, {})) == []

    def test_reading_early_what_nobody_writes(self) -> None:
        assert problems_of_adding((0, 1, {}), (3, 2, {"reads_early": True})) == []

    @pytest.mark.parametrize("between", [0, 1, 2])
    def test_reading_early_what_one_before_writes(self, between: int) -> None:
        """However long before: each may have started early, and its wait is still ahead of it."""
        calls = [(0, 1, {}), *[(3, 2, {})] * between, (1, 3, {"reads_early": True})]
        assert problems_of_adding(*calls) == ["_add_one reads what _add_one writes before it waits for it"]

    def test_writing_and_not_waiting(self) -> None:
        found = problems_of_adding((0, 1, {"waits": False}))
        assert found[0] == "_add_one writes before it waits"
        assert found[1].startswith("no program of _add_one waits")


def run_engine(checkpoint: Path, prompts: list[list[int]], describes: bool = False) -> Recorder:
    """Prompts, then decode steps launched one by one and captured ones; tiles come whole if ``describes``."""
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        all_kernels(monkeypatch),
        recorded(describes=describes) as recorder,
        open_captured(checkpoint, max_num_seqs=len(prompts)) as llm,
    ):
        llm.generate(prompts, GREEDY, use_tqdm=False)
        llm.engine.runner.graphs = None
        llm.generate(prompts, GREEDY, use_tqdm=False)
    return recorder


@pytest.fixture(scope="module")
def few_rows(tiny_checkpoint: Path) -> Recorder:
    return run_engine(tiny_checkpoint, PROMPTS[-2:])


def early_names(recorder: Recorder) -> set[str]:
    return {launch.kernel for launch in recorder.launches if launch.is_early}


@pytest.mark.slow
def test_no_step_of_few_rows_reads_what_is_being_written(few_rows: Recorder) -> None:
    assert few_rows.problems() == []
    assert {"_decode_few_rows_kernel", "_fused_linear_kernel", "_draw_kernel"} <= early_names(few_rows)
    ahead = [one for one in few_rows.launches if one.kernel in ("_decode_few_rows_kernel", "_fused_linear_kernel")]
    assert all(launch.read_early for launch in ahead)  # to be early is of some use


@pytest.mark.slow
@pytest.mark.skipif(not SINCE_TRITON_3_5, reason="no earlier Triton is asked for descriptors")
def test_nor_does_one_whose_weights_are_copied_by_tiles(tiny_checkpoint: Path, few_rows: Recorder) -> None:
    described = run_engine(tiny_checkpoint, PROMPTS[-2:], describes=True)
    assert described.problems() == []
    assert len(described.launches) == len(few_rows.launches)
    assert not any(launch.describes for launch in few_rows.launches)
    assert all(launch.describes for launch in described.launches if launch.kernel == "_fused_linear_kernel")


@pytest.mark.slow
def test_no_step_of_more_rows_reads_what_is_being_written(tiny_checkpoint: Path) -> None:
    recorder = run_engine(tiny_checkpoint, PROMPTS)
    assert recorder.problems() == []
    assert {"_decode_kernel", "_rms_norm_kernel", "_qk_norm_rope_store_kernel"} <= early_names(recorder)


@pytest.mark.slow
def test_a_plan_that_let_attention_start_is_noticed(few_rows: Recorder) -> None:
    """Attention of few rows reads the plan before it waits: on a GPU it then took what was there for addresses."""
    altered = Recorder()
    for launch in few_rows.launches:
        plans = launch.kernel == "_plan_kernel"
        altered.launches.append(replace(launch, is_early=True, lets_next_start=True, waits=True) if plans else launch)
    assert "_decode_few_rows_kernel reads what _plan_kernel writes before it waits for it" in altered.problems()
