"""How the ranks of an engine sum and exchange: through shared memory, gloo or NCCL, by torch's interface."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.placement import resolve_device
from nanovllm.utils.shared_group import SharedMemoryGroup, why_not_shared_memory


class RankGroup:
    """A process group of our own, which torch.distributed knows nothing of: the program may have others.

    It can be closed whoever still refers to it, be it the traceback of the error that ended the engine.

    Args:
        store: A file by which the ranks find each other, at the latest in their first sum.
        memory: A file descriptor of memory that they share.
        rank: This rank.
        config: The engine's configuration.
        check: Called now and then while waiting for others; may raise.
    """

    def __init__(
        self, store: Path, memory: int, rank: int, config: EngineConfig, check: Callable[[], None] = lambda: None
    ) -> None:
        group = self._group = _make_group(store, memory, rank, config, check)
        self.allreduce, self.allgather, self.broadcast = group.allreduce, group.allgather, group.broadcast

    def close(self) -> None:
        """Let go of the connections to the other ranks."""
        for name in ("_group", "allreduce", "allgather", "broadcast"):
            self.__dict__.pop(name, None)


def on_rank(config: EngineConfig, rank: int) -> EngineConfig:
    """``config`` with the device that a rank is to use."""
    is_cuda = resolve_device(config.device).type == "cuda"
    return replace(config, device=f"cuda:{rank}") if is_cuda else config


def _make_group(store: Path, memory: int, rank: int, config: EngineConfig, check: Callable[[], None]) -> Any:
    size, timeout = config.tensor_parallel_size, config.tensor_parallel_timeout
    is_cuda = resolve_device(config.device).type == "cuda"
    if not is_cuda and why_not_shared_memory() is None:
        # Rank 0 judges: what it does itself, such as calling a request's functions, may take as long as it likes.
        return SharedMemoryGroup(memory, rank, size, timeout if rank == 0 else math.inf, check)
    distributed: Any = torch.distributed
    files = distributed.FileStore(str(store), size)
    limit = timedelta(seconds=timeout)
    if is_cuda:
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = limit
        with _nccl_leaves_errors_to_us():
            return distributed.ProcessGroupNCCL(files, rank, size, options)
    options = distributed.ProcessGroupGloo._Options()
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]  # never on a network
    options._timeout = limit
    return distributed.ProcessGroupGloo(files, rank, size, options)


@contextmanager
def _nccl_leaves_errors_to_us() -> Iterator[None]:
    """Groups made within it do not end the process, which is the caller's, when another rank is missed."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
