"""Sums and exchanges through shared memory: by threads that stand in for processes."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.utils.shared_group import SharedMemoryGroup, new_memory, why_not_shared_memory

pytestmark = pytest.mark.skipif(
    os.name != "posix" or why_not_shared_memory() is not None, reason="there is no such group on this machine"
)


def run_ranks(size: int, function: Callable[[SharedMemoryGroup], Any], timeout: float = 10.0) -> list[Any]:
    """What ``function`` returns on each of the ranks, which run at the same time."""
    fd = new_memory(size)
    with ThreadPoolExecutor(size) as pool:
        groups = [SharedMemoryGroup(fd, rank, size, timeout, lambda: None) for rank in range(size)]
        os.close(fd)
        return [future.result() for future in [pool.submit(function, group) for group in groups]]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
    return values.to(dtype)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    size=st.integers(2, 4),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["sum", "gather", "broadcast"]),
            st.sampled_from([(0,), (1,), (3, 5), (1 << 18, 3), (7, 1, 2)]),
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.float64]),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_every_rank_gets_the_same(size: int, steps: list[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
    """Of any kind, one after another, and of more than a slot holds."""

    def rank(group: SharedMemoryGroup) -> list[Any]:
        results: list[Any] = []
        for number, (kind, shape, dtype) in enumerate(steps):
            x = drawn(shape, dtype, 100 * group.rank + number)
            if kind == "sum":
                group.allreduce([x]).wait()
            elif kind == "broadcast":
                group.broadcast([x]).wait()
            else:
                parts = [torch.empty_like(x) for _ in range(size)]
                group.allgather([parts], [x]).wait()
                x = torch.stack(parts)
            results.append(x)
        return results

    everybody = run_ranks(size, rank)
    for number, (kind, shape, dtype) in enumerate(steps):
        given_ = [drawn(shape, dtype, 100 * one + number) for one in range(size)]
        expected = {
            "sum": torch.stack(given_).sum(0, dtype=dtype),
            "broadcast": given_[0],
            "gather": torch.stack(given_),
        }
        for results in everybody:
            assert torch.equal(results[number], everybody[0][number])
            torch.testing.assert_close(
                results[number], expected[kind], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0.1
            )


def test_ranks_that_come_late_are_waited_for() -> None:
    def rank(group: SharedMemoryGroup) -> float:
        x = torch.tensor([1.0 + group.rank])
        for number in range(5):
            if group.rank == number % 3:
                time.sleep(0.05)
            group.allreduce([x]).wait()
        return x.item()

    assert run_ranks(3, rank) == [6.0 * 3**4] * 3


def test_a_rank_that_does_not_come_is_named() -> None:
    def rank(group: SharedMemoryGroup) -> None:
        if group.rank != 1:
            group.allreduce([torch.ones(3)])

    with pytest.raises(TimeoutError, match=r"timed out: rank 1 had not come to a sum after 0\.2 s"):
        run_ranks(3, rank, timeout=0.2)


def test_whoever_waits_hears_what_its_check_raises() -> None:
    def fail() -> None:
        raise RuntimeError("rank 1 is dead")

    fd = new_memory(2)
    group = SharedMemoryGroup(fd, 0, 2, 10.0, fail)
    os.close(fd)
    with pytest.raises(RuntimeError, match="rank 1 is dead"):
        group.broadcast([torch.ones(1)])
