"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs (from Hopper on).

Between two kernels a GPU drains, and fills again: about a microsecond, as much as a small kernel takes. A kernel that
is launched with ``launch_options`` begins as soon as every program of the one before it has called
``let_next_kernel_start``, and does what does not depend on it, such as loading weights. A program must call
``wait_for_previous_kernel`` before it reads what other kernels write, and before it writes anything; and some program
must, whatever there is to do: only then is the next kernel, which waits for this one, behind all before it as well.
(CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".)
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

# Triton 3.4 has it as well, but cannot compile it.
SINCE_TRITON_3_5 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)

if SINCE_TRITON_3_5:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:

    @triton.jit
    def gdc_launch_dependents():  # type: ignore[no-untyped-def]
        pass

    @triton.jit
    def gdc_wait():  # type: ignore[no-untyped-def]
        pass


@triton.jit
def let_next_kernel_start(OVERLAPS: tl.constexpr):
    """Let the next kernel begin, if it is launched so, once all programs have come here."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(OVERLAPS: tl.constexpr):
    """Wait until all that came before on the stream is done and can be seen."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def bring_into_cache(first, length, share, shares, SHARE_LINES: tl.constexpr):
    """Ask the memory for one of ``shares`` equal shares of ``length`` elements, for whoever reads them later.

    A share must take no more than ``SHARE_LINES`` lines of the second-level cache, 128 bytes each.
    """
    per_line: tl.constexpr = 1024 // first.dtype.element_ty.primitive_bitwidth
    lines = (length + per_line - 1) // per_line
    line = share * tl.cdiv(lines, shares) + tl.arange(0, SHARE_LINES)
    address = (first + tl.minimum(line, lines - 1) * per_line).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """What a kernel with the constant ``OVERLAPS`` is launched with: to overlap where the device can."""
    if SINCE_TRITON_3_5 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAPS": True, "launch_pdl": True}
    return {"OVERLAPS": False}
