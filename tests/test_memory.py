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
from nanovllm.utils.memory import available_cpu_memory, cuda_kv_budget, kv_budget, peak_cpu_memory
from tests.threads import one_thread  # noqa: F401

GIB = 1 << 30


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
        monkeypatch.setattr(memory, "_CGROUP_FILES", ())

    def group(self, path: Path, monkeypatch: pytest.MonkeyPatch, limit: Any, usage: Any, statistics: str = "") -> None:
        names = []
        for name, content in (("limit", limit), ("usage", usage), ("statistics", statistics)):
            if content != "":
                (path / name).write_text(f"{content}\n")
            names.append(str(path / name))
        monkeypatch.setattr(memory, "_CGROUP_FILES", (*memory._CGROUP_FILES, (*names, "inactive_file")))

    def test_without_a_control_group(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert available_cpu_memory() == 64 * GIB
        absent = str(tmp_path / "absent")
        monkeypatch.setattr(memory, "_CGROUP_FILES", ((absent, absent, absent, "inactive_file"),))
        assert available_cpu_memory() == 64 * GIB

    def test_a_limit_below_the_machines_memory(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.group(tmp_path, monkeypatch, 8 * GIB, 3 * GIB)
        assert available_cpu_memory() == 5 * GIB

    @pytest.mark.parametrize("limit", ["max", 9223372036854771712, 100 * GIB])
    def test_no_limit_or_one_beyond_the_machine(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: Any
    ) -> None:
        self.group(tmp_path, monkeypatch, limit, 3 * GIB)
        assert available_cpu_memory() == 64 * GIB

    def test_page_cache_that_can_be_given_back_is_not_use(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A checkpoint that was just read would otherwise look like memory that is gone."""
        self.group(tmp_path, monkeypatch, 8 * GIB, 7 * GIB, f"anon {GIB}\ninactive_file {4 * GIB}\nactive_file {GIB}")
        assert available_cpu_memory() == 5 * GIB

    def test_use_beyond_the_limit_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.group(tmp_path, monkeypatch, 2 * GIB, 3 * GIB)
        assert available_cpu_memory() == 0

    def test_the_tightest_group_counts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name, limit in (("v2", 8 * GIB), ("v1", 6 * GIB)):
            (tmp_path / name).mkdir()
            self.group(tmp_path / name, monkeypatch, limit, GIB)
        assert available_cpu_memory() == 5 * GIB

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
