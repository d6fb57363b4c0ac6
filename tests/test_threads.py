"""Threads on the CPU: how many, of which cores, and that the user's program keeps its own number."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.utils import openmp, threads
from nanovllm.utils.cgroups import cpu_quota
from nanovllm.utils.threads import ThreadLimit, allowed_cpus, best_threads, cores_by_socket, torch_defaults


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def as_list(cpus: list[int]) -> str:
    return ",".join(map(str, cpus))


def write_machine(
    root: Path, sockets: int = 1, cores: int = 4, smt: int = 1, nodes: int | None = None, package: int | None = None
) -> int:
    """Describe a machine under ``root``, as Linux numbers its CPUs: the first threads of all cores, then the second.

    Args:
        root: Of the file system.
        sockets: Sockets.
        cores: Cores of each.
        smt: Threads of each core.
        nodes: NUMA nodes of all sockets together; by default one a socket. 0 for a kernel without NUMA.
        package: The number that all sockets bear, instead of each its own.

    Returns:
        Its logical CPUs.
    """
    total = sockets * cores
    for cpu in range(total * smt):
        core, topology = cpu % total, root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(topology / "physical_package_id", core // cores if package is None else package)
        write(topology / "core_id", core % cores)
        write(topology / "thread_siblings_list", as_list([core + total * thread for thread in range(smt)]))
    nodes = sockets if nodes is None else nodes
    for node in range(nodes):
        share = range(node * total // nodes, (node + 1) * total // nodes)
        cpus = [core + total * thread for thread in range(smt) for core in share]
        write(root / f"sys/devices/system/node/node{node}/cpulist", as_list(cpus))
    return total * smt


class TestCores:
    @pytest.mark.parametrize("smt", [1, 2, 4])
    def test_a_core_is_worth_a_thread_however_many_it_has(self, tmp_path: Path, smt: int) -> None:
        cpus = write_machine(tmp_path, cores=6, smt=smt)
        assert cores_by_socket(range(cpus), tmp_path) == [6]
        assert best_threads(range(cpus), root=tmp_path) == 6

    def test_only_the_cores_of_the_affinity_mask(self, tmp_path: Path) -> None:
        write_machine(tmp_path, cores=8, smt=2)
        assert best_threads({0, 1, 2}, root=tmp_path) == 3
        assert best_threads({0, 8}, root=tmp_path) == 1, "both threads of one core"
        assert best_threads({3, 4, 11, 15}, root=tmp_path) == 3
        assert best_threads({5}, root=tmp_path) == 1

    def test_one_socket_of_two(self, tmp_path: Path) -> None:
        cpus = write_machine(tmp_path, sockets=2, cores=8, smt=2)
        assert cores_by_socket(range(cpus), tmp_path) == [8, 8]
        assert best_threads(range(cpus), root=tmp_path) == 8
        assert best_threads({0, 1, 8, 9, 10}, root=tmp_path) == 3, "the one with more of the mask"

    def test_the_nodes_of_one_socket_count_together(self, tmp_path: Path) -> None:
        cpus = write_machine(tmp_path, sockets=2, cores=8, nodes=8)
        assert cores_by_socket(range(cpus), tmp_path) == [8, 8]

    @pytest.mark.parametrize("nodes", [0, 1])
    def test_sockets_whose_memory_is_interleaved_count_together(self, tmp_path: Path, nodes: int) -> None:
        cpus = write_machine(tmp_path, sockets=2, cores=8, nodes=nodes)
        assert cores_by_socket(range(cpus), tmp_path) == [16]

    def test_nodes_tell_sockets_apart_where_firmware_does_not(self, tmp_path: Path) -> None:
        cpus = write_machine(tmp_path, sockets=2, cores=8, package=-1)
        assert cores_by_socket(range(cpus), tmp_path) == [8, 8]

    def test_ranks_share_the_cores(self, tmp_path: Path) -> None:
        cpus = range(write_machine(tmp_path, sockets=2, cores=8, smt=2))
        assert [best_threads(cpus, ranks, tmp_path) for ranks in (1, 2, 3, 4, 16, 64)] == [8, 8, 5, 4, 1, 1]
        assert best_threads({0, 1, 2, 3}, 2, tmp_path) == 2

    def test_a_cpu_that_is_not_described_does_not_count(self, tmp_path: Path) -> None:
        write_machine(tmp_path, cores=4)
        assert best_threads({0, 1, 77}, root=tmp_path) == 2

    @pytest.mark.parametrize(
        ("logical", "physical", "cpus", "expected"),
        [
            (8, 8, None, 8),  # macOS has no mask
            (16, 8, None, 8),
            (16, 8, range(16), 8),  # Windows has
            (16, 8, range(4), 2),
            (16, 8, range(1), 1),
            (6, None, range(4), 4),  # nobody knows
        ],
    )
    def test_without_sys(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        logical: int,
        physical: int | None,
        cpus: Any,
        expected: int,
    ) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: logical)
        monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: physical)
        assert best_threads(cpus, root=tmp_path) == expected
        assert best_threads(cpus, 2, root=tmp_path) == max(1, expected // 2)

    def test_the_mask_of_a_system_that_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.delattr(psutil.Process, "cpu_affinity", raising=False)
        assert allowed_cpus() is None

    def test_this_machine(self) -> None:
        cpus = allowed_cpus()
        assert 1 <= best_threads(cpus) <= (len(cpus) if cpus else os.cpu_count() or 1)


class TestQuota:
    @pytest.mark.parametrize(
        ("text", "quota", "expected"),
        [
            ("max 100000", None, 4),
            ("150000 100000", 1.5, 2),
            ("50000 100000", 0.5, 1),
            ("200000 100000", 2.0, 2),
            ("320000 100000", 3.2, 4),
            ("1000000 100000", 10.0, 4),
            ("", None, 4),
        ],
    )
    @pytest.mark.parametrize("version", [1, 2])
    def test_quotas_of_both_versions(
        self, tmp_path: Path, version: int, text: str, quota: float | None, expected: int
    ) -> None:
        cpus = range(write_machine(tmp_path, cores=4))
        if version == 2:
            write(tmp_path / "sys/fs/cgroup/cpu.max", text)
        elif text:
            value, period = text.split()
            write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1" if value == "max" else value)
            write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us", period)
        assert cpu_quota(tmp_path) == quota
        assert best_threads(cpus, root=tmp_path) == expected

    @pytest.mark.parametrize("tightest", ["a/b", "a", ""])
    def test_the_tightest_of_nested_groups_counts(self, tmp_path: Path, tightest: str) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/a/b")
        for path in ("a/b", "a", "", "c"):
            cpus = 0.5 if path == "c" else 3 if path == tightest else 7
            write(tmp_path / "sys/fs/cgroup" / path / "cpu.max", f"{int(cpus * 100000)} 100000")
        assert cpu_quota(tmp_path) == 3.0

    def test_a_hierarchy_that_two_controllers_share(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "3:cpu,cpuacct:/jobs/7\n2:memory:/elsewhere\n1:name=systemd:/x")
        write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_quota_us", 250000)
        write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_period_us", 100000)
        assert cpu_quota(tmp_path) == 2.5

    def test_ranks_share_the_quota(self, tmp_path: Path) -> None:
        cpus = range(write_machine(tmp_path, cores=16))
        write(tmp_path / "sys/fs/cgroup/cpu.max", "550000 100000")
        assert [best_threads(cpus, ranks, tmp_path) for ranks in (1, 2, 3, 8)] == [6, 3, 2, 1]

    def test_what_is_no_number_is_no_quota(self, tmp_path: Path) -> None:
        write(tmp_path / "sys/fs/cgroup/cpu.max", "0 0")
        assert cpu_quota(tmp_path) is None


class TestDefaults:
    def test_numbers_that_torch_may_have_chosen_itself(self, tmp_path: Path) -> None:
        write_machine(tmp_path, sockets=2, cores=8, smt=2)
        assert torch_defaults({0, 1, 2, 16}, True, tmp_path) == {3, 16}
        assert torch_defaults({0, 1, 2, 16}, False, tmp_path) == {3, 16, 4, 32}


@pytest.fixture
def quota_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of two cores in one socket and four threads, of which one CPU's worth may be used."""
    write_machine(tmp_path, cores=2, smt=2)
    write(tmp_path / "sys/fs/cgroup/cpu.max", "100000 100000")
    monkeypatch.setattr(threads, "allowed_cpus", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    return tmp_path


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # what torch itself would take of the machine above
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has threads of its own")
class TestLimit:
    def test_inside_only(self, quota_of_one: Path) -> None:
        limit = ThreadLimit(environ={}, root=quota_of_one)
        assert limit.num_threads() == 1
        for _ in range(2):
            with limit:
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 2

    def test_an_error_inside(self, quota_of_one: Path) -> None:
        with pytest.raises(ZeroDivisionError), ThreadLimit(environ={}, root=quota_of_one):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2

    @pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
    def test_the_environment_is_the_users_word(self, quota_of_one: Path, name: str) -> None:
        with ThreadLimit(environ={name: "2"}, root=quota_of_one):
            assert torch.get_num_threads() == 2

    def test_an_empty_variable_says_nothing(self, quota_of_one: Path) -> None:
        assert ThreadLimit(environ={"OMP_NUM_THREADS": ""}, root=quota_of_one).num_threads() == 1

    @pytest.mark.parametrize("number", [1, 3, 4])
    def test_a_number_that_torch_would_not_choose_is_the_users(self, quota_of_one: Path, number: int) -> None:
        """Four are the logical CPUs, which a torch with MKL never takes unasked."""
        torch.set_num_threads(number)
        with ThreadLimit(environ={}, root=quota_of_one):
            assert torch.get_num_threads() == number

    def test_what_is_set_later_counts_from_then_on(self, quota_of_one: Path) -> None:
        limit = ThreadLimit(environ={}, root=quota_of_one)
        torch.set_num_threads(3)
        assert limit.num_threads() == 3
        with limit:
            torch.set_num_threads(4)  # by a logits processor, say
        assert torch.get_num_threads() == 4

    def test_threads_of_the_program_have_numbers_of_their_own(self, quota_of_one: Path) -> None:
        limit, seen = ThreadLimit(environ={}, root=quota_of_one), []

        def work() -> None:
            torch.set_num_threads(3)
            with limit:
                seen.append(torch.get_num_threads())

        thread = threading.Thread(target=work)
        with limit:
            thread.start()
            thread.join()
            assert torch.get_num_threads() == 1
        assert seen == [3]
        assert torch.get_num_threads() == 2

    def test_a_torch_without_openmp_is_left_alone(self, quota_of_one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
        assert ThreadLimit(environ={}, root=quota_of_one).num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has threads of its own")
class TestEngine:
    def open(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> LLM:
        for name in threads.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        limits = {"root": root, "environ": {}}
        monkeypatch.setattr("nanovllm.engine.model_runner.ThreadLimit", lambda ranks=1: ThreadLimit(ranks, **limits))
        return LLM(checkpoint, device="cpu", skip_tokenizer_init=True, num_kvcache_blocks=16)

    def test_steps_run_on_the_best_number_and_the_program_keeps_its_own(
        self,
        tiny_checkpoint: Path,
        quota_of_one: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        seen = []
        with caplog.at_level(logging.INFO, "nanovllm"), self.open(tiny_checkpoint, monkeypatch, quota_of_one) as llm:
            assert torch.get_num_threads() == 2
            assert llm.get_metrics()["num_threads"] == 1
            assert "on cpu, 1 thread on the host" in caplog.text
            llm.engine.runner.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
            params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
            for _ in llm.stream([1, 2, 3], params):
                assert torch.get_num_threads() == 2
            assert seen == [1, 1, 1]
            torch.set_num_threads(3)
            llm.generate([[1, 2, 3]], params, use_tqdm=False)
            assert seen == [1, 1, 1, 3, 3, 3]
            assert llm.get_metrics()["num_threads"] == 3
        assert torch.get_num_threads() == 3

    def test_engines_of_different_numbers_side_by_side(
        self, tiny_checkpoint: Path, quota_of_one: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
    ) -> None:
        roomy = tmp_path_factory.mktemp("roomy")
        write_machine(roomy, cores=2, smt=2)
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        seen: list[tuple[str, int]] = []
        one = self.open(tiny_checkpoint, monkeypatch, quota_of_one)
        two = self.open(tiny_checkpoint, monkeypatch, roomy)
        with one, two:
            for name, llm in (("one", one), ("two", two)):
                llm.engine.runner.model.register_forward_hook(
                    lambda *_, name=name: seen.append((name, torch.get_num_threads()))
                )
            for llm in (one, two, one):
                llm.generate([[1, 2, 3]], params, use_tqdm=False)
        assert seen == [("one", 1)] * 2 + [("two", 2)] * 2 + [("one", 1)] * 2


def test_omp_num_threads_reaches_the_engine(tiny_checkpoint: Path) -> None:
    code = (
        "from nanovllm import LLM\n"
        f"with LLM({str(tiny_checkpoint)!r}, device='cpu', skip_tokenizer_init=True, num_kvcache_blocks=4) as llm:\n"
        "    print(llm.get_metrics()['num_threads'])\n"
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}  # MKL takes no more than there are cores
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environ)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(
    ("first", "environment", "expected"),
    [
        ("", {}, "40000"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import torch;", {}, "None"),
    ],
)
def test_threads_that_wait_give_way_soon_unless_somebody_chose(
    first: str, environment: dict[str, str], expected: str
) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in openmp.VARIABLES}
    code = f"{first}import nanovllm, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_other_programs_do_not_inherit_it() -> None:
    given = {"A": "1"}
    environ = {**given, "GOMP_SPINCOUNT": openmp.SPINS}
    assert openmp.as_it_was(environ) == given
    assert openmp.as_it_was({"GOMP_SPINCOUNT": "7"}) == {"GOMP_SPINCOUNT": "7"}
