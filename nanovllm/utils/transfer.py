"""Copies between host and device that nobody waits for."""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Pinned memory is kept for later copies of the same size: what is larger stays on the device until it is wanted.
MOST_PINNED = 16 << 20

_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


def to_device(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on ``device``. On CUDA and MPS the copy is only queued: the host runs on."""
    host = torch.from_numpy(np.array(values, dtype=_NUMPY[dtype]))
    if device.type == "cuda":
        # torch's allocator of pinned memory hands a piece out again only when the copies from it are done.
        return host.pin_memory().to(device, non_blocking=True)
    if device.type == "mps" and host.numel():
        return _in_transit.send(host, device)
    return host.to(device)


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays of integers as int64 tensors of their shapes on ``device``, in one copy; each begins at 16 bytes."""
    sizes = [array.size + array.size % 2 for array in arrays]
    flat = np.zeros(sum(sizes), dtype=np.int64)
    start = 0
    for array, size in zip(arrays, sizes, strict=True):
        flat[start : start + array.size] = array.ravel()
        start += size
    parts = to_device(flat, torch.int64, device).split(sizes)
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class HostCopy:
    """A copy of a tensor to the host, queued behind what the device still has to do.

    Args:
        tensor: On any device; it may be overwritten by whatever is queued after this.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: Any = None
        if tensor.device.type == "mps" and tensor.numel():
            self._host, self._event = _in_transit.fetch(tensor)
        elif tensor.device.type == "cuda":
            if tensor.nbytes > MOST_PINNED:
                self._host = tensor.clone()
            else:  # device: the caller may have set another default
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


class _InTransit:
    """Host memory that MPS may still be reading from or writing to.

    There a queued copy uses the host's memory itself, and nothing else keeps that alive: freed too early, it would be
    read, or written, when it belongs to somebody else (https://github.com/pytorch/pytorch/issues/139550). So it is kept
    here until an event has passed that was recorded after the copy. There is one queue for the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: list[torch.Tensor] = []  # of copies queued since the last event
        self._recorded: deque[tuple[Any, list[torch.Tensor]]] = deque()  # events, and of copies before each

    def send(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """``host`` on ``device``, as a queued copy."""
        sent = host.to(device, non_blocking=True)
        self._since.append(host)
        return sent

    def fetch(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Memory of the host that ``tensor`` is going to be in, and the event to wait for before it is read."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        host.copy_(tensor.contiguous(), non_blocking=True)  # strides would have it copied once more, at once
        with self._lock:
            # Taken before the event is recorded: what another thread queues in between is left for the next one.
            kept, self._since = self._since, []
            kept.append(host)
            event = torch.mps.Event()
            event.record()
            self._recorded.append((event, kept))
            while self._recorded and self._recorded[0][0].query():
                self._recorded.popleft()
        return host, event

    def settle(self) -> None:
        """Wait until the device is done with everything, and let go of all memory."""
        torch.mps.synchronize()
        with self._lock:
            self._since = []
            self._recorded.clear()


_in_transit = _InTransit()


def settle_mps() -> None:
    """Wait until MPS is done with everything that was queued, copies included."""
    _in_transit.settle()
