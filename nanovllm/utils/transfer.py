"""Copies between host and device that nobody waits for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Pinned memory is kept for later copies of the same size: what is larger stays on the device until it is wanted.
MOST_PINNED = 16 << 20

_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


def to_device(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on ``device``.

    On CUDA the copy goes through pinned memory and is only queued: the host runs on. (torch's allocator of pinned
    memory hands a piece out again only when the copies from it are done.)
    """
    host = torch.from_numpy(np.array(values, dtype=_NUMPY[dtype]))
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class HostCopy:
    """A copy of a tensor to the host, queued behind what the device still has to do.

    Args:
        tensor: On any device; it may be overwritten by whatever is queued after this.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda" and tensor.nbytes > MOST_PINNED:
            self._host = tensor.clone()
        elif tensor.device.type == "cuda":
            # device: the caller may have set another default
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.to("cpu", copy=True)

    def wait(self) -> torch.Tensor:
        """The copy, once it is there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        self._host = self._host.cpu()
        return self._host
