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


@cache
def has_hopper_features(device: torch.device) -> bool:
    """Whether kernels can start early, and have a tile of a tensor copied to shared memory as a whole (descriptors).

    A copied tile takes fewer instructions and registers than loads of it. And what loads have asked a multiprocessor
    for seems to come in the order in which it was asked for: the few values that a kernel has waited for come behind
    all that programs of the next kernel want already. Copied tiles do not stand in that queue.
    """
    return SINCE_TRITON_3_5 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """What a kernel with the constant ``OVERLAPS`` is launched with: to overlap where the device can."""
    if has_hopper_features(device):
        return {"OVERLAPS": True, "launch_pdl": True}
    return {"OVERLAPS": False}
