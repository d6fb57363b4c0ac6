"""Memory in pages of 2 MiB instead of 4 KiB, for what a processor walks through from one end to the other.

The prefetchers of a processor stop at the end of a page, and each page costs a look-up. Reading weights out of huge
pages is 7 to 12% faster (43 instead of 38.6 to 40.5 GB/s on 2 Zen 5 cores, where memory gives 44).
"""

import math
import mmap

import torch

_HUGE = 2 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the CPU, in huge pages where the system gives them for the asking (Linux)."""
    size = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < _HUGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
    except OSError:  # a kernel without them; no memory, of which torch's own error is known
        return torch.empty(shape, dtype=dtype, device="cpu")
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # holds the mapping, which goes when the tensor does
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + size].view(dtype).view(shape)
