"""How much memory there is, and how much of it the KV cache may take."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from nanovllm.utils.cgroups import ROOT, memory_left

# Of the CPU's available memory, the share the KV cache may take at most. Pages are taken only as blocks are used.
CPU_SHARE = 0.4
MPS_DEFAULT_BLOCKS = 1024
MPS_SHARE = 0.5

# Who says so in words only: MPS (at least up to torch 2.6), CUDA's runtime and driver, Triton, NCCL, and libraries that
# allocate for themselves. A kernel that asks for too much shared memory is another matter.
_OUT_OF_MEMORY = re.compile(
    r"\b(?:MPS backend|(?:CUDA|HIP)(?: driver)?(?: error:)?|Triton Error \[\w+\]:) out of memory"
    r"|\bCuda failure[ \d]* 'out of memory'"
    r"|\bCUDA_ERROR_OUT_OF_MEMORY\b|\bcudaErrorMemoryAllocation\b"
    r"|\b(?:CU|HIP)[A-Z]+_STATUS_(?:INTERNAL_ERROR_DEVICE_)?ALLOC(?:ATION)?_FAILED\b"
)


def available_cpu_memory(root: Path = ROOT) -> int:
    """Bytes this process can still take: the system's available memory, or less where a control group says so."""
    available = psutil.virtual_memory().available
    left = memory_left(root)
    return available if left is None else min(available, left)


def peak_cpu_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cuda_kv_budget(total: int, free: int, allocated: int, activation_peak: int, utilization: float) -> int:
    """KV cache bytes on a CUDA device.

    Only the engine's own use counts against its share, so that another one on the device does not shrink it further
    than the memory it really takes.

    Args:
        total: The device's memory in bytes.
        free: What is free on it now, with the engine's weights loaded.
        allocated: What the engine holds (weights).
        activation_peak: What a worst-case step takes on top of that.
        utilization: Share of ``total`` the engine may use.
    """
    ours = int(total * utilization) - allocated - activation_peak
    return max(0, min(ours, free - activation_peak))


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on ``device`` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":  # whose memory is the host's: what others use of it is gone, too
        ours = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(ours, available_cpu_memory()))
    return available_cpu_memory()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no memory for a tensor, or for what a library, a kernel or the driver needs besides."""
    return isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def must_fit(device: torch.device, what: str, remedy: str) -> Iterator[None]:
    """Within it, running out of memory is an error that says what there is no room for, and what to do.

    Raises:
        ValueError: ``device`` ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"{device} has no room for {what}: {memory_summary(device)} ({remedy})") from error


def memory_summary(device: torch.device) -> str:
    """What is free on ``device``, and what this process holds, in words."""
    if device.type != "cuda":
        return f"{free_memory(device):,} bytes are free"
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # a process that has found no room on the device at all cannot ask
        return "its memory is full"
    held = torch.cuda.memory_reserved(device)
    return f"{free:,} of {total:,} bytes are free, this process holds {held:,}"


def held_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that this process holds now, once it has given back what it does not use; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def kv_budget(device: torch.device, needed: int, utilization: float, held_before: int = 0) -> int:
    """KV cache bytes that fit ``device`` now, once ``needed`` bytes are left for everything else.

    Args:
        device: Where the weights are loaded.
        needed: Bytes of tables and activations.
        utilization: Share of a CUDA device that an engine may use.
        held_before: What this process held of that before the engine began: other engines'.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
        held = max(0, held_memory(device) - held_before)
        free, total = torch.cuda.mem_get_info(device)
        return cuda_kv_budget(total, free, held, needed, utilization)
    if device.type == "mps":
        return int(MPS_SHARE * max(0, free_memory(device) - needed))
    return int(CPU_SHARE * max(0, free_memory(device) - needed))
