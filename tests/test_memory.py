"""How much memory the KV cache may take: on a shared card, in a container, and next to what is already there."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nanovllm import LLM
from nanovllm.attention.cpu import CpuAttention
from nanovllm.attention.matmul import MatmulAttention
from nanovllm.engine import model_runner
from nanovllm.engine.batch_state import BatchState
from nanovllm.engine.kv_sizing import KVSizing
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.utils import memory
from nanovllm.utils.cgroups import ROOT, memory_left
from nanovllm.utils.memory import (
    available_cpu_memory,
    cuda_kv_budget,
    is_out_of_memory,
    kv_budget,
    memory_summary,
    must_fit,
    peak_cpu_memory,
)
from tests.threads import one_thread  # noqa: F401

GIB = 1 << 30


def write_own_groups(root: Path, lines: str) -> None:
    """Say of which control groups the process is a member."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"{lines}\n")


def write_memory_group(root: Path, version: int, path: str, limit: Any, usage: int, statistics: str = "") -> None:
    """Files of a control group under a root of a file system."""
    directory = root / "sys/fs/cgroup" / ("memory" if version == 1 else "") / path
    directory.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for name, content in zip((*names, "memory.stat"), (limit, usage, statistics), strict=True):
        if content != "":
            (directory / name).write_text(f"{content}\n")


class TestCudaBudget:
    """Our share of the card, less what we hold and need; never more than is free."""

    def test_alone_on_the_card(self) -> None:
        budget = cuda_kv_budget(
            total=80 * GIB, free=78 * GIB, allocated=2 * GIB, activation_peak=3 * GIB, utilization=0.9
        )
        assert budget == 72 * GIB - 5 * GIB

    def test_another_process_does_not_count_as_our_use(self) -> None:
        """It holds 30 of 80 GiB: half of the card is still ours to fill."""
        budget = cuda_kv_budget(
            total=80 * GIB, free=48 * GIB, allocated=2 * GIB, activation_peak=1 * GIB, utilization=0.5
        )
        assert budget == 37 * GIB

    def test_another_process_leaves_less_than_our_share(self) -> None:
        budget = cuda_kv_budget(
            total=80 * GIB, free=20 * GIB, allocated=2 * GIB, activation_peak=1 * GIB, utilization=0.9
        )
        assert budget == 19 * GIB

    @pytest.mark.parametrize(("held_before", "expected"), [(0, 1), (30, 31), (200, 39)])
    def test_what_other_engines_of_the_process_hold_is_theirs(
        self, held_before: int, expected: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half a card each: this process holds 38 GiB by now. Less than was held before counts as nothing."""
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.cuda)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (42 * GIB, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 38 * GIB)
        budget = kv_budget(torch.device("cuda"), GIB, 0.5, held_before * GIB)
        assert budget == expected * GIB

    @pytest.mark.parametrize(("free", "allocated"), [(0, 0), (GIB, 0), (70 * GIB, 75 * GIB)])
    def test_never_negative(self, free: int, allocated: int) -> None:
        assert cuda_kv_budget(80 * GIB, free, allocated, activation_peak=2 * GIB, utilization=0.9) == 0

    def test_weights_and_activations_come_first(self) -> None:
        def budget(free: int = 20 * GIB, allocated: int = 0, activation_peak: int = 0) -> int:
            return cuda_kv_budget(24 * GIB, free, allocated, activation_peak, utilization=0.5)

        assert budget() == 12 * GIB
        assert budget(allocated=5 * GIB) == 7 * GIB
        assert budget(activation_peak=5 * GIB) == 7 * GIB
        assert budget(activation_peak=5 * GIB, free=6 * GIB) == GIB


class TestCpuMemory:
    """The system's available memory, or less in a container."""

    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB, total=128 * GIB))
        monkeypatch.setattr(memory, "memory_left", lambda root: None if root == ROOT else memory_left(root))

    def test_without_a_control_group(self, tmp_path: Path) -> None:
        assert available_cpu_memory() == 64 * GIB
        assert available_cpu_memory(tmp_path) == 64 * GIB

    @pytest.mark.parametrize("version", [1, 2])
    def test_a_limit_below_the_machines_memory(self, tmp_path: Path, version: int) -> None:
        write_memory_group(tmp_path, version, "", 8 * GIB, 3 * GIB)
        assert available_cpu_memory(tmp_path) == 5 * GIB

    @pytest.mark.parametrize(
        ("version", "limit"), [(2, "max"), (1, 9223372036854771712), (1, 100 * GIB), (2, 100 * GIB)], ids=str
    )
    def test_no_limit_or_one_beyond_the_machine(self, tmp_path: Path, version: int, limit: Any) -> None:
        write_memory_group(tmp_path, version, "", limit, 3 * GIB)
        assert available_cpu_memory(tmp_path) == 64 * GIB

    @pytest.mark.parametrize(
        ("version", "statistics"),
        [
            (2, f"anon {GIB}\ninactive_file {4 * GIB}\nactive_file {GIB}"),
            (1, f"inactive_file 0\ntotal_inactive_file {4 * GIB}\n"),
        ],
    )
    def test_page_cache_that_can_be_given_back_is_not_use(self, tmp_path: Path, version: int, statistics: str) -> None:
        """A checkpoint that was just read would otherwise look like memory that is gone."""
        write_memory_group(tmp_path, version, "", 8 * GIB, 7 * GIB, statistics)
        assert available_cpu_memory(tmp_path) == 5 * GIB

    def test_use_beyond_the_limit_leaves_nothing(self, tmp_path: Path) -> None:
        write_memory_group(tmp_path, 2, "", 2 * GIB, 3 * GIB)
        assert available_cpu_memory(tmp_path) == 0

    def test_where_use_is_throttled_is_a_limit_too(self, tmp_path: Path) -> None:
        write_memory_group(tmp_path, 2, "", 8 * GIB, GIB)
        (tmp_path / "sys/fs/cgroup/memory.high").write_text(f"{3 * GIB}\n")
        assert available_cpu_memory(tmp_path) == 2 * GIB

    @pytest.mark.parametrize(("version", "line"), [(2, "0::/jobs/mine"), (1, "7:memory:/jobs/mine\n0::/elsewhere")])
    @pytest.mark.parametrize("tightest", ["jobs/mine", "jobs", ""])
    def test_the_tightest_of_nested_groups_counts(self, tmp_path: Path, version: int, line: str, tightest: str) -> None:
        write_own_groups(tmp_path, line)
        for path in ("jobs/mine", "jobs", "", "jobs/another", "elsewhere"):
            ours = path not in ("jobs/another", "elsewhere")
            limit = (5 if path == tightest else 50) if ours else 2
            write_memory_group(tmp_path, version, path, limit * GIB, GIB)
        assert available_cpu_memory(tmp_path) == 4 * GIB

    def test_a_container_that_sees_its_own_group_as_the_root(self, tmp_path: Path) -> None:
        write_own_groups(tmp_path, "12:cpu,cpuacct:/docker/0123\n7:memory:/docker/0123")
        write_memory_group(tmp_path, 1, "", 3 * GIB, GIB)
        assert available_cpu_memory(tmp_path) == 2 * GIB

    def test_a_group_outside_of_what_is_shown(self, tmp_path: Path) -> None:
        write_own_groups(tmp_path, "0::/../../mine")
        write_memory_group(tmp_path, 2, "", 3 * GIB, GIB)
        assert available_cpu_memory(tmp_path) == 2 * GIB

    def test_both_versions_side_by_side(self, tmp_path: Path) -> None:
        write_own_groups(tmp_path, "7:memory:/a\n1:name=systemd:/b\n0::/b")
        write_memory_group(tmp_path, 1, "a", 6 * GIB, GIB)
        write_memory_group(tmp_path, 2, "unified/b", 8 * GIB, GIB)
        assert available_cpu_memory(tmp_path) == 5 * GIB

    def test_the_cache_takes_a_share_of_what_is_available(self) -> None:
        assert kv_budget(torch.device("cpu"), 0, 0.9) == int(memory.CPU_SHARE * 64 * GIB)
        assert kv_budget(torch.device("cpu"), 32 * GIB, 0.9) == int(memory.CPU_SHARE * 32 * GIB)
        assert kv_budget(torch.device("cpu"), 65 * GIB, 0.9) == 0
        assert 0.1 < memory.CPU_SHARE < 0.9

    def test_no_room_for_a_single_block(self, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_190_000, total=GIB))
        with pytest.raises(ValueError, match=r"no memory is left for the KV cache on cpu: a block of .* tokens takes"):
            LLM(tiny_checkpoint, device="cpu", skip_tokenizer_init=True, kvcache_block_size=512)

    def test_no_more_blocks_than_the_residents_can_use(self, tiny_checkpoint: Path) -> None:
        with LLM(
            tiny_checkpoint,
            device="cpu",
            skip_tokenizer_init=True,
            max_num_seqs=3,
            max_model_len=40,
            kvcache_block_size=16,
        ) as llm:
            assert llm.get_metrics()["num_kvcache_blocks"] == 3 * 3
            assert llm.get_metrics()["kvcache_bytes"] == 9 * 16 * 3 * 2 * 2 * 32 * 4  # 3 layers, 2 heads of 32 floats

    def test_more_blocks_than_fit_are_refused(self, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
        """At 16 tokens, 3 layers and 2 heads of 32 floats for keys and values, a block takes 24 KiB."""
        state = BatchState.num_bytes(1, 512, 16)
        available = 100 * 24 * 1024 + state
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=GIB))
        arguments: dict[str, Any] = {
            "device": "cpu",
            "skip_tokenizer_init": True,
            "kvcache_block_size": 16,
            "max_num_seqs": 1,
        }
        with pytest.raises(ValueError, match=r"num_kvcache_blocks is 101: .*at most 100 blocks fit"):
            LLM(tiny_checkpoint, num_kvcache_blocks=101, **arguments)
        LLM(tiny_checkpoint, num_kvcache_blocks=100, **arguments).close()


def test_peak_memory_is_that_of_this_process() -> None:
    resident = psutil.Process().memory_info().rss
    assert 0.9 * resident < peak_cpu_memory() < psutil.virtual_memory().total


def no_memory(*arguments: Any, **named: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class TestFullDevice:
    """Whatever there is no room for while an engine is made: one error that names it, and what to lower."""

    RESIDENTS = r"max_num_seqs=3 or max_model_len=40, or end other processes on the device\)$"

    def open(self, checkpoint: Path, **options: Any) -> LLM:
        limits = {"max_num_seqs": 3, "max_model_len": 40, "max_num_batched_tokens": 48, **options}
        return LLM(checkpoint, device="cpu", skip_tokenizer_init=True, **limits)

    def test_weights(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model_runner, "load_weights", no_memory)
        with pytest.raises(ValueError, match=r"cpu has no room for the weights of .*: .* bytes are free \(end other"):
            self.open(tiny_checkpoint)

    @pytest.mark.parametrize("options", [{}, {"max_model_len": None}], ids=str)
    def test_the_largest_step(
        self, tiny_checkpoint: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        monkeypatch.setattr(KVSizing, "num_blocks", lambda sizing, profile: profile())
        monkeypatch.setattr(ModelRunner, "run_without_cache", no_memory)
        length = options.get("max_model_len", 40) or 512
        told = (
            r"no room for the largest step, of 48 tokens, .*"
            rf"\(lower max_num_batched_tokens=48, max_num_seqs=3 or max_model_len={length}, or end"
        )
        with pytest.raises(ValueError, match=told) as caught:
            self.open(tiny_checkpoint, **options)
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)

    @pytest.mark.parametrize(
        ("blocks", "told"),
        [
            (7, r"a KV cache of 7 blocks, .* bytes: .*\(lower num_kvcache_blocks=7, or end other"),
            (None, rf"a KV cache of 9 blocks, .* bytes: .*\(lower num_kvcache_blocks=9, {RESIDENTS}"),
        ],
    )
    def test_the_cache(
        self, tiny_checkpoint: Path, blocks: int | None, told: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for backend in (CpuAttention, MatmulAttention):
            monkeypatch.setattr(backend, "allocate_cache", no_memory)
        with pytest.raises(ValueError, match=told):
            self.open(tiny_checkpoint, num_kvcache_blocks=blocks, kvcache_block_size=16)

    @pytest.mark.parametrize("name", ["BatchState", "Drawing"])
    def test_the_tables(self, tiny_checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model_runner, name, no_memory)
        told = rf"no room for the tables of 3 sequences beside .*\(lower num_kvcache_blocks=8, {self.RESIDENTS}"
        with pytest.raises(ValueError, match=told):
            self.open(tiny_checkpoint, num_kvcache_blocks=8)

    @pytest.mark.parametrize("fails", ["forward", "warm_up"])
    def test_the_first_steps(self, tiny_checkpoint: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with self.open(tiny_checkpoint, num_kvcache_blocks=8) as llm:
            runner = llm.engine.runner
            monkeypatch.setattr(runner.model if fails == "forward" else runner.attention, fails, no_memory)
            told = rf"no room for a few small steps .*\(lower num_kvcache_blocks=8, {self.RESIDENTS}"
            with pytest.raises(ValueError, match=told) as caught:
                runner.warm_up()
            assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)

    def test_a_card_on_which_the_process_finds_no_room_at_all(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*arguments: Any) -> None:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere")

        monkeypatch.setattr(model_runner, "resolve_device", lambda name: torch.device("cuda:0"))
        monkeypatch.setattr(model_runner, "_take_stream", full)
        monkeypatch.setattr(torch.cuda, "mem_get_info", full)
        with pytest.raises(ValueError, match=r"cuda:0 has no room for what CUDA .*: its memory is full \(end other"):
            self.open(tiny_checkpoint)

    def test_on_a_card_the_share_is_what_to_lower_unless_the_blocks_were_given(self, tiny_checkpoint: Path) -> None:
        def remedy(**options: Any) -> str:
            with self.open(tiny_checkpoint, gpu_memory_utilization=0.8, **options) as llm:
                sizing = llm.engine.runner.sizing
            return replace(sizing, device=torch.device("cuda")).remedy("max_num_seqs", num_blocks=6)

        assert remedy().startswith("lower gpu_memory_utilization=0.8 or max_num_seqs=3, or end")
        assert remedy(num_kvcache_blocks=6).startswith("lower num_kvcache_blocks=6 or max_num_seqs=3, or end")

    def test_any_other_failure_stays_what_it_is(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: Any) -> None:
            raise RuntimeError("shapes do not match")

        monkeypatch.setattr(model_runner, "BatchState", fail)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            self.open(tiny_checkpoint)

    def test_a_card_says_what_is_free_and_what_is_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2000)
        device = torch.device("cuda:1")
        assert memory_summary(device) == "1,000 of 85,899,345,920 bytes are free, this process holds 2,000"
        told = r"^cuda:1 has no room for it: 1,000 of .* holds 2,000 \(take another\)$"
        with pytest.raises(ValueError, match=told), must_fit(device, "it", "take another"):
            no_memory()


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA driver error: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "HIP error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "Triton Error [HIP]: out of memory",
        "MPS backend out of memory (MPS allocated: 5.56 GB, max allowed: 6.80 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "NCCL error, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_a_full_device_however_it_is_said(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize(
    "message",
    [
        "shapes do not match",
        "the shop ran out of memory cards",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "Triton Error [CUDA]: invalid argument",
        "out of resource: shared memory, Required: 262144, Hardware limit: 232448",
        "CUDA error: too many resources requested for launch",
    ],
)
def test_any_other_error_is_none_of_a_full_device(message: str) -> None:
    assert not is_out_of_memory(RuntimeError(message))
