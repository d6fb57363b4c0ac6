"""How much memory the KV cache may take: on a shared card, in a container, and next to what is already there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nanovllm import LLM
from nanovllm.engine.batch_state import BatchState
from nanovllm.utils import memory
from nanovllm.utils.cgroups import ROOT, memory_left
from nanovllm.utils.memory import available_cpu_memory, cuda_kv_budget, kv_budget, peak_cpu_memory
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
