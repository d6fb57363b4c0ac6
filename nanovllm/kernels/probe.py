"""The smallest kernel there is, to see whether Triton can compile and launch one here."""

import torch
import triton
import triton.language as tl


@triton.jit
def _probe_kernel(out):
    tl.store(out, 1)


def probe(device: torch.device) -> None:
    """Launch a kernel on ``device``; raises whatever Triton raises where it cannot (no C compiler, no driver, ...)."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        _probe_kernel[(1,)](out)
    if int(out) != 1:
        raise RuntimeError("a kernel was launched, and did nothing")
